"""What a batch may cost, whom it must hold, and where it stops growing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloss.batching.cost import CostModel
from seqloss.batching.jobs import Job
from seqloss.batching.packing import (
    Candidates,
    Caps,
    form_batch,
    packing_order,
    riders,
    shape_of,
)
from seqloss.batching.queues import BatchingLimits, Queue
from seqloss.batching.shapes import BatchShape, PackedShape, PaddedShape
from seqloss.records import Pairs, Ragged, offsets_of

LENGTHS = Path(__file__).parents[3] / "shared" / "corpora" / "lengths.json"
FREE = Caps(10**9, 10**9)

Pair = tuple[int, int, int]
"""Source length, target length, source key."""


class KnownCost(CostModel):
    """A model with given coefficients: of a batch, of a source's and a target's token, attention's.

    With a batch that costs much growing always pays; with one that costs nothing padding never
    does.
    """

    def __init__(self, *numbers: float, shapes: type[BatchShape] = PaddedShape) -> None:
        super().__init__(shapes)
        self._numbers = numbers


PRIOR, PACKED = CostModel(), CostModel(PackedShape)
costs = st.sampled_from(
    [
        KnownCost(*numbers, shapes=shapes)
        for shapes in (PaddedShape, PackedShape)
        for numbers in (
            PRIOR.numbers,
            (0.0, 1e-5, 2e-5, 0.0),
            (1.0, 1e-5, 2e-5, 0.0),
            (1e-4, 1e-5, 9e-5, 1e-6),
            (1e-4, 9e-5, 0.0, 0.0),
        )
    ]
)


@dataclass(frozen=True)
class Waiting:
    """Pairs as plain tuples, which are put in packing order first."""

    pairs: list[Pair]
    caps: Caps = FREE
    cost: CostModel = PRIOR

    @property
    def candidates(self) -> Candidates:
        return candidates_of(self.pairs)

    @property
    def in_order(self) -> list[Pair]:
        order = packing_order(self.candidates, self.cost.target_weight)
        return [self.pairs[index] for index in order]

    def chosen(self, place: int) -> slice:
        """The batch around the pair that stands there in packing order."""
        return form_batch(candidates_of(self.in_order), place, self.caps, self.cost)

    def batch(self, place: int) -> list[Pair]:
        return self.in_order[self.chosen(place)]

    def batch_with(self, pair: Pair) -> list[Pair]:
        return self.batch(self.in_order.index(pair))


def candidates_of(pairs: list[Pair]) -> Candidates:
    columns = np.array(pairs, np.int64).reshape(-1, 3).T
    return Candidates(*(np.ascontiguousarray(column) for column in columns))


def num_runs(pairs: list[Pair]) -> int:
    """Sources that are encoded for pairs in this order: neighbours share, others may not."""
    keys = [key for _, _, key in pairs]
    return sum(key != before for key, before in zip(keys, [None, *keys], strict=False))


def encoded_lengths(pairs: list[Pair]) -> list[int]:
    """Of the sources that are encoded for pairs in this order."""
    keys = [None, *(key for _, _, key in pairs)]
    return [pair[0] for pair, before in zip(pairs, keys, strict=False) if pair[2] != before]


def work_of(cost: CostModel, pairs: list[Pair]) -> tuple[int, int, int]:
    """Tokens of sources and of targets, and pairs of positions that attend, padded or packed."""
    sources = encoded_lengths(pairs)
    both = [(source, target) for source, target, _ in pairs]
    if cost.shapes is PaddedShape:
        longest_source, longest_target = (max(side) for side in zip(*both, strict=True))
        sources = [longest_source] * len(sources)
        both = [(longest_source, longest_target)] * len(both)
    attended = sum(source**2 for source in sources)
    attended += sum(target * (source + target) for source, target in both)
    return sum(sources), sum(target for _, target in both), attended


def tokens_of(cost: CostModel, pairs: list[Pair]) -> int:
    return sum(work_of(cost, pairs)[:2])


def seconds_of(cost: CostModel, pairs: list[Pair]) -> float:
    """The formula of the cost model, written out."""
    fixed, *rates = cost.numbers
    return fixed + sum(map(float.__mul__, rates, map(float, work_of(cost, pairs))))


@st.composite
def any_waiting(draw: st.DrawFn, shared: bool = True) -> Waiting:
    sources = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8 if shared else 25))
    count = len(sources)
    keys = draw(
        st.lists(st.integers(0, count - 1), min_size=1, max_size=25)
        if shared
        else st.just(list(range(count)))
    )
    caps = Caps(
        tokens=draw(st.integers(1, 300)),
        pairs=draw(st.integers(1, 30)),
        seconds=draw(st.sampled_from([np.inf, 6e-3, 1e-3])),
    )
    # Keys are digests: far apart, and of either sign.
    pairs = [(sources[key], draw(st.integers(1, 20)), (key - 2) * 2**40 + key) for key in keys]
    return Waiting(pairs, caps, draw(costs))


@st.composite
def waiting_and_anchor(draw: st.DrawFn, shared: bool = True) -> tuple[Waiting, int]:
    waiting = draw(any_waiting(shared))
    return waiting, draw(st.integers(0, len(waiting.pairs) - 1))


# ---------------------------------------------------------------- the order


@given(any_waiting())
def test_the_order_leaves_nobody_out(waiting: Waiting) -> None:
    order = packing_order(waiting.candidates, waiting.cost.target_weight)
    assert sorted(order.tolist()) == list(range(len(waiting.pairs)))


@given(any_waiting(), st.sampled_from([0.1, 0.5, 2.0, 100.0]))
def test_equal_sources_stand_together_unless_padding_costs_more_than_encoding_again(
    waiting: Waiting, target_weight: float
) -> None:
    order = packing_order(waiting.candidates, target_weight).tolist()
    for key in {key for _, _, key in waiting.pairs}:
        mine = [place for place, index in enumerate(order) if waiting.pairs[index][2] == key]
        source = next(source for source, _, other in waiting.pairs if other == key)
        longest = max(target for _, target, other in waiting.pairs if other == key)
        together = [
            place
            for place in mine
            if target_weight * (longest - waiting.pairs[order[place]][1]) <= source
        ]
        assert together == list(range(together[0], together[0] + len(together)))
        assert len(together) >= 1, "the one with the longest target is always among them"


@given(any_waiting(shared=False))
def test_sources_of_one_pair_each_stand_by_target_length_and_then_by_source_length(
    waiting: Waiting,
) -> None:
    pairs = waiting.in_order
    targets = [target for _, target, _ in pairs]
    assert targets == sorted(targets)
    for length in set(targets):
        sources = [source for source, target, _ in pairs if target == length]
        assert sources == sorted(sources, reverse=length % 2 == 1), "rising and falling in turn"


def test_a_target_that_is_too_short_to_be_padded_has_its_source_encoded_again() -> None:
    pairs = [(10, 5, 1), (10, 20, 1), (10, 12, 2)]
    assert Waiting(pairs, cost=KnownCost(0, 1, 0.6, 0)).in_order == [
        *((10, 12, 2), (10, 5, 1), (10, 20, 1))
    ]
    assert Waiting(pairs, cost=KnownCost(0, 1, 0.7, 0)).in_order == [
        *((10, 5, 1), (10, 12, 2), (10, 20, 1))
    ]


def test_no_candidates_have_an_order_too() -> None:
    assert len(packing_order(candidates_of([]), 2.0)) == 0


# ---------------------------------------------------------------- batches


@given(waiting_and_anchor())
def test_the_anchor_is_always_in_a_range_within_bounds(case: tuple[Waiting, int]) -> None:
    waiting, anchor = case
    chosen = waiting.chosen(anchor)
    assert 0 <= chosen.start <= anchor < chosen.stop <= len(waiting.pairs)
    assert chosen.step is None


@given(waiting_and_anchor())
def test_only_a_pair_alone_may_be_above_the_caps(case: tuple[Waiting, int]) -> None:
    waiting, anchor = case
    batch, caps = waiting.batch(anchor), waiting.caps
    assert len(batch) <= caps.pairs
    if len(batch) > 1:
        assert tokens_of(waiting.cost, batch) <= caps.tokens
        assert seconds_of(waiting.cost, batch) <= caps.seconds * (1 + 1e-9)


@given(waiting_and_anchor(shared=False))
def test_a_batch_is_never_less_efficient_than_its_anchor_alone(case: tuple[Waiting, int]) -> None:
    waiting, anchor = case
    cost = waiting.cost
    # What a batch of a pair alone takes beside what every batch takes.
    least = {pair: seconds_of(cost, [pair]) - cost.numbers[0] for pair in waiting.pairs}
    batch, alone = waiting.batch(anchor), waiting.in_order[anchor]
    efficiency = sum(least[pair] for pair in batch) / seconds_of(cost, batch)
    assert efficiency >= least[alone] / seconds_of(cost, [alone]) - 1e-9


@given(waiting_and_anchor())
def test_the_shape_of_a_batch_is_its_work(case: tuple[Waiting, int]) -> None:
    waiting, anchor = case
    batch = waiting.batch(anchor)
    shape = shape_of(candidates_of(batch), waiting.cost)
    assert shape.num_sources == num_runs(batch)
    assert shape.num_targets == len(batch)
    assert shape.work() == work_of(waiting.cost, batch)
    assert shape.tokens == tokens_of(waiting.cost, batch)


@given(waiting_and_anchor())
def test_a_shape_that_grows_is_that_of_the_whole(case: tuple[Waiting, int]) -> None:
    """Pair by pair, as a batch and as riders grow it."""
    waiting, _ = case
    pairs = waiting.in_order
    candidates = candidates_of(pairs)
    first = shape_of(candidates.part(slice(0, 1)), waiting.cost)
    keys = candidates.source_keys
    grown = first.grown(
        candidates.source_lengths[1:], candidates.target_lengths[1:], keys[1:] != keys[:-1]
    )
    for count in range(2, len(pairs) + 1):
        expected = shape_of(candidates_of(pairs[:count]), waiting.cost)
        assert grown.at(count - 2) == expected


@given(any_waiting())
def test_everybody_is_batched_once_when_the_first_is_always_the_anchor(waiting: Waiting) -> None:
    left, batched = list(waiting.pairs), []
    while left:
        rest = replace(waiting, pairs=left)
        batch = rest.batch(0)
        batched += batch
        for pair in batch:
            left.remove(pair)
    assert sorted(batched) == sorted(waiting.pairs)


@given(waiting_and_anchor(), st.integers(1, 20))
def test_what_is_even_goes_together_as_far_as_the_caps_allow(
    case: tuple[Waiting, int], length: int
) -> None:
    """Without padding every further pair shares the batch's fixed cost."""
    waiting, anchor = case
    pairs = [(length, length, key) for key in range(len(waiting.pairs))]
    caps = Caps(waiting.caps.tokens, waiting.caps.pairs)
    batch = Waiting(pairs, caps).batch(anchor)
    assert len(batch) == max(1, min(len(pairs), caps.pairs, caps.tokens // (2 * length)))


def test_all_go_together_where_a_batch_costs_much_and_all_fit() -> None:
    pairs = [(1 + key % 7, 1 + key % 11, key) for key in range(80)]
    dear = KnownCost(1.0, 1e-6, 1e-6, 0.0)
    for anchor in (0, 40, 79):
        assert len(Waiting(pairs, cost=dear).batch(anchor)) == 80


def test_nothing_is_padded_where_a_batch_costs_nothing() -> None:
    pairs = [(4, 1 + key // 10, key) for key in range(100)]
    free = KnownCost(0.0, 1e-5, 2e-5, 0.0)
    for anchor in (0, 55, 99):
        batch = Waiting(pairs, cost=free).batch(anchor)
        assert len({target for _, target, _ in batch}) == 1


@pytest.mark.parametrize("fixed", [0.0, 1e-3, 1.0])
def test_candidates_of_one_source_go_together_whatever_a_batch_costs(fixed: float) -> None:
    """A long source beside short targets: encoding it is what a batch is for."""
    pairs = [(200, 3, 7)] * 40
    waiting = Waiting(pairs, Caps(1000, 100), KnownCost(fixed, 1e-5, 9e-5, 0.0))
    for anchor in (0, 20, 39):
        assert len(waiting.batch(anchor)) == 40


def test_a_shared_source_costs_its_tokens_once() -> None:
    shared = Waiting([(10, 1, 7)] * 8, Caps(tokens=10 + 8, pairs=100))
    assert [len(shared.batch(anchor)) for anchor in range(8)] == [8] * 8
    distinct = Waiting([(10, 1, key) for key in range(8)], Caps(tokens=10 + 8, pairs=100))
    assert len(distinct.batch(0)) == 1


def test_a_long_target_does_not_blow_up_a_batch_of_short_ones() -> None:
    short, long = [(2, 3, key) for key in range(20)], (2, 100, 99)
    waiting = Waiting([*short, long], Caps(tokens=2200, pairs=100))
    assert sorted(waiting.batch_with(short[0])) == short
    assert waiting.batch_with(long) == [long]


def test_a_pair_above_the_caps_goes_alone() -> None:
    waiting = Waiting([(50, 50, 0), (1, 1, 1)], Caps(tokens=10, pairs=8))
    assert waiting.batch_with((50, 50, 0)) == [(50, 50, 0)]
    assert waiting.batch_with((1, 1, 1)) == [(1, 1, 1)]
    hasty = Waiting([(5, 5, key) for key in range(9)], Caps(1000, 100, seconds=1e-9))
    assert len(hasty.batch(4)) == 1


def test_the_longest_source_of_a_batch_pads_all_of_its_sources() -> None:
    pairs = [(1, 4, 0), (9, 4, 1)]
    fitting = Caps(tokens=2 * 9 + 2 * 4, pairs=8)
    assert len(Waiting(pairs, fitting).batch(0)) == 2
    tighter = Waiting(pairs, replace(fitting, tokens=fitting.tokens - 1))
    assert [len(tighter.batch(anchor)) for anchor in (0, 1)] == [1, 1]


def test_a_bound_in_seconds_holds_back_what_the_other_caps_would_allow() -> None:
    pairs = [(10, 10, key) for key in range(100)]
    cost = KnownCost(0.01, 1e-4, 2e-4, 0.0)
    batch = Waiting(pairs, Caps(10**6, 10**6, seconds=0.0401), cost).batch(50)
    assert len(batch) == 10


# ---------------------------------------------------------------- riders


@given(any_waiting(), st.integers(1, 20), st.integers(1, 20), st.integers(1, 9))
def test_riders_make_a_batch_no_dearer_for_others_and_keep_the_caps(
    waiting: Waiting, source_length: int, target_length: int, num_pairs: int
) -> None:
    even = [(source_length, target_length, key) for key in range(num_pairs)]
    shape = shape_of(candidates_of(even), waiting.cost)
    found = riders(candidates_of(waiting.in_order), shape, waiting.caps, waiting.cost).tolist()
    assert found == sorted(set(found))
    riding = [waiting.in_order[index] for index in found]
    if waiting.cost.shapes is PaddedShape:
        assert all(source <= source_length for source, _, _ in riding)
        assert all(target <= target_length for _, target, _ in riding)
    if riding:
        # Each is counted with a source of its own.
        own = [(source, target, -number) for number, (source, target, _) in enumerate(riding, 1)]
        assert num_pairs + len(riding) <= waiting.caps.pairs
        assert tokens_of(waiting.cost, even + own) <= waiting.caps.tokens
        assert seconds_of(waiting.cost, even + own) <= waiting.caps.seconds * (1 + 1e-9)


def test_nobody_rides_who_would_be_mostly_padding() -> None:
    """A source counts half of a target here: 3 + 2 T against 3 + 2 * 20, nine tenths of it."""
    candidates = candidates_of(Waiting([(3, target, target) for target in range(1, 25)]).in_order)
    found = riders(candidates, PaddedShape(2, 3, 2, 20), FREE, PRIOR)
    assert candidates.target_lengths[found].tolist() == [18, 19, 20]


def test_the_longest_ride_where_there_is_no_room_for_all() -> None:
    candidates = candidates_of(Waiting([(3, target, target) for target in range(1, 25)]).in_order)
    shape = PaddedShape(2, 3, 2, 20)
    found = riders(candidates, shape, Caps(tokens=10**6, pairs=4), PRIOR)
    assert candidates.target_lengths[found].tolist() == [19, 20]


def test_nobody_rides_in_a_batch_that_is_full() -> None:
    candidates = candidates_of([(1, 1, 1)])
    full = PaddedShape(2, 5, 2, 5)
    for caps in (Caps(20, 100), Caps(10**6, 2), Caps(10**6, 100, seconds=1e-9)):
        assert len(riders(candidates, full, caps, PRIOR)) == 0


def test_whoever_fits_rides_where_nothing_is_padded() -> None:
    candidates = candidates_of(Waiting([(3, target, target) for target in range(1, 25)]).in_order)
    shape = PackedShape(2, 2, 6, 40, 0)
    assert len(riders(candidates, shape, FREE, PACKED)) == 24
    # The longest that there is room for goes first, and who fits into what it leaves.
    for room, riding in ((25, [22]), (26, [23]), (31, [1, 24]), (10, [7]), (3, [])):
        found = riders(candidates, shape, Caps(tokens=46 + room, pairs=100), PACKED)
        assert candidates.target_lengths[found].tolist() == riding


# ---------------------------------------------------------------- packed batches


def test_pairs_of_any_length_go_together_where_nothing_is_padded() -> None:
    random = np.random.default_rng(5)
    pairs = [
        (int(source), int(target), key)
        for key, (source, target) in enumerate(random.integers(1, 100, (30, 2)))
    ]
    free = KnownCost(2e-4, 1e-5, 2e-5, 0.0, shapes=PackedShape)
    for anchor in (0, 15, 29):
        assert len(Waiting(pairs, Caps(10**4, 100), free).batch(anchor)) == 30


def test_pairs_of_one_source_stand_together_where_nothing_is_padded() -> None:
    """A source is encoded once for a short translation and a long one."""
    pairs = [(20, target, key) for key in range(40) for target in (4, 60, 120, 180)]
    assert num_runs(Waiting(pairs, cost=PACKED).in_order) == 40
    assert num_runs(Waiting(pairs, cost=PRIOR).in_order) == 160


def test_a_packed_batch_is_as_large_as_its_pairs_and_no_larger() -> None:
    """Where padding would have filled it with a few."""
    pairs = [(1, 1, key) for key in range(50)] + [(50, 50, 99)]
    waiting = Waiting(pairs, Caps(tokens=200, pairs=100), PACKED)
    assert len(waiting.batch(50)) == 51
    assert len(replace(waiting, caps=Caps(tokens=199, pairs=100)).batch(50)) == 50


# ---------------------------------------------------------------- real lengths


@pytest.mark.parametrize(
    ("cost", "most_tokens", "fewest_tokens"), [(PRIOR, 1.10, 1.0), (PACKED, 1.0, 1.0)]
)
def test_real_lengths_are_padded_by_a_tenth_at_most(
    cost: CostModel, most_tokens: float, fewest_tokens: float
) -> None:
    """49 requests of 2,048 pairs wait; every one of their pairs is computed once."""
    if not LENGTHS.is_file():
        pytest.skip(f"{LENGTHS} is absent: it does not belong to the project")
    languages = orjson.loads(LENGTHS.read_bytes())["pairs"]
    rows = np.concatenate([languages[name] for name in ("en-de", "en-fr")])[:, 2:] + 1
    waiting = np.random.default_rng(20260305).choice(rows, 49 * 2048)
    limits = BatchingLimits(4096, 512, 10**9)
    queue = Queue(limits, cost)
    for number, lengths in enumerate(waiting.reshape(49, 2048, 2)):
        queue.add(Job(pairs_of(lengths), "bulk", False, 0.0, Mock(), number))
    real = computed = num_pairs = num_batches = 0
    while (formed := queue.take("bulk", 0.0, limits.max_batch_tokens)) is not None:
        for job, rows in formed.selection:
            real += int(job.source_lengths[rows].sum() + job.target_lengths[rows].sum())
            num_pairs += len(rows)
        computed += int(formed.shape.tokens)
        num_batches += 1
    assert num_pairs == len(waiting)
    assert real == waiting.sum()
    assert fewest_tokens <= computed / real <= most_tokens
    assert computed / num_batches >= 0.9 * limits.max_batch_tokens, "batches are full"


def pairs_of(lengths: np.ndarray) -> Pairs:
    """Pairs of these lengths whose sources are all different. Shape: (N, 2)."""
    source_lengths, target_lengths = lengths.T
    ids = np.random.default_rng(int(lengths.sum())).integers(0, 2**31, source_lengths.sum())
    return Pairs(
        sources=Ragged(ids.astype(np.int32), offsets_of(source_lengths)),
        source_index=np.arange(len(lengths), dtype=np.int32),
        labels=Ragged(np.zeros(target_lengths.sum(), np.int32), offsets_of(target_lengths)),
        counted=np.ones(target_lengths.sum(), np.bool_),
        start_ids=np.zeros(len(lengths), np.int32),
    )
