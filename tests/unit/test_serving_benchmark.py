"""What the benchmark of the service computes from what it measures."""

from __future__ import annotations

import asyncio
import math
from statistics import fmean, pvariance

import pytest

from benchmarks.operations import Shape, encode_once_gain
from benchmarks.pairs import Pairs, sorted_batches
from benchmarks.serving.clients import (
    IdLimits,
    PairStream,
    meanwhile,
    open_loop,
    percentile,
    poisson_arrivals,
)
from benchmarks.serving.figures import Wanted
from benchmarks.serving.scrape import Scrape, padded_over_real

METRICS = """\
# TYPE seqloss_tokens counter
seqloss_tokens_total{kind="real",model="m",side="source"} 100.0
seqloss_tokens_total{kind="padding",model="m",side="source"} 30.0
seqloss_tokens_total{kind="grid",model="m",side="source"} 999.0
seqloss_tokens_total{kind="real",model="m",side="target"} 300.0
seqloss_tokens_total{kind="padding",model="m",side="target"} 10.0
# TYPE seqloss_seconds histogram
seqloss_seconds_bucket{le="0.1",stage="a"} 0.0
seqloss_seconds_bucket{le="0.2",stage="a"} 4.0
seqloss_seconds_bucket{le="0.4",stage="a"} 8.0
seqloss_seconds_bucket{le="+Inf",stage="a"} 10.0
seqloss_seconds_bucket{le="0.1",stage="b"} 50.0
seqloss_seconds_bucket{le="+Inf",stage="b"} 50.0
"""


@pytest.mark.parametrize(("share", "expected"), [(0.5, 3), (0.95, 5), (0.2, 1), (0.21, 2)])
def test_a_percentile_is_the_least_value_that_covers_its_share(
    share: float, expected: float
) -> None:
    assert percentile([5, 1, 4, 2, 3], share) == expected


def test_percentiles_are_not_off_by_one_where_the_share_is_a_whole_number_of_values() -> None:
    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]


def test_poisson_arrivals_have_the_rate_and_exponential_gaps() -> None:
    arrivals = poisson_arrivals(rate=50, seconds=400, seed=3)
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    assert len(arrivals) == pytest.approx(20_000, rel=0.03)
    assert arrivals == sorted(arrivals)
    assert 0 < arrivals[0] < arrivals[-1] < 400
    # Of an exponential distribution the standard deviation is the mean.
    assert math.sqrt(pvariance(gaps)) == pytest.approx(fmean(gaps), rel=0.03)


def test_an_open_loop_does_not_wait_for_answers_and_counts_from_the_intended_time() -> None:
    """All three requests are due at once; the first is answered after the others were sent."""
    asked: list[int] = []

    async def latencies() -> list[float]:
        all_sent = asyncio.Event()

        async def ask(number: int) -> None:
            asked.append(number)
            if len(asked) == 3:
                all_sent.set()
            await all_sent.wait()

        return await open_loop(ask, [-5.0, -1.0, 0.0])

    first, second, third = asyncio.run(latencies())
    assert asked == [0, 1, 2]
    # Two were late before they were sent.
    assert first == pytest.approx(third + 5, abs=0.1)
    assert second == pytest.approx(third + 1, abs=0.1)
    assert third >= 0


def test_a_load_that_fails_ends_the_measurement() -> None:
    async def failing() -> None:
        raise ConnectionError

    async def measured() -> None:
        async with meanwhile(failing()):
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as failure:
        asyncio.run(measured())
    assert failure.group_contains(ConnectionError)


def test_a_load_ends_with_the_measurement() -> None:
    ended: list[bool] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def measured() -> None:
        async with meanwhile(endless()):
            await asyncio.sleep(0)

    asyncio.run(measured())
    assert ended == [True]


def test_pairs_never_come_again_and_keep_to_what_the_model_takes() -> None:
    stream = PairStream(IdLimits(vocabulary=40, max_tokens=9))
    first, second = stream.take(50), stream.take(50)
    assert first.source_ids != second.source_ids
    rows = [*first.source_ids, *first.target_ids, *second.source_ids, *second.target_ids]
    assert max(map(len, rows)) == 9
    assert {id_ for row in rows for id_ in row} == set(range(2, 39))


def test_encoding_once_saves_the_encoder_of_all_candidates_but_one() -> None:
    """With D = 1, F = 0, V = 1, one layer each, S = 2 and T = 3, as multiply-adds.

    Encoder: 2 * 4 + 2 * 4 = 16. Decoder: 3 * 4 + 3 * 4 + (2 + 3) * 2 + 2 * 6 = 46, head: 3.
    """
    shape = Shape(vocabulary=1, width=1, encoder_layers=1, decoder_layers=1, ffn_width=0)
    assert encode_once_gain(shape, 2, 3, num_candidates=1) == 1
    assert encode_once_gain(shape, 2, 3, num_candidates=4) == pytest.approx((16 + 49) / (4 + 49))


@pytest.mark.parametrize(
    ("max_tokens", "max_pairs", "batches"),
    [
        # 2 * (3 + 9) = 24 fit; a pair that alone is too long is not left out.
        (24, 9, [[2, 1], [5, 0], [3], [4]]),
        (23, 9, [[2, 1], [5], [0], [3], [4]]),
        (999, 2, [[2, 1], [5, 0], [3, 4]]),
    ],
)
def test_sorted_batches_hold_every_pair_once_within_the_bounds(
    max_tokens: int, max_pairs: int, batches: list[list[int]]
) -> None:
    lengths = [(3, 9), (8, 2), (1, 2), (5, 9), (40, 40), (2, 4)]
    pairs = Pairs([[1] * source for source, _ in lengths], [[1] * target for _, target in lengths])
    assert list(sorted_batches(pairs, max_tokens, max_pairs)) == batches


def test_padding_is_counted_on_both_sides_without_the_grid() -> None:
    rise = Scrape.of(METRICS)
    assert padded_over_real(rise) == pytest.approx(440 / 400)
    assert padded_over_real(rise, side="source") == pytest.approx(1.3)


def test_counters_are_compared_with_what_they_were() -> None:
    before = Scrape.of('# TYPE a counter\na_total{x="1"} 3.0\n')
    after = Scrape.of('# TYPE a counter\na_total{x="1"} 5.0\na_total{x="2"} 7.0\n')
    assert after.since(before).total("a_total") == 9
    assert after.since(before).total("a_total", x="1") == 2


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.2, 0.15), (0.4, 0.2), (0.6, 0.3), (0.8, 0.4), (0.95, 0.4)],
)
def test_quantiles_lie_evenly_within_buckets(share: float, expected: float) -> None:
    found = Scrape.of(METRICS).quantile(share, "seqloss_seconds", stage="a")
    assert found == pytest.approx(expected)


def test_a_histogram_without_observations_has_no_quantiles() -> None:
    metrics = Scrape.of(METRICS)
    assert math.isnan(metrics.since(metrics).quantile(0.5, "seqloss_seconds"))


@pytest.mark.parametrize(
    ("wanted", "value", "verdict"),
    [
        (Wanted("at least", 0.9), 0.9, "ok"),
        (Wanted("at least", 0.9), 0.89, "short of 0.9"),
        (Wanted("at most", 1.1), 1.1, "ok"),
        (Wanted("at most", 1.1), 1.11, "short of 1.1"),
        (Wanted("at most", 1.1), math.nan, "short of 1.1"),
    ],
)
def test_verdicts_say_what_a_figure_falls_short_of(
    wanted: Wanted, value: float, verdict: str
) -> None:
    assert wanted.verdict(value) == verdict
