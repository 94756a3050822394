"""An admitted request on its way: which of its pairs wait, and what is known of the others."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqloss.batching.digests import first_of_equals, row_digests
from seqloss.batching.packing import Candidates, packing_order
from seqloss.records import (
    BoolArray,
    Float32Array,
    Int64Array,
    Pairs,
    Priority,
    TokenTerms,
    ranges,
)


class BatchTimes(NamedTuple):
    """When what happened to a batch, in seconds of the event loop's clock."""

    collating: float
    collated: float
    computing: float
    computed: float
    scattered: float
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request's pairs.

    Attributes:
        terms: of all its counted tokens, in the order of `pairs.labels`; NaN in pairs that did not
            fit the device.
        out_of_memory: pairs that alone did not fit the device. Shape: (N,).
        num_batches: batches that held pairs of it.
        num_encoded_sources: distinct sources of it, summed over these batches.
        queue_seconds: from admission to its first batch.
        compute_seconds: time of the batches that held pairs of it.
        batch_times: of those batches whose terms were its.
    """

    terms: TokenTerms
    out_of_memory: BoolArray
    num_batches: int
    num_encoded_sources: int
    queue_seconds: float
    compute_seconds: float
    batch_times: list[BatchTimes]


@dataclass(eq=False, slots=True)
class Job:
    """A request in the queue.

    Attributes:
        pairs: what is to be scored.
        priority: its class.
        all_terms: whether ranks and entropies are wanted.
        arrived: when it was admitted, on the batcher's clock.
        done: resolves when all pairs are scored, fails when they cannot be.
        number: of its admission; no two jobs of a batcher share one.
        tenant: whose it is.
        deadline: when nobody waits for it any more, on the batcher's clock.
        reproducible: whether it shares batches with no other, and has the same ones every time.
        source_lengths, target_lengths: of its pairs. Shape: (N,).
        source_keys: equal where sources are, across jobs that share batches. Shape: (N,), int64.
        num_tokens: of all its pairs, what it takes of the queue's budget.
        num_waiting: pairs that are in no batch yet.
        num_unfinished: pairs that are not scored yet.
        terms: of all label positions; NaN where nothing is known yet, or nothing counts.
    """

    pairs: Pairs
    priority: Priority
    all_terms: bool
    arrived: float
    done: asyncio.Future[None]
    number: int
    tenant: str = ""
    deadline: float = float("inf")
    reproducible: bool = False
    source_lengths: Int64Array = field(init=False)
    target_lengths: Int64Array = field(init=False)
    source_keys: Int64Array = field(init=False)
    num_tokens: int = field(init=False)
    num_waiting: int = field(init=False)
    num_unfinished: int = field(init=False)
    terms: TokenTerms = field(init=False)
    out_of_memory: BoolArray = field(init=False)
    num_batches: int = 0
    num_encoded_sources: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    batch_times: list[BatchTimes] = field(default_factory=list)
    _order: Int64Array | None = None
    _num_passed: int = 0
    _num_dropped: int = 0
    _num_held: int = field(init=False)

    def __post_init__(self) -> None:
        num_labels = len(self.pairs.labels.values)

        def unknown() -> Float32Array:
            return np.full(num_labels, np.nan, np.float32)

        self.num_tokens = self.pairs.num_tokens
        self._num_held = self.num_tokens
        self.source_lengths = self.pairs.source_lengths
        self.target_lengths = self.pairs.target_lengths
        keys = row_digests(self.pairs.sources)
        if self.reproducible:
            _, keys = first_of_equals(keys)
        self.source_keys = keys[self.pairs.source_index]
        self.num_waiting = self.num_unfinished = len(self.pairs)
        self.out_of_memory = np.zeros(len(self.pairs), np.bool_)
        self.terms = TokenTerms(
            target_logprob=unknown(),
            mean_logprob=unknown(),
            rank=np.zeros(num_labels, np.int32) if self.all_terms else None,
            entropy=unknown() if self.all_terms else None,
        )

    @property
    def num_outside(self) -> int:
        """Pairs that `next_rows` has not given yet."""
        return len(self.pairs) - self._num_passed if self.num_waiting else 0

    def next_rows(self, max_tokens: int, target_weight: float) -> tuple[Int64Array, int]:
        """The next of its pairs in packing order, at least one, and how many tokens they have."""
        if self._order is None:
            candidates = Candidates(self.source_lengths, self.target_lengths, self.source_keys)
            self._order = packing_order(candidates, target_weight)
        # A pair has at least two tokens.
        rows = self._order[self._num_passed : self._num_passed + 1 + max_tokens // 2]
        tokens = np.cumsum(self.source_lengths[rows] + self.target_lengths[rows])
        count = max(1, int(tokens.searchsorted(max_tokens, side="right")))
        self._num_passed += count
        return rows[:count], int(tokens[count - 1])

    def positions(self, rows: Int64Array) -> Int64Array:
        """Where the tokens of these rows stand in `pairs.labels.values`, row by row."""
        return ranges(self.pairs.labels.offsets[rows], self.target_lengths[rows])

    def counted_positions(self, rows: Int64Array) -> Int64Array:
        """The same of the counted tokens alone: the order of the engine's terms."""
        positions = self.positions(rows)
        return positions[self.pairs.counted[positions]]

    def drop_waiting(self) -> None:
        """None of its pairs waits any more."""
        self._num_dropped += self.num_waiting
        self.num_waiting = 0

    @property
    def num_tokens_left_out(self) -> int:
        """Of pairs that are in no batch, by their share of all pairs."""
        left_out = self.num_waiting + self._num_dropped
        return self.num_tokens * left_out // max(1, len(self.pairs))

    def release_tokens(self, *, all_of_them: bool = False) -> int:
        """Tokens of the queue's budget that it needs no more since it was asked last."""
        needed = 0
        if not all_of_them:
            needed = -(-self.num_tokens * self.num_unfinished // len(self.pairs))
        freed, self._num_held = self._num_held - needed, min(needed, self._num_held)
        return max(0, freed)

    def keep(self, positions: Int64Array, terms: TokenTerms, part: Int64Array) -> None:
        """Puts a part of a batch's terms at the given label positions."""
        for mine, theirs in zip(_arrays(self.terms), _arrays(terms), strict=True):
            mine[positions] = theirs[part]

    def outcome(self) -> Outcome:
        """What the caller gets."""
        counted = self.pairs.counted
        return Outcome(
            terms=TokenTerms(*(array[counted] for array in _arrays(self.terms))),
            out_of_memory=self.out_of_memory,
            num_batches=self.num_batches,
            num_encoded_sources=self.num_encoded_sources,
            queue_seconds=self.queue_seconds,
            compute_seconds=self.compute_seconds,
            batch_times=self.batch_times,
        )


Selection = list[tuple[Job, Int64Array]]
"""Some pairs of some jobs; what a batch is made of."""


def num_pairs_of(selection: Selection) -> int:
    """How many pairs it holds."""
    return sum(len(rows) for _, rows in selection)


def halves(selection: Selection) -> tuple[Selection, Selection]:
    """The pairs with the shorter targets, and those with the longer ones; of two or more pairs."""
    targets = np.concatenate([job.target_lengths[rows] for job, rows in selection])
    is_long = np.zeros(len(targets), np.bool_)
    is_long[targets.argsort(kind="stable")[len(targets) // 2 :]] = True
    bounds = np.cumsum([len(rows) for _, rows in selection])[:-1]
    flags = np.split(is_long, bounds)
    short, long = (
        [
            (job, rows[mine == which])
            for (job, rows), mine in zip(selection, flags, strict=True)
            if (mine == which).any()
        ]
        for which in (False, True)
    )
    return short, long


def _arrays(terms: TokenTerms) -> tuple[NDArray[Any], ...]:
    """Those that were asked for, in the order of the fields."""
    every = (terms.target_logprob, terms.mean_logprob, terms.rank, terms.entropy)
    return tuple(array for array in every if array is not None)
