"""Models in a test's own process are closed, as a process that ends need not do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from seqloss.distributed.offline import OfflineModel


@pytest.fixture(autouse=True)
def _models_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    opened: list[OfflineModel] = []
    make = OfflineModel.__init__

    def noted(model: OfflineModel, *arguments: Any, **named: Any) -> None:
        make(model, *arguments, **named)
        opened.append(model)

    monkeypatch.setattr(OfflineModel, "__init__", noted)
    yield
    for model in opened:
        model.close()
