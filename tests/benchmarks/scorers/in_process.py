"""seqloss as its server runs it, queue and batches included, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from prometheus_client import CollectorRegistry

from benchmarks.pairs import Pairs
from benchmarks.scoring import Scorer, Setting, Setup, own_pid
from seqloss.batching.loop import Threads
from seqloss.bundle.manifest import EngineName
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.engines.loader import load_engine
from seqloss.metrics import Metrics
from seqloss.records import Ragged, RequestArrays
from seqloss.runtime import LoadEngine, LossRuntime
from seqloss.scorer import ScoreOptions
from seqloss.settings import Settings, load_settings


def make(setup: Setup, engine: EngineName, precision: str) -> Scorer:
    """A runtime that is ready."""
    return _InProcess(setup, engine, precision)


async def started(
    bundle: Bundle, settings: Settings, threads: Threads, load: LoadEngine = load_engine
) -> LossRuntime:
    """A model that is ready, as a server has it.

    Raises:
        RuntimeError: it did not load.
    """
    metrics = Metrics(CollectorRegistry()).model("bench")
    runtime = LossRuntime("bench", bundle, settings, metrics, load)
    await runtime.start(threads)
    if runtime.state != "ready":
        raise RuntimeError(runtime.reason)
    return runtime


class _InProcess:
    def __init__(self, setup: Setup, engine: EngineName, precision: str) -> None:
        self._settings = load_settings(device="cpu", precision=precision, threads=setup.threads)
        self._device_thread, self._host_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._runner = asyncio.Runner()
        threads = Threads(device=self._device_thread, host=self._host_thread)
        bundle = open_bundle(setup.bundles[engine])
        self._runtime = self._runner.run(started(bundle, self._settings, threads))

    @property
    def pid(self) -> int:
        return own_pid()

    @property
    def candidates(self) -> Sequence[Setting]:
        return [{"max_batch_tokens": self._settings.max_batch_tokens}]

    def use(self, setting: Setting) -> None:
        """There is but one."""

    def score(self, pairs: Pairs) -> list[float]:
        scores = self._runner.run(
            self._runtime.score(request_of(pairs), ScoreOptions(priority="bulk"))
        ).scores
        means: list[float] = (scores.nlls / scores.num_tokens).tolist()
        return means

    def close(self) -> None:
        self._runner.run(self._runtime.close())
        self._runner.close()
        self._device_thread.shutdown()
        self._host_thread.shutdown()


def request_of(pairs: Pairs, num_candidates: int = 1) -> RequestArrays:
    """What a server makes of a body; a source has so many targets, which stand together."""
    return RequestArrays(
        source_ids=Ragged.from_rows(pairs.source_ids, np.int64),
        target_ids=Ragged.from_rows(pairs.target_ids, np.int64),
        source_index=np.arange(len(pairs)) // num_candidates,
        source_mask=None,
        target_mask=None,
        decoder_input_ids=None,
        start_ids=None,
        prefix_lengths=np.zeros(len(pairs), np.int64),
        pad_token_id=None,
        truncation=False,
    )
