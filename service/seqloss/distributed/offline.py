"""A model in this process, for a caller that has no event loop and no server."""

from __future__ import annotations

import asyncio
import logging
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry

from seqloss import __version__, process
from seqloss.batching.loop import Threads
from seqloss.bundle.manifest import EngineName, Precision
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.engines.base import Engine
from seqloss.engines.loader import KernelOptions, load_engine
from seqloss.errors import ConfigurationError
from seqloss.metrics import Metrics
from seqloss.records import RequestArrays
from seqloss.runtime import LossRuntime
from seqloss.scorer import ScoredRequest, ScoreOptions
from seqloss.settings import load_settings
from seqloss.tokenization.encoder import TextEncoder

_LOG = logging.getLogger(__name__)

# Nobody else waits, and what is asked for is in memory already.
_NO_LIMIT = 2**62


def _load_with_kernels(
    bundle: Bundle,
    device: str,
    precision: Precision | Literal["auto"],
    threads: int | None,
    name: EngineName | Literal["auto"],
    kernels: KernelOptions,
) -> Engine:
    """Waits for kernels: what is scored before them would have other last bits."""
    return load_engine(bundle, device, precision, threads, name, replace(kernels, wait=True))


class OfflineModel:
    """The same queue, batches and engine that a service has, and so the same numbers."""

    def __init__(self, bundle: Path, settings: dict[str, Any], digest: str | None = None) -> None:
        """Loads it, and waits until it is ready.

        Args:
            bundle: its folder.
            settings: by their names.
            digest: that it must have; None for any.

        Raises:
            BundleError, ConfigurationError, EngineDeadError: it cannot be served.
        """
        process.prepare()
        opened = open_bundle(bundle)
        if digest not in (None, opened.digest):
            raise ConfigurationError(
                f"{bundle} on {platform.node()} is the bundle {opened.digest}, and the run began "
                f"with {digest}; put the same on every machine, and run the same command again"
            )
        unlimited = {"max_queue_tokens": _NO_LIMIT, "max_pairs_per_request": _NO_LIMIT}
        self._runner = asyncio.Runner()
        self._device = ThreadPoolExecutor(1, "seqloss-device")
        self._host = ThreadPoolExecutor(1, "seqloss-host")
        self._runtime = LossRuntime(
            opened.folder.name,
            opened,
            load_settings(**(settings | unlimited)),
            Metrics(CollectorRegistry()).model("offline"),
            _load_with_kernels,
        )
        try:
            self._runner.run(self._start())
        except BaseException:
            try:
                self.close()
            except Exception:  # what went wrong before is what counts
                _LOG.exception("a model that could not be loaded could not be closed either")
            raise
        process.settle()

    async def _start(self) -> None:
        await self._runtime.load(Threads(self._device, self._host), self._device)
        self._runtime.open()

    def close(self) -> None:
        """Frees the device's memory; no call follows."""
        self._runner.run(self._runtime.close())
        self._runner.close()
        for threads in (self._device, self._host):
            threads.shutdown(wait=not self._runtime.is_stuck)

    @property
    def described(self) -> dict[str, str]:
        """What computes."""
        engine, bundle = self._runtime.engine, self._runtime.bundle
        if engine is None:
            raise RuntimeError("a model is asked for its engine before it has one. This is a bug.")
        info = engine.info
        return {
            "seqloss": __version__,
            "bundle": bundle.digest,
            "engine": f"{info.engine} {info.version}",
            "device": info.device,
            "precision": info.precision,
        }

    @property
    def text_encoder(self) -> TextEncoder:
        """Makes ids of texts."""
        return self._runtime.text_encoder

    def score(self, request: RequestArrays) -> ScoredRequest:
        """Scores what can be scored, and names what is wrong with the rest.

        Raises:
            InvalidRequestError: nothing of it can be scored, whatever the pairs.
            EngineDeadError: the device is gone, and this process should be.
        """
        options = ScoreOptions(on_error="partial", priority="bulk", reproducible=True)
        return self._runner.run(self._runtime.score(request, options))
