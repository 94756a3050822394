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

import numpy as np

from seqloss.batching.collate import Part, collate
from seqloss.batching.jobs import Job, Outcome, Selection, num_pairs_of, sliced
from seqloss.batching.queues import BatchingLimits, Queue
from seqloss.engines.base import Engine
from seqloss.errors import (
    EngineDeadError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    RequestTooLargeError,
)
from seqloss.metrics import BatchReason, BatchReport, ModelMetrics
from seqloss.records import Pairs, Priority

_LOG = logging.getLogger(__name__)

# How much the latest batch counts in the measured rate.
_RATE_WEIGHT = 0.1


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
        self._queue = Queue(limits)
        self._metrics = metrics
        self._device_thread = device_thread
        self._on_death = on_death
        self._clock = clock
        self._tokens_per_second = 0.0
        self._work = asyncio.Event()
        self._closed = False
        self._death: EngineDeadError | None = None
        self._report_queue()
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
        done = asyncio.get_running_loop().create_future()
        job = Job(pairs, priority, with_ranks_and_entropies, self._clock(), done)
        self._refuse(job.num_tokens)
        if len(pairs) == 0:
            return job.outcome()
        self._queue.add(job)
        self._report_queue()
        self._work.set()
        try:
            await job.done
        except asyncio.CancelledError:
            self._metrics.cancelled(job.num_unfinished)
            raise
        finally:
            self._queue.remove(job)
            self._report_queue()
        return job.outcome()

    async def drain(self, timeout_seconds: float) -> None:
        """Refuses new requests, finishes the admitted ones, and stops.

        Whoever is still waiting after the timeout gets NotReadyError.
        """
        self._closed = True
        try:
            if waiting := [job.done for job in self._queue.jobs]:
                await asyncio.wait(waiting, timeout=timeout_seconds)
        finally:
            reason = "the service was shut down before this was done"
            _fail(self._queue.jobs, NotReadyError(reason, retry_after_seconds=1))
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _refuse(self, num_tokens: int) -> None:
        """Raises where a request of so many tokens cannot be admitted."""
        if self._death:
            raise EngineDeadError(self._death.detail)
        if self._closed:
            raise NotReadyError("the service is shutting down", retry_after_seconds=1)
        limit, held = self._queue.limits.max_queue_tokens, self._queue.num_tokens
        if num_tokens > limit:
            raise RequestTooLargeError(
                f"the request has {num_tokens} tokens, and the queue holds at most {limit}; "
                "split it"
            )
        if held + num_tokens > limit:
            raise OverloadedError(
                f"{held} tokens wait, {num_tokens} more are over the limit of {limit}; try again "
                "later",
                retry_after_seconds=self._seconds_until_done(held + num_tokens - limit),
            )

    def _seconds_until_done(self, num_tokens: int) -> float:
        """At least a second; no more where nothing was measured yet."""
        return max(1.0, num_tokens / self._tokens_per_second) if self._tokens_per_second else 1.0

    def _report_queue(self) -> None:
        self._metrics.queue(self._queue.num_waiting, self._queue.num_tokens)

    async def _run(self) -> None:
        while not self._death:
            await self._work.wait()
            concerned = self._queue.jobs
            try:
                batch = self._queue.take_batch()
                if batch:
                    concerned = [job for job, _ in batch]
                    await self._compute(batch)
                else:
                    self._work.clear()
            except EngineDeadError as error:
                _LOG.critical("the engine is dead: %s", error)
                self._death = error
                _fail(self._queue.jobs, error)
                self._on_death(error)
            except Exception as error:  # whoever waits must hear of it, and the others go on
                _LOG.exception("a batch failed")
                _fail(concerned, error)

    async def _compute(self, batch: Selection) -> None:
        started = self._clock()
        for job, _ in batch:
            if not job.num_batches:
                job.queue_seconds = started - job.arrived
                self._metrics.queue_wait(job.priority, job.queue_seconds)
        self._report_queue()
        await asyncio.get_running_loop().run_in_executor(
            self._device_thread, self._score, batch, self._reason()
        )
        self._finish(batch, self._clock() - started)

    def _reason(self) -> BatchReason:
        """Why the batch just taken is not larger."""
        if self._queue.num_waiting:
            return "full"
        return "drain" if self._closed else "idle"

    def _finish(self, batch: Selection, seconds: float) -> None:
        num_tokens = sum(
            int((job.source_lengths[rows] + job.target_lengths[rows]).sum()) for job, rows in batch
        )
        rate = num_tokens / max(seconds, 1e-9)
        weight = _RATE_WEIGHT if self._tokens_per_second else 1.0
        self._tokens_per_second += weight * (rate - self._tokens_per_second)
        for job, rows in batch:
            job.num_batches += 1
            job.compute_seconds += seconds
            job.num_unfinished -= len(rows)
            if not job.num_unfinished and not job.done.done():
                job.done.set_result(None)

    # ------------------------------------------------------------ on the device's thread

    def _score(self, selection: Selection, reason: BatchReason) -> None:
        started = self._clock()
        parts = [Part(job.pairs, rows) for job, rows in selection]
        batch = collate(parts, with_ranks_and_entropies=selection[0][0].all_terms)
        collated = self._clock()
        try:
            terms = self._engine.score(batch)
        except OutOfMemoryError:
            terms = None
        if terms is None:  # outside the except block, whose traceback keeps the tensors alive
            self._score_halves(selection, reason)
            return
        computed = self._clock()
        start = 0
        for (job, _), part in zip(selection, parts, strict=True):
            positions = part.counted_positions
            job.keep(positions, terms, slice(start, start + len(positions)))
            job.num_encoded_sources += len(np.unique(job.pairs.source_index[part.rows]))
            start += len(positions)
        scattered = self._clock()
        self._metrics.batch(
            BatchReport.of(batch, collated - started, computed - collated, scattered - computed),
            reason,
        )

    def _score_halves(self, selection: Selection, reason: BatchReason) -> None:
        """A single pair that does not fit is given up; more are tried as two batches."""
        self._metrics.out_of_memory()
        num_pairs = num_pairs_of(selection)
        if num_pairs == 1:
            ((job, rows),) = selection
            job.out_of_memory[rows] = True
            return
        self._score(sliced(selection, 0, num_pairs // 2), reason)
        self._score(sliced(selection, num_pairs // 2, num_pairs), reason)


def _fail(jobs: Sequence[Job], error: Exception) -> None:
    for job in jobs:
        if not job.done.done():
            job.done.set_exception(error)
