"""Where a graph makes logits, batches are as small as their memory wants."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fakes import FakeEngine, fake_bundle, padded_tokens
from seqloss.bundle.manifest import Vocabulary
from seqloss.engines.base import EngineInfo
from seqloss.runtime import token_budget
from seqloss.settings import Settings

INFO = EngineInfo("torch", "cpu", "float32", "fake", makes_logits=True)


def budget(classes: int, info: EngineInfo = INFO, **changes: Any) -> int:
    vocabulary = Vocabulary(source=50, target=50, classes=classes)
    return token_budget(info, fake_bundle(vocabulary=vocabulary), Settings(**changes))


@pytest.mark.parametrize(
    ("classes", "expected"), [(50, 4096), (16_384, 4096), (32_128, 2088), (256_206, 261)]
)
def test_more_classes_leave_room_for_fewer_tokens(classes: int, expected: int) -> None:
    """Of 1 GiB: four copies of 4 bytes per class and token."""
    assert budget(classes) == expected
    assert expected == 4096 or expected * classes * 16 <= 2**30 < (expected + 1) * classes * 16


def test_excluded_classes_have_logits_too() -> None:
    vocabulary = Vocabulary(source=50, target=50, classes=32_128, excluded_classes=[(0, 30_000)])
    assert token_budget(INFO, fake_bundle(vocabulary=vocabulary), Settings()) == 2088


def test_the_memory_is_a_setting_and_a_pair_alone_is_always_tried() -> None:
    assert budget(32_128, max_logits_bytes=2**28) == 522
    assert budget(32_128, max_logits_bytes=1024) == 1
    assert budget(32_128, max_batch_tokens=100) == 100


def test_graphs_without_logits_are_not_capped() -> None:
    assert budget(256_206, EngineInfo("torch", "cpu", "float32", "fake")) == 4096


def test_what_was_lowered_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        budget(50)
        assert not caplog.records
        budget(32_128)
    (record,) = caplog.records
    assert "max_batch_tokens is 2088" in record.getMessage()
    assert "max_logits_bytes is 1073741824" in record.getMessage()


class LogitsEngine(FakeEngine):
    @property
    def info(self) -> EngineInfo:
        return INFO


def test_no_batch_is_over_what_its_logits_may_take(make_client: Any) -> None:
    engine = LogitsEngine()
    client = make_client(engine=engine, max_logits_bytes=16 * 50 * 24)
    request = {
        "source_ids": [[4, 5, 6]] * 40,
        "target_ids": [[7, 8, 9, index] for index in range(40)],
    }
    assert client.post("/loss", json=request).status_code == 200
    assert max(map(padded_tokens, engine.batches)) <= 24
    assert sum(len(batch.decoder_input_ids) for batch in engine.batches) == 40
