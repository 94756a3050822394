"""An admitted request on its way: which of its pairs wait, and what is known of the others."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqloss.records import (
    BoolArray,
    Float32Array,
    Int64Array,
    Pairs,
    Priority,
    TokenTerms,
)


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
    """

    terms: TokenTerms
    out_of_memory: BoolArray
    num_batches: int
    num_encoded_sources: int
    queue_seconds: float
    compute_seconds: float


@dataclass(eq=False, slots=True)
class Job:
    """A request in the queue.

    Attributes:
        pairs: what is to be scored.
        all_terms: whether ranks and entropies are wanted.
        arrived: when it was admitted, on the batcher's clock.
        done: resolves when all pairs are scored, fails when they cannot be.
        source_lengths, target_lengths: of its pairs. Shape: (N,).
        num_tokens: what it holds of the queue's budget.
        waiting: pairs that are in no batch yet, by length.
        num_unfinished: pairs that are not scored yet.
        terms: of all label positions; NaN where nothing is known yet, or nothing counts.
    """

    pairs: Pairs
    priority: Priority
    all_terms: bool
    arrived: float
    done: asyncio.Future[None]
    source_lengths: Int64Array = field(init=False)
    target_lengths: Int64Array = field(init=False)
    num_tokens: int = field(init=False)
    waiting: Int64Array = field(init=False)
    num_unfinished: int = field(init=False)
    terms: TokenTerms = field(init=False)
    out_of_memory: BoolArray = field(init=False)
    num_batches: int = 0
    num_encoded_sources: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    def __post_init__(self) -> None:
        num_labels = len(self.pairs.labels.values)

        def unknown() -> Float32Array:
            return np.full(num_labels, np.nan, np.float32)

        self.num_tokens = len(self.pairs.sources.values) + num_labels
        self.source_lengths = self.pairs.source_lengths
        self.target_lengths = self.pairs.target_lengths
        self.waiting = np.lexsort((self.source_lengths, self.target_lengths))
        self.num_unfinished = len(self.pairs)
        self.out_of_memory = np.zeros(len(self.pairs), np.bool_)
        self.terms = TokenTerms(
            target_logprob=unknown(),
            mean_logprob=unknown(),
            rank=np.zeros(num_labels, np.int32) if self.all_terms else None,
            entropy=unknown() if self.all_terms else None,
        )

    def keep(self, positions: Int64Array, terms: TokenTerms, part: slice) -> None:
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
        )


Selection = list[tuple[Job, Int64Array]]
"""Some pairs of some jobs; what a batch is made of."""


def num_pairs_of(selection: Selection) -> int:
    """How many pairs it holds."""
    return sum(len(rows) for _, rows in selection)


def sliced(selection: Selection, start: int, stop: int) -> Selection:
    """Pairs `start` to `stop` of it."""
    kept, passed = [], 0
    for job, rows in selection:
        mine = rows[max(0, start - passed) : max(0, stop - passed)]
        if len(mine):
            kept.append((job, mine))
        passed += len(rows)
    return kept


def _arrays(terms: TokenTerms) -> tuple[NDArray[Any], ...]:
    """Those that were asked for, in the order of the fields."""
    every = (terms.target_logprob, terms.mean_logprob, terms.rank, terms.entropy)
    return tuple(array for array in every if array is not None)
