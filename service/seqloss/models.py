"""All served models by name, and how one bundle takes the place of another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from seqloss.batching.loop import Threads
from seqloss.bundle.reader import Bundle
from seqloss.engines.loader import load_engine
from seqloss.errors import NotReadyError, ReloadError
from seqloss.metrics import Metrics, ReloadOutcome
from seqloss.runtime import LoadEngine, LossRuntime
from seqloss.settings import Settings

_LOG = logging.getLogger(__name__)


class ServedModels(Mapping[str, LossRuntime]):
    """What is served. Whoever asks for a model twice may get two: hold one for a whole request."""

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        settings: Settings,
        metrics: Metrics,
        load: LoadEngine = load_engine,
        on_fatal: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        """Loads nothing yet.

        Args:
            bundles: opened, by the names of their models.
            settings: limits and sizes.
            metrics: what is reported to.
            load: makes an engine of a bundle.
            on_fatal: told when a model cannot be loaded at the start, or its engine died.
        """
        self._settings = settings
        self._metrics = metrics
        self._load = load
        self._on_fatal = on_fatal
        self._threads: Threads | None = None
        self._is_draining = False
        # One bundle at a time: two would need the memory of three.
        self._reloading = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._retired: list[LossRuntime] = []
        self._runtimes = {name: self._runtime(name, bundle) for name, bundle in bundles.items()}

    def _runtime(self, name: str, bundle: Bundle) -> LossRuntime:
        metrics = self._metrics.model(name)
        return LossRuntime(name, bundle, self._settings, metrics, self._load, self._on_fatal)

    def __getitem__(self, name: str) -> LossRuntime:
        return self._runtimes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._runtimes)

    def __len__(self) -> int:
        return len(self._runtimes)

    async def start(self, threads: Threads) -> None:
        """Loads all of them, one after the other."""
        self._threads = threads
        async with self._reloading:
            for runtime in self._runtimes.values():
                await runtime.start(threads)
                if runtime.state == "ready":
                    _say_what_is_ready(runtime)

    async def reload(self, name: str) -> ReloadOutcome:
        """Has what lies in the bundle's folder now take the place of what is served.

        The old one serves until the new one is loaded, has passed its self-test and is warm, and
        then answers those who came before. The device holds both meanwhile.

        Returns:
            `loaded`, or `unchanged` where the folder holds what is served.

        Raises:
            NotReadyError: the service is shutting down.
            ReloadError: what lies there cannot be served; the old one goes on serving.
        """
        async with self._reloading:
            old = self._runtimes[name]
            if self._is_draining or self._threads is None:
                raise NotReadyError("the service is starting or shutting down")
            try:
                outcome = await self._replace(old, self._threads)
            except NotReadyError:
                raise
            except Exception as error:
                self._metrics.model(name).reloaded("failed")
                _LOG.exception("the bundle of model %r was not reloaded", name)
                raise ReloadError(
                    f"model {name!r} goes on as it was: {error}", getattr(error, "faults", ())
                ) from error
            self._metrics.model(name).reloaded(outcome)
            return outcome

    async def _replace(self, old: LossRuntime, threads: Threads) -> ReloadOutcome:
        bundle = await asyncio.to_thread(old.bundle.reopened)
        if bundle.digest == old.bundle.digest:
            _LOG.info("model %r: its folder holds what is served", old.name)
            return "unchanged"
        new = self._runtime(old.name, bundle)
        loading = ThreadPoolExecutor(1, "seqloss-loading")
        try:
            await new.load(threads, loading)
        finally:
            loading.shutdown(wait=False)
            if new.is_stuck:
                self._retired.append(new)
        if self._is_draining:
            await new.close()
            raise NotReadyError("the service is shutting down")
        # From here to the end nobody else runs: a request has the old one or the new one.
        new.open()
        self._runtimes[old.name] = new
        _say_what_is_ready(new)
        self._retired.append(old)
        retiring = asyncio.create_task(self._retire(old))
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)
        return "loaded"

    async def _retire(self, old: LossRuntime) -> None:
        await old.retire()
        self._retired.remove(old)
        _LOG.info("model %r: the bundle %.12s is gone", old.name, old.bundle.digest)

    async def reload_all(self) -> dict[str, ReloadOutcome]:
        """Reloads every model; what cannot be is in the log, and the others are all the same.

        Raises:
            NotReadyError: the service is shutting down.
        """
        outcomes: dict[str, ReloadOutcome] = {}
        for name in self:
            try:
                outcomes[name] = await self.reload(name)
            except ReloadError:
                outcomes[name] = "failed"
        return outcomes

    async def drain(self) -> None:
        """Answers the admitted requests of all, and refuses new ones."""
        self._is_draining = True
        await asyncio.gather(*(runtime.drain() for runtime in self._all()))
        if self._retiring:
            await asyncio.wait(self._retiring, timeout=self._settings.drain_timeout_seconds)

    async def close(self) -> None:
        """Drains what is not drained yet, and frees the device."""
        self._is_draining = True
        for retiring in self._retiring:
            retiring.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await asyncio.gather(*(runtime.close() for runtime in self._all()))

    def _all(self) -> list[LossRuntime]:
        return [*self._runtimes.values(), *self._retired]

    @property
    def is_stuck(self) -> bool:
        """Whether the device's thread is in a batch that will never end."""
        return any(runtime.is_stuck for runtime in self._all())


def _say_what_is_ready(runtime: LossRuntime) -> None:
    if runtime.engine is None:
        return
    info, manifest = runtime.engine.info, runtime.bundle.manifest
    _LOG.info(
        "model %r is ready on %s in %s, off by %.1e nats per token on average (of the bundle's %s)",
        runtime.name,
        info.device,
        info.precision,
        manifest.graph(info.engine, info.precision).mean_error,
        ", ".join(one.precision for one in manifest.graphs),
    )
