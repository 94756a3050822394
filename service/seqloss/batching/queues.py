"""What waits, who is next, and which pairs of all that waits make the next batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seqloss.batching.jobs import Job, Selection
from seqloss.batching.packing import Candidates, form_batch
from seqloss.records import Priority

# Pairs are sorted within so many batches' worth of waiting tokens: sorting more costs more time,
# sorting less leaves more padding.
_WINDOW_BATCHES = 64
# After so many interactive batches in a row, a waiting bulk pair is next.
_MAX_BYPASS = 4


@dataclass(frozen=True, slots=True)
class BatchingLimits:
    """See `seqloss.settings.Settings`, where each has its trade-off."""

    max_batch_tokens: int
    max_batch_pairs: int
    max_queue_tokens: int


class Queue:
    """Admitted requests in the order of their arrival, by priority."""

    def __init__(self, limits: BatchingLimits) -> None:
        self.limits = limits
        self.num_tokens = 0
        self._jobs: dict[Priority, list[Job]] = {"interactive": [], "bulk": []}
        self._bypassed = 0

    @property
    def jobs(self) -> list[Job]:
        """All of them, interactive ones first."""
        return [*self._jobs["interactive"], *self._jobs["bulk"]]

    @property
    def num_waiting(self) -> int:
        """Pairs that are in no batch yet."""
        return sum(len(job.waiting) for job in self.jobs)

    def add(self, job: Job) -> None:
        """Takes a request in; its tokens are held until it is removed."""
        self._jobs[job.priority].append(job)
        self.num_tokens += job.num_tokens

    def remove(self, job: Job) -> None:
        """Lets a request go, whether it was answered or nobody waits for it."""
        self._jobs[job.priority].remove(job)
        self.num_tokens -= job.num_tokens

    def take_batch(self) -> Selection:
        """Takes the next batch's pairs out of what waits; empty where nothing does."""
        jobs = self._by_urgency()
        if not jobs:
            return []
        # What one request asked for is not computed for another.
        window = self._window([job for job in jobs if job.all_terms == jobs[0].all_terms])
        limits = self.limits
        candidates = _candidates(window)
        chosen = form_batch(candidates, 0, limits.max_batch_tokens, limits.max_batch_pairs)
        taken = np.zeros(len(candidates.target_lengths), np.bool_)
        taken[chosen] = True
        batch, start = [], 0
        for job, rows in window:
            mine = taken[start : start + len(rows)]
            start += len(rows)
            if mine.any():
                batch.append((job, rows[mine]))
                job.waiting = np.concatenate([rows[~mine], job.waiting[len(rows) :]])
        return batch

    def _by_urgency(self) -> list[Job]:
        """Interactive before bulk, but not more than `_MAX_BYPASS` times in a row."""
        interactive, bulk = (
            [job for job in self._jobs[priority] if len(job.waiting) and not job.done.done()]
            for priority in ("interactive", "bulk")
        )
        if not interactive or not bulk:
            self._bypassed = 0
        elif self._bypassed == _MAX_BYPASS:
            self._bypassed = 0
            return [*bulk, *interactive]
        else:
            self._bypassed += 1
        return [*interactive, *bulk]

    def _window(self, jobs: Sequence[Job]) -> Selection:
        """The first waiting pairs, up to `_WINDOW_BATCHES` batches' worth of tokens."""
        room = _WINDOW_BATCHES * self.limits.max_batch_tokens
        window = []
        for job in jobs:
            # A pair has at least two tokens.
            waiting = job.waiting[: 1 + room // 2]
            tokens = np.cumsum(job.source_lengths[waiting] + job.target_lengths[waiting])
            fitting = max(1, int(np.searchsorted(tokens, room, side="right")))
            window.append((job, waiting[:fitting]))
            room -= int(tokens[fitting - 1])
            if room <= 0:
                break
        return window


def _candidates(window: Selection) -> Candidates:
    numbers = np.repeat(np.arange(len(window)), [len(rows) for _, rows in window])
    sources = np.concatenate([job.pairs.source_index[rows] for job, rows in window])
    return Candidates(
        source_lengths=np.concatenate([job.source_lengths[rows] for job, rows in window]),
        target_lengths=np.concatenate([job.target_lengths[rows] for job, rows in window]),
        source_keys=(numbers << 32) + sources,
        request_numbers=numbers,
    )
