"""What a batch may cost, whom it must hold, and what it leaves for the next one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloss.batching.packing import Candidates, form_batch


@dataclass(frozen=True)
class Waiting:
    """Pairs as plain tuples of source length, target length and source key."""

    pairs: list[tuple[int, int, int]]
    max_tokens: int
    max_pairs: int
    request_of: tuple[int, ...] = ()

    @property
    def requests(self) -> np.ndarray:
        """All of one request, unless something else is said."""
        return np.array(self.request_of or [0] * len(self.pairs), np.int64)

    def batch(self, anchor: int) -> list[int]:
        source_lengths, target_lengths, keys = np.array(self.pairs, np.int64).T
        candidates = Candidates(source_lengths, target_lengths, keys, self.requests)
        chosen = form_batch(candidates, anchor, self.max_tokens, self.max_pairs)
        return [int(index) for index in chosen]

    def cost(self, chosen: list[int]) -> int:
        pairs = [self.pairs[index] for index in chosen]
        unique_sources = {key for _, _, key in pairs}
        longest_source = max(source for source, _, _ in pairs)
        longest_target = max(target for _, target, _ in pairs)
        return len(unique_sources) * longest_source + len(pairs) * longest_target

    def target_lengths(self, indices: list[int]) -> list[int]:
        return [self.pairs[index][1] for index in indices]


@st.composite
def any_waiting(draw: st.DrawFn) -> Waiting:
    sources = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    keys = st.integers(0, len(sources) - 1)
    pairs = draw(st.lists(st.tuples(keys, st.integers(1, 20)), min_size=1, max_size=25))
    return Waiting(
        # Keys are far apart, as those of several requests are.
        pairs=[(sources[key], target, key << 32) for key, target in pairs],
        max_tokens=draw(st.integers(1, 300)),
        max_pairs=draw(st.integers(1, 30)),
    )


@st.composite
def waiting_and_anchor(draw: st.DrawFn) -> tuple[Waiting, int]:
    waiting = draw(any_waiting())
    return waiting, draw(st.integers(0, len(waiting.pairs) - 1))


@given(waiting_and_anchor())
def test_the_anchor_is_always_in_and_nobody_is_in_twice(case: tuple[Waiting, int]) -> None:
    waiting, anchor = case
    chosen = waiting.batch(anchor)
    assert anchor in chosen
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(range(len(waiting.pairs)))
    assert waiting.target_lengths(chosen) == sorted(waiting.target_lengths(chosen))


@given(waiting_and_anchor())
def test_only_a_pair_alone_may_be_above_the_limits(case: tuple[Waiting, int]) -> None:
    waiting, anchor = case
    chosen = waiting.batch(anchor)
    assert len(chosen) <= waiting.max_pairs
    assert len(chosen) == 1 or waiting.cost(chosen) <= waiting.max_tokens


@given(waiting_and_anchor())
def test_a_batch_has_no_gap_among_target_lengths(case: tuple[Waiting, int]) -> None:
    waiting, anchor = case
    chosen = waiting.batch(anchor)
    left = waiting.target_lengths(sorted(set(range(len(waiting.pairs))) - set(chosen)))
    lengths = waiting.target_lengths(chosen)
    assert not [length for length in left if min(lengths) < length < max(lengths)]
    if max(lengths) > waiting.pairs[anchor][1]:
        assert min(left, default=max(lengths)) >= waiting.pairs[anchor][1]


@given(waiting_and_anchor())
def test_room_is_left_only_where_somebody_does_not_fit(case: tuple[Waiting, int]) -> None:
    waiting, anchor = case
    chosen = waiting.batch(anchor)
    left = set(range(len(waiting.pairs))) - set(chosen)
    if left and len(chosen) < waiting.max_pairs:
        costs = [waiting.cost([*chosen, other]) for other in left]
        assert max(costs) > waiting.max_tokens


@given(waiting_and_anchor())
def test_all_go_together_where_all_fit(case: tuple[Waiting, int]) -> None:
    waiting, anchor = case
    everybody = list(range(len(waiting.pairs)))
    roomy = Waiting(waiting.pairs, waiting.cost(everybody), len(everybody))
    assert sorted(roomy.batch(anchor)) == everybody


@settings(max_examples=50)
@given(any_waiting())
def test_everybody_is_batched_once_when_the_first_is_always_the_anchor(waiting: Waiting) -> None:
    left = list(range(len(waiting.pairs)))
    batched = []
    while left:
        rest = Waiting(
            [waiting.pairs[index] for index in left], waiting.max_tokens, waiting.max_pairs
        )
        chosen = rest.batch(0)
        batched += [left[place] for place in chosen]
        left = [index for place, index in enumerate(left) if place not in chosen]
    assert sorted(batched) == list(range(len(waiting.pairs)))


def test_a_shared_source_costs_once() -> None:
    shared = Waiting([(10, 1, 7)] * 8, max_tokens=10 + 8, max_pairs=100)
    assert len(shared.batch(0)) == 8
    distinct = Waiting([(10, 1, key) for key in range(8)], max_tokens=10 + 8, max_pairs=100)
    assert len(distinct.batch(0)) == 1


def test_a_long_target_does_not_blow_up_a_batch_of_short_ones() -> None:
    short, long = [(2, 3, 0)] * 20, (2, 100, 0)
    waiting = Waiting([*short, long], max_tokens=200, max_pairs=100)
    assert sorted(waiting.batch(0)) == list(range(20))
    assert waiting.batch(20) == [20]


def test_shorter_targets_come_before_longer_ones_and_the_nearest_first() -> None:
    waiting = Waiting([(1, length, 0) for length in range(1, 10)], max_tokens=10**6, max_pairs=3)
    assert waiting.batch(4) == [2, 3, 4]
    assert waiting.batch(0) == [0, 1, 2]
    assert waiting.batch(1) == [0, 1, 2]


def test_a_pair_above_the_limit_goes_alone() -> None:
    waiting = Waiting([(50, 50, 0), (1, 1, 1)], max_tokens=10, max_pairs=8)
    assert waiting.batch(0) == [0]
    assert waiting.batch(1) == [1]


def test_the_longest_source_of_a_batch_pads_all_of_its_sources() -> None:
    waiting = Waiting([(1, 4, 0), (9, 4, 1)], max_tokens=2 * 9 + 2 * 4, max_pairs=8)
    assert len(waiting.batch(0)) == 2
    tighter = Waiting(waiting.pairs, waiting.max_tokens - 1, 8)
    assert tighter.batch(0) == [0]
    assert tighter.batch(1) == [1]


def test_a_request_is_not_held_up_by_others_that_are_shorter() -> None:
    """Sixteen pairs that fit one batch go in one batch, whatever else waits."""
    own, others = [(5, 5, key) for key in range(16)], [(4, 4, key) for key in range(100, 600)]
    waiting = Waiting([*others, *own], 400, 64, request_of=(1,) * 500 + (0,) * 16)
    chosen = waiting.batch(anchor=500)
    assert set(range(500, 516)) <= set(chosen)
    assert len(chosen) > 16, "what room is left is for the others"
    assert waiting.cost(chosen) <= 400
