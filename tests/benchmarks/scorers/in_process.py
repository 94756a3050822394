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
from seqloss.bundle.reader import open_bundle
from seqloss.metrics import Metrics
from seqloss.records import Ragged, RequestArrays
from seqloss.runtime import LossRuntime
from seqloss.scorer import ScoreOptions
from seqloss.settings import load_settings


def make(setup: Setup, engine: EngineName, precision: str) -> Scorer:
    """A runtime that is ready."""
    return _InProcess(setup, engine, precision)


class _InProcess:
    def __init__(self, setup: Setup, engine: EngineName, precision: str) -> None:
        self._settings = load_settings(device="cpu", precision=precision, threads=setup.threads)
        self._device_thread, self._host_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._runner = asyncio.Runner()
        self._runtime = LossRuntime(
            "bench",
            open_bundle(setup.bundles[engine]),
            self._settings,
            Metrics(CollectorRegistry()).model("bench"),
        )
        self._runner.run(
            self._runtime.start(Threads(device=self._device_thread, host=self._host_thread))
        )
        if self._runtime.state != "ready":
            raise RuntimeError(self._runtime.reason)

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
            self._runtime.score(_request(pairs), ScoreOptions(priority="bulk"))
        ).scores
        means: list[float] = (scores.nlls / scores.num_tokens).tolist()
        return means

    def close(self) -> None:
        self._runner.run(self._runtime.close())
        self._runner.close()
        self._device_thread.shutdown()
        self._host_thread.shutdown()


def _request(pairs: Pairs) -> RequestArrays:
    return RequestArrays(
        source_ids=Ragged.from_rows(pairs.source_ids, np.int64),
        target_ids=Ragged.from_rows(pairs.target_ids, np.int64),
        source_index=np.arange(len(pairs)),
        source_mask=None,
        target_mask=None,
        decoder_input_ids=None,
        start_ids=None,
        prefix_lengths=np.zeros(len(pairs), np.int64),
        pad_token_id=None,
        truncation=False,
    )
