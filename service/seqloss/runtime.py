"""One served model: its bundle, its engine and its queue, from loading to draining."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Literal

from seqloss import __version__
from seqloss.batching.cost import CostModel
from seqloss.batching.loop import Batcher, Threads
from seqloss.batching.queues import BatchingLimits
from seqloss.batching.shapes import shapes_of
from seqloss.batching.warm_up import warm_up
from seqloss.bundle.manifest import EngineName, Precision
from seqloss.bundle.reader import Bundle
from seqloss.engines.base import Engine, EngineInfo
from seqloss.engines.loader import KernelOptions, load_engine
from seqloss.errors import ConfigurationError, EngineDeadError, NotReadyError
from seqloss.metrics import ModelMetrics
from seqloss.records import LengthLimits, RequestArrays
from seqloss.scorer import ScoredRequest, ScoreOptions, Scorer
from seqloss.settings import Settings
from seqloss.tokenization.encoder import TextEncoder

_LOG = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed"]

# What exists at once of a batch's logits: see `seqloss.export.onnx_merge`.
_LOGITS_COPIES = 4
_LOGIT_BYTES = 4

LoadEngine = Callable[
    [
        Bundle,
        str,
        Precision | Literal["auto"],
        int | None,
        EngineName | Literal["auto"],
        KernelOptions,
    ],
    Engine,
]


class LossRuntime:
    """One model, from loading to draining."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        settings: Settings,
        metrics: ModelMetrics,
        load: LoadEngine = load_engine,
        on_fatal: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        """Loads nothing yet.

        Args:
            name: of the model.
            bundle: opened.
            settings: limits and sizes.
            metrics: what is reported to.
            load: makes an engine of the bundle.
            on_fatal: told when the engine is gone, or could not be loaded by `start`.
        """
        self.name = name
        self.bundle = bundle
        self.limits = length_limits(bundle, settings)
        self.max_batch_tokens = settings.max_batch_tokens
        self.text_encoder = TextEncoder.of(bundle)
        self._settings = settings
        self._metrics = metrics
        self._load = load
        self._on_fatal = on_fatal
        self._state: State = "loading"
        self._reason = "the model is being loaded"
        self._engine: Engine | None = None
        self._batcher: Batcher | None = None
        self._scorer: Scorer | None = None
        self._cost = CostModel()
        self._threads: Threads | None = None
        self._is_drained = False
        self._is_warming_up_for_ever = False
        self._num_holders = 0
        self._is_let_go = asyncio.Event()

    @property
    def engine(self) -> Engine | None:
        """The loaded engine, or None while there is none."""
        return self._engine

    @property
    def state(self) -> State:
        """Where in its life the model is."""
        return self._state

    @property
    def reason(self) -> str:
        """Why it is not ready, in words."""
        return self._reason

    @property
    def queue_tokens(self) -> int:
        """Tokens admitted and not computed."""
        return self._batcher.queue_tokens if self._batcher is not None else 0

    @property
    def busy_seconds(self) -> float:
        """How long its batches have kept the device, up to now."""
        return self._batcher.busy_seconds if self._batcher is not None else 0.0

    async def start(self, threads: Threads) -> None:
        """Loads the engine, which passes the bundle's self-test, warms it up and opens the queue.

        What goes wrong is told to `on_fatal`: there is no caller to raise it to.
        """
        self._metrics.ready(False)
        try:
            await self.load(threads, threads.device)
        except Exception as error:
            self._state, self._reason = "failed", f"the model did not load: {error}"
            self._on_fatal(error)
            return
        if self._state == "loading":  # else a signal came meanwhile
            self.open()

    async def load(self, threads: Threads, loading: Executor) -> None:
        """Loads the engine and warms it up; afterwards it can be opened.

        Args:
            threads: where it will compute; it is warmed up there, in turn with other models.
            loading: the thread that reads, and that runs the self-test.

        Raises:
            Exception: whatever went wrong. The device holds nothing of it then.
        """
        loop = asyncio.get_running_loop()
        settings = self._settings
        self._threads = threads
        self._engine = await loop.run_in_executor(
            loading,
            self._load,
            self.bundle,
            settings.device,
            settings.precision,
            settings.threads,
            settings.engine,
            kernel_options(settings),
        )
        if self._state == "loading":
            self._reason = "the model is being warmed up"
        warming = loop.run_in_executor(threads.device, self._warm_up, self._engine)
        if loading is not threads.device:
            await self._watch(warming)
        try:
            self.max_batch_tokens, self._cost = await warming
        except Exception:
            await self._free()
            raise

    async def _watch(self, warming: asyncio.Future[tuple[int, CostModel]]) -> None:
        """Other models wait for the device meanwhile, and maybe for ever.

        Raises:
            EngineDeadError: it took longer than any batch may; the device is told to be gone.
        """
        seconds = self._settings.max_forward_seconds
        await asyncio.wait({warming}, timeout=seconds)
        if not warming.done():
            self._is_warming_up_for_ever = True
            error = EngineDeadError(f"a new bundle was not warmed up within {seconds:g} s")
            self._died(error)
            raise error

    def _warm_up(self, engine: Engine) -> tuple[int, CostModel]:
        settings = self._settings
        tokens = token_budget(engine.info, self.bundle, settings)
        if not settings.warm_up:
            return tokens, CostModel(shapes_of(is_packed=engine.info.is_packed))
        return warm_up(
            engine,
            self.bundle.manifest,
            self.limits,
            tokens,
            settings.max_batch_pairs,
        )

    def open(self) -> None:
        """Takes requests from now on; the metrics show this model's queue."""
        if self._engine is None or self._threads is None:
            raise RuntimeError("a model was opened that was not loaded. This is a bug.")
        settings, info = self._settings, self._engine.info
        limits = BatchingLimits(
            self.max_batch_tokens,
            settings.max_batch_pairs,
            settings.max_queue_tokens,
            settings.max_block_ms / 1000,
            settings.max_forward_seconds,
        )
        self._batcher = Batcher(
            self._engine,
            limits,
            self._metrics,
            self._threads,
            cost=self._cost,
            on_death=self._died,
        )
        self._scorer = Scorer(
            self.bundle.manifest,
            self.limits,
            settings.max_pairs_per_request,
            self._batcher,
            self._metrics,
        )
        self._metrics.watch_kernels(
            lambda: self._engine is not None and self._engine.info.has_kernels
        )
        self._metrics.built(
            __version__, info.engine, info.device, info.precision, self.bundle.digest
        )
        self._state, self._reason = "ready", "ready"
        self._metrics.ready(True)

    def _died(self, error: EngineDeadError) -> None:
        self._state, self._reason = "failed", f"the engine is dead: {error.detail}"
        self._metrics.ready(False)
        self._on_fatal(error)

    @contextmanager
    def held(self) -> Iterator[LossRuntime]:
        """While it lasts, the model goes on answering, though another one may take its place."""
        self._num_holders += 1
        try:
            yield self
        finally:
            self._num_holders -= 1
            if not self._num_holders:
                self._is_let_go.set()

    async def retire(self) -> None:
        """Answers those who hold it, who are the last, and frees the device."""
        while self._num_holders:
            self._is_let_go.clear()
            await self._is_let_go.wait()
        if self._batcher is not None and not self._is_drained:
            self._is_drained = True
            settings = self._settings
            # Nobody waits for its last batch, but for the device.
            await self._batcher.drain(settings.drain_timeout_seconds, settings.max_forward_seconds)
            if self._batcher.is_stuck:
                self._died(EngineDeadError("the last batch of an old bundle never ended"))
        await self._free()

    async def drain(self) -> None:
        """Answers the admitted requests, and after `drain_delay_seconds` refuses new ones."""
        if self._state != "failed":
            self._state, self._reason = "draining", "the service is shutting down"
        self._metrics.ready(False)
        if self._batcher is not None and not self._is_drained:
            self._is_drained = True
            if self._state == "draining":
                await asyncio.sleep(self._settings.drain_delay_seconds)
            await self._batcher.drain(self._settings.drain_timeout_seconds)

    async def close(self) -> None:
        """Drains what is not drained yet, and frees the device."""
        await self.drain()
        await self._free()

    async def _free(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None and self._threads is not None and not self.is_stuck:
            # On its own thread: a batch that outlived the drain may still be running there.
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads.device, engine.close)

    @property
    def is_stuck(self) -> bool:
        """Whether the device's thread is in a batch that will never end."""
        has_stuck_batch = self._batcher is not None and self._batcher.is_stuck
        return has_stuck_batch or self._is_warming_up_for_ever

    async def score(self, request: RequestArrays, options: ScoreOptions) -> ScoredRequest:
        """Checks, queues, scores and reduces: see `Scorer.score`.

        Raises:
            NotReadyError: it is not open yet.
        """
        if self._scorer is None:
            raise NotReadyError(
                f"model {self.name!r} is not ready: {self.reason}", retry_after_seconds=1
            )
        return await self._scorer.score(request, options)


