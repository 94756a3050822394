"""The calls of the queue and the batches that are timed: all that this benchmark knows of them."""

from __future__ import annotations

import asyncio

from seqloss.batching.collate import Collated, collate
from seqloss.batching.cost import BatchShape, CostModel
from seqloss.batching.jobs import Job, Selection
from seqloss.batching.queues import BatchingLimits, Queue
from seqloss.records import Pairs, Priority, TokenTerms
from seqloss.settings import load_settings

# Jobs have a future of some event loop; this one never runs.
_LOOP = asyncio.new_event_loop()


class TimedQueue:
    """A server's queue with its default limits, and a cost model that was measured."""

    def __init__(self) -> None:
        settings = load_settings()
        self._limits = BatchingLimits(
            settings.max_batch_tokens,
            settings.max_batch_pairs,
            settings.max_queue_tokens,
            settings.max_block_ms / 1000,
        )
        self._queue = Queue(self._limits, _measured_cost())
        self._num_jobs = 0
        self._done: asyncio.Future[None] = asyncio.Future(loop=_LOOP)

    def admit(self, pairs: Pairs, priority: Priority) -> Job:
        """A request that waits from now on."""
        self._num_jobs += 1
        job = Job(
            pairs,
            priority,
            all_terms=False,
            arrived=0.0,
            done=self._done,
            number=self._num_jobs,
        )
        self._queue.add(job)
        return job

    def pack(self, priority: Priority) -> list[Selection]:
        """All batches of this class, until nothing waits."""
        batches = []
        while formed := self._queue.take(priority, 0.0, self._limits.max_batch_tokens):
            batches.append(formed.selection)
        return batches


def collated(selection: Selection) -> Collated:
    """The batch that the engine gets."""
    return collate(selection)


def scatter(batch: Collated, terms: TokenTerms) -> None:
    """Gives each request its pairs' terms."""
    batch.scatter(terms)


def _measured_cost() -> CostModel:
    """About what a Marian-base takes on two cores."""
    cost = CostModel()
    for num_sources, source_length, num_targets, target_length in (
        (1, 10, 1, 10),
        (20, 20, 100, 20),
        (60, 60, 30, 50),
        (200, 8, 200, 12),
        (60, 50, 60, 10),
        (10, 50, 50, 60),
    ):
        source, target = num_sources * source_length, num_targets * target_length
        shape = BatchShape(num_sources, source_length, num_targets, target_length)
        cost.observe(shape, 5e-3 + 1.5e-5 * source + 4.2e-5 * target)
    return cost
