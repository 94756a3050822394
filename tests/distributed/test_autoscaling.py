"""How many replicas a load needs."""

from __future__ import annotations

import math

import pytest

from autoscaling_context import context
from seqloss.distributed.autoscaling import ByQueuedTokens


@pytest.mark.parametrize(
    ("queued", "wanted"),
    [([0], 1), ([1000], 1), ([1001], 2), ([900, 900, 900], 3), ([100_000], 100)],
)
def test_no_replica_has_more_than_its_share_of_tokens(queued: list[float], wanted: int) -> None:
    assert ByQueuedTokens(1000)(context(queued)) == (wanted, {})


@pytest.mark.parametrize(
    ("busy", "wanted"), [([0.0], 1), ([0.8, 0.8], 2), ([0.9, 0.9], 3), ([1.0], 2), ([0.3] * 3, 2)]
)
def test_no_replica_is_too_busy(busy: list[float], wanted: int) -> None:
    assert ByQueuedTokens()(context([0.0] * len(busy), busy)) == (wanted, {})


def test_a_steady_load_has_a_steady_number_of_replicas() -> None:
    """Load that keeps 2.5 replicas busy: nothing waits once there are enough."""
    load, replicas, seen = 2.5, 1, []
    for _ in range(20):
        busy = min(1.0, load / replicas)
        queued = 500_000 * max(0.0, load - replicas)
        share = [queued / replicas] * replicas
        replicas, _ = ByQueuedTokens(200_000)(context(share, [busy] * replicas, target=replicas))
        seen.append(replicas)
    assert set(seen[2:]) == {math.ceil(load / 0.8)}


@pytest.mark.parametrize("queued", [None, []])
def test_without_a_report_all_stays_as_it_is(queued: list[float] | None) -> None:
    assert ByQueuedTokens()(context(queued)) == (3, {})
    assert ByQueuedTokens()(context(queued, target=0)) == (1, {})


@pytest.mark.parametrize("tokens", [0, -1, float("nan")])
def test_a_share_of_tokens_is_above_zero(tokens: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        ByQueuedTokens(tokens)


@pytest.mark.parametrize("share", [0, 1.1, float("nan")])
def test_a_share_of_the_time_is_one(share: float) -> None:
    with pytest.raises(ValueError, match="at most 1"):
        ByQueuedTokens(busy_share=share)