def length_limits(bundle: Bundle, settings: Settings) -> LengthLimits:
    """What the model bounds and what the service bounds, the smaller of each."""
    manifest = bundle.manifest
    return LengthLimits(
        min(settings.max_source_tokens, manifest.max_source_tokens or settings.max_source_tokens),
        min(settings.max_target_tokens, manifest.max_target_tokens or settings.max_target_tokens),
    )


def kernel_options(settings: Settings) -> KernelOptions:
    """Kernels are compiled beside the service, except where nothing else may compute.

    Raises:
        ConfigurationError: settings contradict each other.
    """
    if settings.deterministic and not settings.kernels:
        raise ConfigurationError("deterministic losses need the kernels: leave kernels on")
    return KernelOptions(
        cache=settings.cache_dir if settings.kernels else None,
        wait=settings.deterministic,
        required=settings.deterministic,
    )


def token_budget(info: EngineInfo, bundle: Bundle, settings: Settings) -> int:
    """`max_batch_tokens`, or fewer where the logits of so many would be over `max_logits_bytes`."""
    asked, classes = settings.max_batch_tokens, bundle.manifest.vocabulary.classes
    # However short its sources are, a batch has no more target tokens than tokens.
    fitting = max(1, settings.max_logits_bytes // (_LOGITS_COPIES * _LOGIT_BYTES * classes))
    if not info.makes_logits or fitting >= asked:
        return asked
    _LOG.info(
        "max_batch_tokens is %d for this model, and not %d: its graph makes logits of %d classes, "
        "and max_logits_bytes is %d",
        fitting,
        asked,
        classes,
        settings.max_logits_bytes,
    )
    return fitting
