"""What waits, whose turn it is, and which pairs of all that waits make the next batch.

Pure: time is given, nothing is awaited, and the same calls give the same batches.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from seqloss.batching.cost import CostModel
from seqloss.batching.jobs import Job, Selection
from seqloss.batching.packing import Caps, form_batch, riders, shape_of
from seqloss.batching.shapes import BatchShape
from seqloss.batching.window import Taken, Window
from seqloss.records import PRIORITIES, Priority

# Pairs are sorted within so many batches' worth of tokens: sorting more costs more time, sorting
# less leaves more padding.
_WINDOW_BATCHES = 64
# After so many interactive batches in a row, a waiting bulk pair is next.
MAX_BYPASS = 4
# A request without a deadline is as urgent as one that has so many seconds.
_PATIENCE: dict[Priority, float] = {"interactive": 1.0, "bulk": 60.0}
# A batch may take so many times as long with riders as without.
_WITH_RIDERS = 2.0
# What forms batches that are to be the same every time: no measurement.
_NOMINAL_COST = CostModel()
# So long after an interactive request another one is expected.
_INTERACTIVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class BatchingLimits:
    """See `seqloss.settings.Settings`, where each has its trade-off."""

    max_batch_tokens: int
    max_batch_pairs: int
    max_queue_tokens: int
    max_block_seconds: float = float("inf")
    max_forward_seconds: float = float("inf")


@dataclass(frozen=True, slots=True)
class Formed:
    """Pairs that were taken out of the queue to be computed together.

    Attributes:
        selection: of which jobs, which pairs.
        priority: the class of its anchor.
        shape: what it is to the engine.
        is_part: whether it is a half of one that did not fit the device.
    """

    selection: Selection
    priority: Priority
    shape: BatchShape
    is_part: bool = False


class Queue:
    """Admitted requests until all of their pairs are in batches."""

    def __init__(self, limits: BatchingLimits, cost: CostModel) -> None:
        self._limits = limits
        self._cost = cost
        self._classes: dict[Priority, _Class] = {
            priority: _Class(priority) for priority in PRIORITIES
        }
        self._jobs: dict[int, Job] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._bypassed = 0
        self._interactive_seen = -_INTERACTIVE_SECONDS
        self.num_waiting = 0

    @property
    def jobs(self) -> list[Job]:
        """Requests that were added and not removed, in the order of their arrival."""
        return list(self._jobs.values())

    def add(self, job: Job) -> None:
        """Takes a request in."""
        self._jobs[job.number] = job
        self.num_waiting += job.num_waiting
        self._classes[job.priority].add(job)
        if job.deadline < float("inf"):
            # Its number alone: one that is done long before is not to be kept in memory.
            heapq.heappush(self._deadlines, (job.deadline, job.number))
        if job.priority == "interactive":
            self._interactive_seen = job.arrived

    def remove(self, job: Job) -> None:
        """Lets a request go; those of its pairs that are in no batch yet never will be."""
        if self._jobs.pop(job.number, None) is not None:
            self.num_waiting -= job.num_waiting
            job.drop_waiting()
            self._classes[job.priority].remove(job)

    def expired(self, now: float) -> list[Job]:
        """Requests whose deadline has passed; each is named once. They are to be removed."""
        passed = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            if number in self._jobs:
                passed.append(self._jobs[number])
        return passed

    @property
    def oldest_arrival(self) -> float | None:
        """When the first of the requests came that are here still; None where there is none."""
        return next(iter(self._jobs.values())).arrived if self._jobs else None

    def turn(self, formed: Collection[Priority] = ()) -> Priority | None:
        """The class that comes next: interactive, but not more than `MAX_BYPASS` times in a row.

        Args:
            formed: classes of which a batch has been formed and waits.
        """
        if not self._waits("interactive", formed):
            return "bulk" if self._waits("bulk", formed) else None
        is_due = self._bypassed >= MAX_BYPASS and self._waits("bulk", formed)
        return "bulk" if is_due else "interactive"

    def started(self, priority: Priority, formed: Collection[Priority] = ()) -> None:
        """A batch with an anchor of this class goes to the device; others are formed and wait."""
        is_bypass = priority == "interactive" and self._waits("bulk", formed)
        self._bypassed = self._bypassed + 1 if is_bypass else 0

    def _waits(self, priority: Priority, formed: Collection[Priority]) -> bool:
        return priority in formed or self._classes[priority].anchor() is not None

    def take(self, priority: Priority, now: float, max_batch_tokens: int) -> Formed | None:
        """Takes a batch out of what waits.

        Args:
            priority: of its anchor.
            now: on the clock of `Job.arrived`.
            max_batch_tokens: what the device holds.

        Returns:
            None where nothing of this class waits.
        """
        mine = self._classes[priority]
        other = self._classes["bulk" if priority == "interactive" else "interactive"]
        anchor = mine.anchor()
        if anchor is None:
            return None
        if anchor.reproducible:
            return self._take_alone(mine, anchor)
        limits = self._limits
        window_tokens = _WINDOW_BATCHES * limits.max_batch_tokens
        window, place = mine.window(anchor, self._cost, window_tokens)
        caps = Caps(max_batch_tokens, limits.max_batch_pairs, self._most_seconds(priority, now))
        candidates, allowed = window.candidates, None
        if ahead := mine.jobs_ahead_of(anchor, limits.max_batch_tokens):
            allowed = window.without(ahead)
            candidates, place = candidates.part(allowed), int(allowed.searchsorted(place))
        chosen = form_batch(candidates, place, caps, self._cost)
        shape = shape_of(candidates.part(chosen), self._cost)
        taken = window.take(chosen if allowed is None else allowed[chosen])
        shape = self._with_riders(taken, shape, caps, other, anchor, window_tokens)
        return self._formed(taken, priority, shape)

    def _take_alone(self, mine: _Class, job: Job) -> Formed:
        """A batch of one job's pairs, the same whatever else waits, is measured or does not fit.

        It may keep others waiting for longer than `max_block_ms`, since that is measured.
        """
        window = mine.own_window(job, _NOMINAL_COST)
        caps = Caps(self._limits.max_batch_tokens, self._limits.max_batch_pairs)
        chosen = form_batch(window.candidates, 0, caps, _NOMINAL_COST)
        shape = shape_of(window.candidates.part(chosen), _NOMINAL_COST)
        return self._formed(window.take(chosen), job.priority, shape)

    def _formed(self, taken: Taken, priority: Priority, shape: BatchShape) -> Formed:
        for job, rows, num_tokens in taken:
            job.num_waiting -= len(rows)
            self.num_waiting -= len(rows)
            self._classes[job.priority].charge(job, num_tokens)
        return Formed([(job, rows) for job, rows, _ in taken], priority, shape)

    def _with_riders(
        self,
        taken: Taken,
        shape: BatchShape,
        caps: Caps,
        other: _Class,
        anchor: Job,
        window_tokens: int,
    ) -> BatchShape:
        """Fills the batch up with pairs of the other class, see `riders`."""
        waiting = other.anchor()
        if waiting is None or waiting.reproducible or waiting.all_terms != anchor.all_terms:
            return shape
        if self._cost.is_measured:
            alone = float(self._cost.seconds(shape))
            seconds = min(_WITH_RIDERS * alone, self._limits.max_block_seconds)
            block = Caps(caps.tokens, caps.pairs, seconds)
            window, _ = other.window(waiting, self._cost, window_tokens)
            found = riders(window.candidates, shape, block, self._cost)
            if len(found):
                riding = window.candidates.part(found)
                is_new = np.ones(len(found), np.bool_)
                taken.extend(window.take(found))
                shape = shape.grown(riding.source_lengths, riding.target_lengths, is_new).at(-1)
        return shape

    def _most_seconds(self, priority: Priority, now: float) -> float:
        """A batch is never broken off: those of bulk are short while interactive requests come."""
        if priority == "interactive" or not self._cost.is_measured:
            return float("inf")
        expected = now - self._interactive_seen < _INTERACTIVE_SECONDS
        return self._limits.max_block_seconds if expected else float("inf")


@dataclass(slots=True)
class _Tenant:
    """The jobs of one tenant in one class.

    Attributes:
        served: tokens of it that went into batches, on a clock of tokens which all tenants share.
        waiting: a heap by urgency of jobs with pairs in no batch.
        outside: a heap by urgency of jobs with pairs in no window; those that share no batches
            never are in one.
    """

    served: float = 0.0
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)
    outside: list[tuple[float, int, Job]] = field(default_factory=list)

    def most_urgent(self) -> Job | None:
        while self.waiting and not self.waiting[0][2].num_waiting:
            heapq.heappop(self.waiting)
        return self.waiting[0][2] if self.waiting else None


class _Class:
    """One priority's jobs, by tenant.

    The tenant whose pairs were served the fewest tokens comes next.  A tenant that was away starts
    where the others are, so that idling earns nothing.  Batches are filled up with pairs of other
    tenants, but not of those that are a batch ahead: between two tenants with waiting pairs the
    difference is never more than what two batches hold.
    """

    def __init__(self, priority: Priority) -> None:
        self._priority = priority
        self._tenants: dict[str, _Tenant] = {}
        self._windows = {False: Window(), True: Window()}
        self._own_windows: dict[int, Window] = {}
        self._clock = 0.0

    def add(self, job: Job) -> None:
        tenant = self._tenants.setdefault(job.tenant, _Tenant())
        if tenant.most_urgent() is None:
            tenant.served = max(tenant.served, self._clock)
        urgency = min(job.deadline, job.arrived + _PATIENCE[self._priority])
        heapq.heappush(tenant.waiting, (urgency, job.number, job))
        if not job.reproducible:
            heapq.heappush(tenant.outside, (urgency, job.number, job))

    def remove(self, job: Job) -> None:
        self._windows[job.all_terms].remove(job)
        self._own_windows.pop(job.number, None)

    def anchor(self) -> Job | None:
        """The most urgent job of the tenant whose turn it is; None where nothing waits."""
        turns = [
            (tenant.served, job.number, job, tenant)
            for tenant in self._tenants.values()
            if (job := tenant.most_urgent()) is not None
        ]
        if not turns:
            return None
        _, _, job, tenant = min(turns)
        self._clock = max(self._clock, tenant.served)
        return job

    def jobs_ahead_of(self, anchor: Job, num_tokens: int) -> list[Job]:
        """Jobs of tenants that are so many tokens ahead of the anchor's: it is not their turn."""
        if len(self._tenants) == 1:
            return []
        most = self._tenants[anchor.tenant].served + num_tokens
        return [
            job
            for tenant in self._tenants.values()
            if tenant.served > most
            for _, _, job in tenant.waiting
        ]

    def charge(self, job: Job, num_tokens: int) -> None:
        """Counts what a tenant had of a batch."""
        self._tenants[job.tenant].served += num_tokens

    def own_window(self, job: Job, cost: CostModel) -> Window:
        """All pairs of a job that wait, and no others."""
        if job.number not in self._own_windows:
            window = self._own_windows[job.number] = Window()
            window.add([(job, np.arange(len(job.pairs)))], cost.target_weight)
        return self._own_windows[job.number]

    def window(self, anchor: Job, cost: CostModel, max_tokens: int) -> tuple[Window, int]:
        """The window, filled where it is half empty, and where a pair of the anchor stands in it.

        Sorting it costs little per batch, since it is done once for many.
        """
        window = self._windows[anchor.all_terms]
        room = max_tokens - window.num_tokens
        coming: Selection = []
        place = window.first_of(anchor)
        if place is None:
            rows, num_tokens = anchor.next_rows(max(max_tokens // 8, room), cost.target_weight)
            coming.append((anchor, rows))
            room -= num_tokens
        if room > max_tokens // 2:
            coming.extend(self._next_from_outside(anchor, room, cost))
        if coming:
            window.add(coming, cost.target_weight)
            place = window.first_of(anchor)
        assert place is not None  # noqa: S101 - if it was not there, it is now
        return window, place

    def _next_from_outside(self, anchor: Job, room: int, cost: CostModel) -> Selection:
        """Pairs in the order in which their turn will come: each tenant has a share of the room."""
        coming: Selection = []
        tenants = [tenant for tenant in self._tenants.values() if tenant.outside]
        for left, tenant in enumerate(sorted(tenants, key=lambda one: one.served)):
            share = room // (len(tenants) - left)
            passed_over = []
            while tenant.outside and share > 0:
                entry = heapq.heappop(tenant.outside)
                job = entry[2]
                if not job.num_outside:
                    continue
                if job.all_terms == anchor.all_terms:
                    rows, num_tokens = job.next_rows(share, cost.target_weight)
                    coming.append((job, rows))
                    share, room = share - num_tokens, room - num_tokens
                if job.num_outside:
                    passed_over.append(entry)
            for entry in passed_over:
                heapq.heappush(tenant.outside, entry)
        return coming
