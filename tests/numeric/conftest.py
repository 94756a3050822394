"""Fixtures of tests of numbers."""

from __future__ import annotations

import pytest

from checkpoints import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family that there is."""
    return str(request.param)
