"""One model in one precision, in a worker process: the points of a sweep that need it."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from benchmarks import resources
from benchmarks.operations import Shape
from benchmarks.pairs import Pairs
from benchmarks.scorers.in_process import request_of, started
from benchmarks.serving.clients import BulkLoad
from benchmarks.serving.workbench import Bundled
from benchmarks.sweeps.catalogue import Point, parts
from seqloss.batching.loop import Threads
from seqloss.bundle.reader import open_bundle
from seqloss.engines.loader import load_engine
from seqloss.runtime import LossRuntime
from seqloss.scorer import ScoreOptions
from seqloss.settings import load_settings


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the process, or on a GPU of its tensors; None where it is not known.

    Attributes:
        held_bytes: before the pairs were scored, the model and the pairs included.
        peak_bytes: the most while they were scored.
    """

    held_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Work:
    """What the pairs of a point are.

    Attributes:
        source_tokens, target_tokens: of all pairs.
        operations: that they need, see `Point.operations`.
        memory: that scoring them takes.
    """

    source_tokens: int
    target_tokens: int
    operations: int
    memory: Memory


class SweepTask:
    """Points share the loaded engine, and those of one batch size their queue and cost model."""

    def __init__(self, bundled: Bundled, shape: Shape) -> None:
        self._bundled, self._shape = bundled, shape
        self._bundle = open_bundle(bundled.bundle)
        self._engine = load_engine(self._bundle, bundled.device, bundled.precision, bundled.threads)
        self._device = torch.device(bundled.device)
        self._threads = Threads(device=ThreadPoolExecutor(1), host=ThreadPoolExecutor(1))
        self._runner = asyncio.Runner()
        self._runtimes: dict[int | None, LossRuntime] = {}

    def warm_up(self, point: Point) -> Work:
        """Scores the point's pairs once, and once more for their memory.

        That is not measured in the rounds: before, what was left by other points is given back, and
        to fetch it anew takes time.
        """
        pairs = point.pairs(self._bundled.limits)
        self._score(point, pairs)
        return Work(
            source_tokens=sum(pairs.source_lengths),
            target_tokens=sum(pairs.target_lengths),
            operations=point.operations(self._shape, pairs),
            memory=self._memory(point, pairs),
        )

    def run(self, point: Point) -> float:
        """Seconds from lists of ids to all nlls."""
        pairs = point.pairs(self._bundled.limits)
        started_at = time.perf_counter()
        self._score(point, pairs)
        return time.perf_counter() - started_at

    def close(self) -> None:
        """Ends its threads; the process ends too, and frees the device."""
        self._runner.close()
        self._threads.device.shutdown()
        self._threads.host.shutdown()

    def _runtime(self, max_batch_tokens: int | None) -> LossRuntime:
        """Warmed up as a server's is, for batches of this size."""
        if max_batch_tokens not in self._runtimes:
            given = {} if max_batch_tokens is None else {"max_batch_tokens": max_batch_tokens}
            self._runtimes[max_batch_tokens] = self._runner.run(
                started(
                    self._bundle, load_settings(**given), self._threads, lambda *_: self._engine
                )
            )
        return self._runtimes[max_batch_tokens]

    def _score(self, point: Point, pairs: Pairs) -> None:
        """In bulk requests of many pairs, a few of which are under way."""
        load = BulkLoad()
        runtime = self._runtime(point.max_batch_tokens)

        async def scored() -> None:
            left = parts(pairs, point.num_candidates, load.request_pairs)

            async def send() -> None:
                for part in left:
                    request = request_of(part, point.num_candidates)
                    await runtime.score(request, ScoreOptions(priority="bulk"))

            async with asyncio.TaskGroup() as group:
                for _ in range(load.requests_at_once):
                    group.create_task(send())

        self._runner.run(scored())

    def _memory(self, point: Point, pairs: Pairs) -> Memory:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            held = torch.cuda.memory_allocated(self._device)
            self._score(point, pairs)
            return Memory(held, torch.cuda.max_memory_allocated(self._device))
        pid = os.getpid()
        resources.release_free_memory()
        resources.reset_peak(pid)
        held_by_process = resources.resident_bytes(pid)
        self._score(point, pairs)
        return Memory(held_by_process, resources.peak_resident_bytes(pid))
