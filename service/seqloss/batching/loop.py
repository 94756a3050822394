"""Keeps one engine busy: forms a batch when the device is free, and gives the results back.

There is no timer.  An idle device starts at once; under load, whatever arrived while it was busy
is what the next batch is formed from.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from seqloss.batching.admission import Admission, DeviceBudget
from seqloss.batching.collate import Collated, collate
from seqloss.batching.cost import CostModel
from seqloss.batching.jobs import BatchTimes, Job, Outcome, Selection, halves, num_pairs_of
from seqloss.batching.queues import BatchingLimits, Formed, Queue
from seqloss.batching.shapes import shapes_of
from seqloss.engines.base import Engine
from seqloss.errors import (
    DeadlineExceededError,
    EngineDeadError,
    NotReadyError,
    OutOfMemoryError,
)
from seqloss.metrics import BatchReason, BatchReport, ModelMetrics
from seqloss.records import PRIORITIES, Batch, Pairs, Priority, TokenTerms

_LOG = logging.getLogger(__name__)

# A batch is formed ahead of time only where so many more like it wait: else what comes meanwhile
# would have made a better one.
_BATCHES_AHEAD = 2
# A batch that a drain gave up on is waited for so long: it may be one that never ends.
_LAST_BATCH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Threads:
    """Where the work is done that would hold up the event loop.

    Attributes:
        device: one thread; all models of a device share it, so that they take turns.
        host: one thread that collates and scatters while the device computes.
    """

    device: Executor
    host: Executor


@dataclass(frozen=True, slots=True)
class _Ready:
    """A batch on its way to the device, and when on the loop's clock it was collated."""

    formed: Formed
    collated: Collated
    reason: BatchReason
    collating_at: float
    collated_at: float


