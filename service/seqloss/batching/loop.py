"""Keeps one engine busy: forms a batch when the device is free, and gives the results back.

There is no timer.  An idle device starts at once; under load, whatever arrived while it was busy
is what the next batch is formed from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np

from seqloss.batching.collate import Part, collate
from seqloss.batching.packing import Candidates, form_batch
from seqloss.engines.base import Engine
from seqloss.errors import (
    EngineDeadError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    RequestTooLargeError,
)
from seqloss.metrics import BatchReason, BatchReport, ModelMetrics
from seqloss.records import (
    BoolArray,
    Float32Array,
    Int32Array,
    Int64Array,
    Pairs,
    Priority,
    TokenTerms,
)

_LOG = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request's pairs.

    Attributes:
        terms: of all its counted tokens, in the order of `pairs.labels`; NaN in pairs that did not
            fit the device.
        out_of_memory: pairs that alone did not fit the device. Shape: (N,).
        num_batches: batches that held pairs of it.
        num_encoded_sources: rows of the encoder in these batches.
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
class _Job:
    """An admitted request; `waiting` holds the pairs that are in no batch yet, by length."""

    pairs: Pairs
    priority: Priority
    all_terms: bool
    num_tokens: int
    arrived: float
    done: asyncio.Future[None]
    waiting: Int64Array = field(init=False)
    num_unfinished: int = field(init=False)
    target_logprob: Float32Array = field(init=False)
    mean_logprob: Float32Array = field(init=False)
    rank: Int32Array | None = None
    entropy: Float32Array | None = None
    out_of_memory: BoolArray = field(init=False)
    num_batches: int = 0
    num_encoded_sources: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    def __post_init__(self) -> None:
        total = len(self.pairs.labels.values)
        self.waiting = np.lexsort((self.pairs.source_lengths, self.pairs.target_lengths))
        self.num_unfinished = len(self.pairs)
        self.target_logprob = np.full(total, np.nan, np.float32)
        self.mean_logprob = np.full(total, np.nan, np.float32)
        if self.all_terms:
            self.rank = np.zeros(total, np.int32)
            self.entropy = np.full(total, np.nan, np.float32)
        self.out_of_memory = np.zeros(len(self.pairs), np.bool_)

    def keep(self, positions: Int64Array, terms: TokenTerms, part: slice) -> None:
        self.target_logprob[positions] = terms.target_logprob[part]
        self.mean_logprob[positions] = terms.mean_logprob[part]
        if self.rank is not None and self.entropy is not None:
            assert terms.rank is not None  # noqa: S101 - for mypy; `all_terms` asked for them
            assert terms.entropy is not None  # noqa: S101
            self.rank[positions] = terms.rank[part]
            self.entropy[positions] = terms.entropy[part]

    def outcome(self) -> Outcome:
        counted = self.pairs.counted
        return Outcome(
            terms=TokenTerms(
                self.target_logprob[counted],
                self.mean_logprob[counted],
                None if self.rank is None else self.rank[counted],
                None if self.entropy is None else self.entropy[counted],
            ),
            out_of_memory=self.out_of_memory,
            num_batches=self.num_batches,
            num_encoded_sources=self.num_encoded_sources,
            queue_seconds=self.queue_seconds,
            compute_seconds=self.compute_seconds,
        )


class Batcher:
    """One model's queue and the task that empties it.

    All methods run on the event loop; the engine runs in `device_thread`, an executor with one
    thread that all models of a device share.
    """

    def __init__(
        self,
        engine: Engine,
        limits: BatchingLimits,
        metrics: ModelMetrics,
        device_thread: Executor,
        *,
        on_death: Callable[[EngineDeadError], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._metrics = metrics
        self._device_thread = device_thread
        self._on_death = on_death
        self._clock = clock
        self._jobs: dict[Priority, list[_Job]] = {"interactive": [], "bulk": []}
        self._num_tokens = 0
        self._bypassed = 0
        self._tokens_per_second = 0.0
        self._work = asyncio.Event()
        self._closed = False
        self._death: EngineDeadError | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def score(
        self, pairs: Pairs, *, priority: Priority, with_ranks_and_entropies: bool
    ) -> Outcome:
        """Queues all pairs of a request, or none, and waits until they are scored.

        Cancelling it takes the pairs that are in no batch yet out of the queue.

        Raises:
            RequestTooLargeError: it would not fit an empty queue.
            OverloadedError: it does not fit the queue now.
            NotReadyError: the service is shutting down.
            EngineDeadError: the device is gone.
        """
        job = self._admit(pairs, priority, with_ranks_and_entropies)
        try:
            if len(pairs):
                await job.done
        finally:
            self._forget(job)
        return job.outcome()

    async def drain(self, timeout_seconds: float) -> None:
        """Refuses new requests, finishes the admitted ones, and stops."""
        self._closed = True
        waiting = [job.done for jobs in self._jobs.values() for job in jobs]
        if waiting:
            await asyncio.wait(waiting, timeout=timeout_seconds)
        self._fail(
            self._all_jobs(), NotReadyError("the service was shut down before this was done")
        )
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # ------------------------------------------------------------ admission

    def _admit(self, pairs: Pairs, priority: Priority, all_terms: bool) -> _Job:
        num_tokens = len(pairs.sources.values) + len(pairs.labels.values)
        self._refuse_if_closed()
        if num_tokens > self._limits.max_queue_tokens:
            raise RequestTooLargeError(
                f"the request has {num_tokens} tokens, and the queue holds at most "
                f"{self._limits.max_queue_tokens}; split it"
            )
        if self._num_tokens + num_tokens > self._limits.max_queue_tokens:
            raise OverloadedError(
                f"{self._num_tokens} tokens wait, {num_tokens} more are over the limit of "
                f"{self._limits.max_queue_tokens}; try again later",
                retry_after_seconds=self._seconds_until_room_for(num_tokens),
            )
        job = _Job(
            pairs,
            priority,
            all_terms,
            num_tokens,
            self._clock(),
            asyncio.get_running_loop().create_future(),
        )
        self._jobs[priority].append(job)
        self._num_tokens += num_tokens
        self._report_queue()
        self._work.set()
        return job

    def _refuse_if_closed(self) -> None:
        if self._death:
            raise EngineDeadError(self._death.detail)
        if self._closed:
            raise NotReadyError("the service is shutting down", retry_after_seconds=1)

    def _seconds_until_room_for(self, num_tokens: int) -> float:
        ahead = self._num_tokens + num_tokens - self._limits.max_queue_tokens
        return max(1.0, ahead / self._tokens_per_second) if self._tokens_per_second else 1.0

    def _forget(self, job: _Job) -> None:
        if job in self._jobs[job.priority]:
            self._jobs[job.priority].remove(job)
        self._num_tokens -= job.num_tokens
        if job.num_unfinished:
            self._metrics.cancelled(job.num_unfinished)
        self._report_queue()

    def _report_queue(self) -> None:
        num_pairs = sum(len(job.waiting) for job in self._all_jobs())
        self._metrics.queue(num_pairs, self._num_tokens)

    def _all_jobs(self) -> list[_Job]:
        return [*self._jobs["interactive"], *self._jobs["bulk"]]

    # ------------------------------------------------------------ the loop

    async def _run(self) -> None:
        while not self._death:
            await self._work.wait()
            jobs = self._all_jobs()
            try:
                parts = self._next_batch()
                if parts:
                    jobs = [job for job, _ in parts]
                    await self._compute(parts)
                else:
                    self._work.clear()
            except EngineDeadError as error:
                _LOG.critical("the engine is dead: %s", error)
                self._death = error
                self._fail(self._all_jobs(), error)
                self._on_death(error)
            except Exception as error:  # whoever waits must hear of it, and the others go on
                _LOG.exception("a batch failed")
                self._fail(jobs, error)

    async def _compute(self, parts: list[tuple[_Job, Int64Array]]) -> None:
        started = self._clock()
        for job, _ in parts:
            if not job.num_batches:
                job.queue_seconds = started - job.arrived
                self._metrics.queue_wait(job.priority, job.queue_seconds)
        self._report_queue()
        await asyncio.get_running_loop().run_in_executor(
            self._device_thread, self._score, parts, self._reason()
        )
        self._finish(parts, self._clock() - started)

    def _reason(self) -> BatchReason:
        """Why the batch just taken is not larger."""
        if any(len(job.waiting) for job in self._all_jobs()):
            return "full"
        return "drain" if self._closed else "idle"

    def _next_batch(self) -> list[tuple[_Job, Int64Array]]:
        """Takes the next batch's pairs out of the queue."""
        jobs = [job for job in self._jobs_by_urgency() if len(job.waiting)]
        if not jobs:
            return []
        # What one request asked for is not computed for another.
        window = self._window([job for job in jobs if job.all_terms == jobs[0].all_terms])
        candidates = Candidates(
            np.concatenate([job.pairs.source_lengths[rows] for job, rows in window]),
            np.concatenate([job.pairs.target_lengths[rows] for job, rows in window]),
            np.concatenate(
                [
                    job.pairs.source_index[rows].astype(np.int64) + (number << 32)
                    for number, (job, rows) in enumerate(window)
                ]
            ),
        )
        chosen = form_batch(
            candidates, 0, self._limits.max_batch_tokens, self._limits.max_batch_pairs
        )
        taken = np.zeros(len(candidates.target_lengths), np.bool_)
        taken[chosen] = True
        parts, start = [], 0
        for job, rows in window:
            mine = taken[start : start + len(rows)]
            start += len(rows)
            if mine.any():
                parts.append((job, rows[mine]))
                job.waiting = np.concatenate([rows[~mine], job.waiting[len(rows) :]])
        return parts

    def _jobs_by_urgency(self) -> list[_Job]:
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

    def _window(self, jobs: Sequence[_Job]) -> list[tuple[_Job, Int64Array]]:
        """The first waiting pairs, up to `_WINDOW_BATCHES` batches' worth of tokens."""
        room = _WINDOW_BATCHES * self._limits.max_batch_tokens
        window = []
        for job in jobs:
            tokens = np.cumsum(
                job.pairs.source_lengths[job.waiting] + job.pairs.target_lengths[job.waiting]
            )
            fitting = max(1, int(np.searchsorted(tokens, room, side="right")))
            window.append((job, job.waiting[:fitting]))
            room -= int(tokens[fitting - 1])
            if room <= 0:
                break
        return window

    def _finish(self, parts: list[tuple[_Job, Int64Array]], seconds: float) -> None:
        num_tokens = sum(
            int((job.pairs.source_lengths[rows] + job.pairs.target_lengths[rows]).sum())
            for job, rows in parts
        )
        rate = num_tokens / max(seconds, 1e-9)
        self._tokens_per_second += (0.1 if self._tokens_per_second else 1.0) * (
            rate - self._tokens_per_second
        )
        for job, rows in parts:
            job.num_batches += 1
            job.compute_seconds += seconds
            job.num_unfinished -= len(rows)
            if not job.num_unfinished and not job.done.done():
                job.done.set_result(None)

    def _fail(self, jobs: Sequence[_Job], error: Exception) -> None:
        for job in jobs:
            if not job.done.done():
                job.done.set_exception(error)

    # ------------------------------------------------------------ on the device's thread

    def _score(self, jobs_and_rows: list[tuple[_Job, Int64Array]], reason: BatchReason) -> None:
        started = self._clock()
        parts = [Part(job.pairs, rows) for job, rows in jobs_and_rows]
        batch = collate(parts, with_ranks_and_entropies=jobs_and_rows[0][0].all_terms)
        collated = self._clock()
        try:
            terms = self._engine.score(batch)
        except OutOfMemoryError:
            terms = None
        if terms is None:  # outside the except block, whose traceback keeps the tensors alive
            self._score_halves(jobs_and_rows, reason)
            return
        computed = self._clock()
        start = 0
        for (job, _), part in zip(jobs_and_rows, parts, strict=True):
            positions = part.counted_positions
            job.keep(positions, terms, slice(start, start + len(positions)))
            job.num_encoded_sources += len(np.unique(job.pairs.source_index[part.rows]))
            start += len(positions)
        self._metrics.batch(
            BatchReport.of(
                batch, collated - started, computed - collated, self._clock() - computed
            ),
            reason,
        )

    def _score_halves(
        self, jobs_and_rows: list[tuple[_Job, Int64Array]], reason: BatchReason
    ) -> None:
        self._metrics.out_of_memory()
        num_pairs = sum(len(rows) for _, rows in jobs_and_rows)
        if num_pairs == 1:
            job, rows = jobs_and_rows[0]
            job.out_of_memory[rows] = True
            return
        self._score(_sliced(jobs_and_rows, 0, num_pairs // 2), reason)
        self._score(_sliced(jobs_and_rows, num_pairs // 2, num_pairs), reason)


def _sliced(
    jobs_and_rows: list[tuple[_Job, Int64Array]], start: int, stop: int
) -> list[tuple[_Job, Int64Array]]:
    """Pairs `start` to `stop` of a batch."""
    sliced, passed = [], 0
    for job, rows in jobs_and_rows:
        mine = rows[max(0, start - passed) : max(0, stop - passed)]
        if len(mine):
            sliced.append((job, mine))
        passed += len(rows)
    return sliced
