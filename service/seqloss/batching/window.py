"""The pairs among which batches are formed: flat columns, always in packing order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seqloss.batching.jobs import Job, Selection
from seqloss.batching.packing import Candidates, differs_from_last, packing_order
from seqloss.records import Int64Array

# Rows of the table; a pair is a column of it.
_SOURCE_LENGTH, _TARGET_LENGTH, _SOURCE_KEY, _JOB, _ROW = range(5)


# Of each job: which pairs, and how many tokens they have.
Taken = list[tuple[Job, Int64Array, int]]


class Window:
    """A table of waiting pairs of many jobs.

    Taking a batch out of it moves some kilobytes; sorting happens when pairs come in.
    """

    def __init__(self) -> None:
        self._table = np.empty((5, 0), np.int64)
        self._jobs: dict[int, Job] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._table.shape[1]

    @property
    def candidates(self) -> Candidates:
        """Views of the pairs' lengths and sources."""
        table = self._table
        return Candidates(table[_SOURCE_LENGTH], table[_TARGET_LENGTH], table[_SOURCE_KEY])

    def add(self, selections: Selection, target_weight: float) -> None:
        """Takes pairs in, and puts all in packing order again."""
        self._jobs |= {job.number: job for job, _ in selections}
        numbers = [job.number for job, _ in selections]
        columns = [
            np.concatenate([job.source_lengths[rows] for job, rows in selections]),
            np.concatenate([job.target_lengths[rows] for job, rows in selections]),
            np.concatenate([job.source_keys[rows] for job, rows in selections]),
            np.repeat(numbers, [len(rows) for _, rows in selections]),
            np.concatenate([rows for _, rows in selections]),
        ]
        self._table = np.concatenate([self._table, np.stack(columns)], axis=1)
        self._table = self._table[:, packing_order(self.candidates, target_weight)]
        self._count()

    def first_of(self, job: Job) -> int | None:
        """Where the first pair of the job stands; None where it has none here."""
        mine = self._table[_JOB] == job.number
        first = int(mine.argmax()) if len(mine) else 0
        return first if len(mine) and mine[first] else None

    def without(self, jobs: Sequence[Job]) -> Int64Array:
        """Where the pairs of all other jobs stand, rising."""
        numbers = [job.number for job in jobs]
        return np.flatnonzero(np.isin(self._table[_JOB], numbers, invert=True))

    def take(self, chosen: slice | Int64Array) -> Taken:
        """Takes pairs out, grouped by job, in packing order."""
        if isinstance(chosen, slice):
            taken = self._table[:, chosen]
            before, after = self._table[:, : chosen.start], self._table[:, chosen.stop :]
            self._table = np.concatenate([before, after], axis=1)
        else:
            taken = self._table[:, chosen]
            self._table = np.delete(self._table, chosen, axis=1)
        tokens = taken[_SOURCE_LENGTH] + taken[_TARGET_LENGTH]
        self.num_tokens -= int(tokens.sum())
        order = taken[_JOB].argsort(kind="stable")
        numbers, rows = taken[_JOB][order], taken[_ROW][order]
        starts = np.flatnonzero(differs_from_last(numbers))
        bounds = [*starts.tolist(), len(rows)]
        return [
            (self._jobs[number], rows[start:stop], num_tokens)
            for number, start, stop, num_tokens in zip(
                numbers[starts].tolist(),
                bounds,
                bounds[1:],
                np.add.reduceat(tokens[order], starts).tolist(),
                strict=False,
            )
        ]

    def remove(self, job: Job) -> None:
        """Drops whatever there is of a job."""
        if self._jobs.pop(job.number, None) is not None:
            self._table = self._table[:, self._table[_JOB] != job.number]
            self._count()

    def _count(self) -> None:
        self.num_tokens = int(self._table[: _TARGET_LENGTH + 1].sum())