class Batcher:
    """One model's queue and the task that empties it.

    All methods run on the event loop, whose clock is the only one here.
    """

    def __init__(
        self,
        engine: Engine,
        limits: BatchingLimits,
        metrics: ModelMetrics,
        threads: Threads,
        *,
        cost: CostModel | None = None,
        on_death: Callable[[EngineDeadError], None] = lambda _: None,
    ) -> None:
        """Starts the task.

        Args:
            engine: what computes.
            limits: of batches and of the queue.
            metrics: what is reported to.
            threads: where to compute, and where to collate.
            cost: what a batch takes, where that was measured before.
            on_death: told once, when the engine is gone.
        """
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._metrics = metrics
        self._threads = threads
        self._cost = cost or CostModel(shapes_of(is_packed=engine.info.is_packed))
        self._queue = Queue(limits, self._cost)
        self._admission = Admission(limits.max_queue_tokens)
        self._budget = DeviceBudget(limits.max_batch_tokens)
        self._max_forward_seconds = limits.max_forward_seconds
        self._on_death = on_death
        self._num_jobs = 0
        self._work = asyncio.Event()
        self._splits: dict[Priority, deque[Formed]] = {each: deque() for each in PRIORITIES}
        self._ahead: tuple[Formed, asyncio.Task[_Ready]] | None = None
        self._scattering: set[asyncio.Task[None]] = set()
        self._forwarding: asyncio.Future[Any] | None = None
        self._is_closed = False
        self._death: EngineDeadError | None = None
        self.is_stuck = False
        self._busy_seconds = 0.0
        self._computing_since: float | None = None
        metrics.watch_queue(self._queue_state)
        self._task = self._loop.create_task(self._run())

    @property
    def queue_tokens(self) -> int:
        """Tokens admitted and not computed."""
        return self._admission.held

    @property
    def busy_seconds(self) -> float:
        """How long the device has computed batches, the one under way among them."""
        since = self._computing_since
        return self._busy_seconds + (self._loop.time() - since if since is not None else 0.0)

    def _queue_state(self) -> dict[str, float]:
        """What gauges show when they are read."""
        oldest = self._queue.oldest_arrival
        return {
            "queue_pairs": self._queue.num_waiting,
            "queue_tokens": self.queue_tokens,
            "queue_oldest_age_seconds": self._loop.time() - oldest if oldest is not None else 0.0,
            "estimated_wait_seconds": self._admission.seconds_ahead("bulk"),
            "token_budget": self._budget.tokens,
        }

    # ------------------------------------------------------------ callers

    async def score(  # noqa: PLR0913 - what there is to say of a request, each with a default
        self,
        pairs: Pairs,
        *,
        priority: Priority,
        with_ranks_and_entropies: bool,
        seconds_left: float = float("inf"),
        tenant: str = "",
        reproducible: bool = False,
        not_computed: Callable[[int], None] = lambda _: None,
    ) -> Outcome:
        """Queues all pairs of a request, or none, and waits until they are scored.

        Cancelling it takes the pairs that are in no batch yet out of the queue.

        Args:
            pairs: what is to be scored.
            priority: the class that it waits in.
            with_ranks_and_entropies: whether they are wanted.
            seconds_left: until nobody waits for it any more.
            tenant: whose it is; those who wait take turns.
            reproducible: whether its bits may depend on no other request.
            not_computed: told at the end how many of its tokens were in no batch.

        Raises:
            RequestTooLargeError: it would not fit an empty queue.
            OverloadedError: it does not fit the queue now, or would not be done in time.
            DeadlineExceededError: it was not done in time.
            NotReadyError: the service is shutting down.
            EngineDeadError: the device is gone.
        """
        now = self._loop.time()
        self._num_jobs += 1
        job = Job(
            pairs,
            priority,
            with_ranks_and_entropies,
            arrived=now,
            done=self._loop.create_future(),
            number=self._num_jobs,
            tenant=tenant,
            deadline=now + seconds_left,
            # Where batches do not change bits, company costs nothing.
            reproducible=reproducible and not self._engine.info.is_batch_invariant,
        )
        try:
            return await self._outcome(job, seconds_left)
        finally:
            not_computed(job.num_tokens_left_out)

    async def _outcome(self, job: Job, seconds_left: float) -> Outcome:
        if self._death:
            raise EngineDeadError(self._death.detail)
        if self._is_closed:
            raise NotReadyError("the service is shutting down", retry_after_seconds=1)
        if seconds_left <= 0:
            raise self._missed()
        self._admission.reserve(job.priority, job.num_tokens, seconds_left)
        if len(job.pairs) == 0:
            self._let_go(job)
            return job.outcome()
        self._queue.add(job)
        self._work.set()
        timer = None
        if seconds_left < float("inf"):
            timer = self._loop.call_at(job.deadline, self._expire, job.deadline)
        try:
            await job.done
        except asyncio.CancelledError:
            self._metrics.cancelled(job.num_unfinished)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._let_go(job)
        return job.outcome()

    async def drain(
        self, timeout_seconds: float, last_batch_seconds: float = _LAST_BATCH_SECONDS
    ) -> None:
        """Refuses new requests, finishes the admitted ones, and stops.

        Whoever is still waiting after the timeout gets NotReadyError. A batch that is still
        computed then is waited for a little longer; beyond that `is_stuck` says so.
        """
        self._is_closed = True
        try:
            if waiting := [job.done for job in self._queue.jobs]:
                await asyncio.wait(waiting, timeout=timeout_seconds)
        finally:
            reason = "the service was shut down before this was done"
            self._fail(self._queue.jobs, NotReadyError(reason, retry_after_seconds=1))
            self._task.cancel()
            self._drop_ahead()
        if self._forwarding is not None:
            try:
                await asyncio.wait({self._forwarding}, timeout=last_batch_seconds)
            finally:
                self.is_stuck = not self._forwarding.done()
        await asyncio.gather(self._task, *self._scattering, return_exceptions=True)

    def _missed(self) -> DeadlineExceededError:
        self._metrics.deadline_missed()
        return DeadlineExceededError(
            "the request's timeout_ms passed before all of it was scored; allow more, or send "
            "less at a time"
        )

    def _expire(self, at_least: float = 0.0) -> None:
        """Answers those whose time is over; nothing of them is computed any more.

        A timer may come too early, by the clock's resolution: it says what time it was set for.
        """
        for job in self._queue.expired(max(at_least, self._loop.time())):
            if not job.done.done():
                self._metrics.cancelled(job.num_unfinished)
                self._fail([job], self._missed())

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        for job in jobs:
            if not job.done.done():
                job.done.set_exception(error)
            self._let_go(job)

    def _let_go(self, job: Job) -> None:
        """Whatever the job still holds is given back; once or more often."""
        self._queue.remove(job)
        self._admission.release(job.priority, job.release_tokens(all_of_them=True))

    # ------------------------------------------------------------ the task

    async def _run(self) -> None:
        concerned: list[Job] | None = None
        while not self._death:
            self._work.clear()
            try:
                self._expire()
                concerned = None
                formed, collating = self._next()
                if formed is None or collating is None:
                    await self._work.wait()
                    continue
                concerned = [job for job, _ in formed.selection]
                ready = await self._still_wanted(await collating)
                if ready is not None:
                    await self._compute(ready)
            except EngineDeadError as error:
                self._die(error)
            except Exception as error:  # whoever waits must hear of it, and the others go on
                _LOG.exception("a batch failed")
                waiting = (job for job in self._queue.jobs if job.num_waiting)
                self._fail(list(waiting) if concerned is None else concerned, error)

    def _next(self) -> tuple[Formed | None, asyncio.Task[_Ready] | None]:
        """The batch that goes to the device now: halves of one, one formed ahead, or a new one."""
        turn = self._queue.turn(self._formed())
        if turn and self._splits[turn]:
            formed = self._splits[turn].popleft()
            return formed, self._collating(formed)
        if turn == "bulk" and self._ahead is not None:
            (formed, collating), self._ahead = self._ahead, None
            return formed, collating
        taken = self._queue.take(turn, self._loop.time(), self._budget.tokens) if turn else None
        return taken, None if taken is None else self._collating(taken)

    def _formed(self) -> set[Priority]:
        """Classes of which a batch is formed already."""
        formed = {priority for priority, splits in self._splits.items() if splits}
        return formed | {"bulk"} if self._ahead is not None else formed

    def _form_ahead(self, like: Formed) -> None:
        """Has the next bulk batch collated while the device computes, where plenty waits.

        An interactive request that comes meanwhile still goes first.
        """
        plenty = _BATCHES_AHEAD * num_pairs_of(like.selection)
        if self._formed() or self._queue.num_waiting < plenty:
            return
        if self._queue.turn() == "bulk":
            formed = self._queue.take("bulk", self._loop.time(), self._budget.tokens)
            if formed is not None:
                self._ahead = formed, self._collating(formed)

    def _collating(self, formed: Formed) -> asyncio.Task[_Ready]:
        reason: BatchReason = "full"
        if not self._queue.num_waiting:
            reason = "drain" if self._is_closed else "idle"

        async def collated() -> _Ready:
            started = self._loop.time()
            made = await self._loop.run_in_executor(self._threads.host, collate, formed.selection)
            return _Ready(formed, made, reason, started, self._loop.time())

        return self._loop.create_task(collated())

    async def _still_wanted(self, ready: _Ready) -> _Ready | None:
        """The batch without those who left, or whose time passed, since it was formed."""
        while True:
            self._expire()
            selection = [part for part in ready.formed.selection if not part[0].done.done()]
            if len(selection) == len(ready.formed.selection):
                return ready
            if not selection:
                return None
            # Others may leave meanwhile.
            ready = await self._collating(replace(ready.formed, selection=selection))

    async def _compute(self, ready: _Ready) -> None:
        started = self._loop.time()
        formed = ready.formed
        for job, _ in formed.selection:
            if not job.num_batches:
                job.queue_seconds = started - job.arrived
                self._metrics.queue_wait(job.priority, job.queue_seconds)
            job.num_batches += 1
        self._queue.started(formed.priority, self._formed())
        seconds = 0.0
        try:
            terms, begun, seconds = await self._forward(ready)
        finally:
            # The loop may hear late of a beginning, and of an end; of a failure only it knows.
            self._busy_seconds = max(self.busy_seconds, self._busy_seconds + seconds)
            self._computing_since = None
        if terms is None:
            self._split(formed)
            return
        self._budget.fitted()
        # The device need not wait for what is done with its results: a task starts when this one
        # has given it the next batch.
        finishing = self._loop.create_task(self._finish(ready, terms, begun, seconds))
        self._scattering.add(finishing)
        finishing.add_done_callback(self._scattering.discard)

    async def _forward(self, ready: _Ready) -> tuple[TokenTerms | None, float, float]:
        """The batch's terms, or None where it does not fit the device; since when, how long."""
        begun = self._loop.create_future()

        def score() -> tuple[TokenTerms | None, float, float]:
            self._loop.call_soon_threadsafe(_resolve, begun)
            started = self._loop.time()
            try:
                terms = self._engine.score(ready.collated.batch)
                return terms, started, self._loop.time() - started
            except OutOfMemoryError:
                pass
            # Outside of the except block, whose traceback keeps the tensors alive.
            self._engine.release_memory()
            return None, started, self._loop.time() - started

        forward = asyncio.ensure_future(self._loop.run_in_executor(self._threads.device, score))
        self._forwarding = forward
        # Nobody reads it where the watchdog or a drain ends this.
        forward.add_done_callback(_ignore)
        # Another model may have the device; its own watchdog looks after it.
        await asyncio.wait({forward, begun}, return_when=asyncio.FIRST_COMPLETED)
        self._computing_since = self._loop.time()
        # Only now: forming holds the interpreter, which the device's thread needs to begin.
        self._form_ahead(ready.formed)
        if self._max_forward_seconds < float("inf"):
            await asyncio.wait({forward}, timeout=self._max_forward_seconds)
            if not forward.done():
                self.is_stuck = True
                raise EngineDeadError(
                    f"a batch was not computed within {self._max_forward_seconds:g} s"
                )
        return await forward

    def _split(self, formed: Formed) -> None:
        """A pair that alone does not fit is given up; more are computed as two batches."""
        self._metrics.out_of_memory()
        if num_pairs_of(formed.selection) > 1:
            if not formed.is_part:  # halves that do not fit say nothing new of the budget
                self._budget.did_not_fit()
            self._metrics.batch_split()
            self._splits[formed.priority].extend(
                replace(formed, selection=half, is_part=True) for half in halves(formed.selection)
            )
            return
        ((job, rows),) = formed.selection
        job.out_of_memory[rows] = True
        self._count_done(formed.selection, 0.0)

    async def _finish(self, ready: _Ready, terms: TokenTerms, begun: float, seconds: float) -> None:
        """Gives the jobs their terms, and remembers what they took."""
        started = self._loop.time()
        collated = ready.collated
        try:
            await self._loop.run_in_executor(self._threads.host, collated.scatter, terms)
        except Exception as error:  # whoever waits must hear of it
            _LOG.exception("the results of a batch were lost")
            self._fail([job for job, _ in collated.selection], error)
            return
        scattered = self._loop.time()
        times = BatchTimes(
            ready.collating_at,
            ready.collated_at,
            begun,
            begun + seconds,
            scattered,
            num_pairs_of(collated.selection),
        )
        for job, _ in collated.selection:
            job.batch_times.append(times)
        self._count_done(collated.selection, seconds)
        try:
            self._observe(collated.batch, seconds)
            self._report(ready, times, scattered - started)
        except Exception:  # figures are no reason to keep an answer back
            _LOG.exception("a batch could not be reported")

    def _observe(self, batch: Batch, seconds: float) -> None:
        sources, targets = batch.sources, batch.decoder_input_ids
        shape = self._cost.shapes.of(sources.lengths, targets.lengths, batch.source_row)
        self._cost.observe(shape, seconds)
        self._admission.computed(len(sources.values) + len(batch.labels), seconds)

    def _report(self, ready: _Ready, times: BatchTimes, scatter_seconds: float) -> None:
        collated, info = ready.collated, self._engine.info
        self._metrics.batch(
            BatchReport.of(
                collated.batch,
                times.num_pairs,
                (
                    times.collated - times.collating,
                    times.computed - times.computing,
                    scatter_seconds,
                ),
                info.source_multiple,
                is_packed=info.is_packed,
            ),
            ready.reason,
        )
        self._metrics.device_memory(info.device, self._engine.memory_bytes())

    def _count_done(self, selection: Selection, seconds: float) -> None:
        for job, rows in selection:
            job.compute_seconds += seconds
            job.num_unfinished -= len(rows)
            self._admission.release(job.priority, job.release_tokens())
            if not job.num_unfinished and not job.done.done():
                job.done.set_result(None)

    def _die(self, error: EngineDeadError) -> None:
        _LOG.critical("the engine is dead: %s", error)
        self._death = error
        self._drop_ahead()
        self._fail(self._queue.jobs, error)
        self._on_death(error)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _ignore(future: asyncio.Future[Any]) -> None:
    """Reads an error that nobody is left to hear, so that it is not logged as forgotten."""
    if not future.cancelled():
        future.exception()
