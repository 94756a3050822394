"""The composition root: settings and bundles become an application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from seqloss import __version__
from seqloss.batching.loop import Threads
from seqloss.bundle.reader import Bundle
from seqloss.engines.loader import load_engine
from seqloss.http import inference_v2, problems, served_v2, text_routes
from seqloss.http.middleware import RequestMiddleware
from seqloss.http.routes import router
from seqloss.metrics import Metrics
from seqloss.runtime import LoadEngine, LossRuntime
from seqloss.settings import Settings
from seqloss.tokenization.encoder import TextEncoder

_LOG = logging.getLogger(__name__)

# Replies are text; the fastest level takes most of what there is to gain.
_COMPRESS_FROM_BYTES = 4096
_COMPRESSION_LEVEL = 1

_LAG_EVERY_SECONDS = 0.25


def create_app(
    bundles: Mapping[str, Bundle],
    settings: Settings,
    *,
    registry: CollectorRegistry | None = None,
    load: LoadEngine = load_engine,
    on_loaded: Callable[[], None] = lambda: None,
    on_fatal: Callable[[Exception], None] = lambda _: None,
) -> FastAPI:
    """An application that serves the bundles under their names.

    It answers at once, and is ready when all engines are loaded and passed their self-tests.

    Args:
        bundles: opened bundles by the names of their models.
        settings: limits and sizes.
        registry: where metrics go; None makes one with the process's own metrics in it.
        load: makes an engine of a bundle.
        on_loaded: called once all models are loaded, or have failed to.
        on_fatal: called when a model cannot be loaded or its engine died; the process should end.
    """
    metrics = Metrics(registry or _process_registry())
    models = {
        name: LossRuntime(name, bundle, settings, metrics.model(name), load, on_fatal)
        for name, bundle in bundles.items()
    }
    app = FastAPI(
        title="seqloss",
        version=__version__,
        summary="The loss of an encoder-decoder model as a service",
        lifespan=_lifespan(models, on_loaded),
        redirect_slashes=False,
        middleware=[
            Middleware(RequestMiddleware, metrics=metrics, on_bug=problems.on_bug),
            Middleware(
                GZipMiddleware,
                minimum_size=_COMPRESS_FROM_BYTES,
                compresslevel=_COMPRESSION_LEVEL,
            ),
        ],
    )
    app.state.models = models
    app.state.text_encoders = {name: TextEncoder.of(bundle) for name, bundle in bundles.items()}
    app.state.settings = settings
    app.state.metrics = metrics
    problems.install(app)
    app.include_router(router)
    app.include_router(text_routes.router)
    app.include_router(served_v2.router)
    app.include_router(inference_v2.router)
    return app


def _lifespan(
    models: Mapping[str, LossRuntime], on_loaded: Callable[[], None]
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # One thread per device: models that share it take turns.
        device, host = (
            ThreadPoolExecutor(1, "seqloss-device"),
            ThreadPoolExecutor(1, "seqloss-host"),
        )
        loading = asyncio.create_task(_load_all(models, Threads(device, host), on_loaded))
        watching = asyncio.create_task(_watch_event_loop(app.state.metrics))
        app.state.loading = loading
        yield
        for task in (loading, watching):
            task.cancel()
        await asyncio.gather(loading, watching, return_exceptions=True)
        await asyncio.gather(*(runtime.close() for runtime in models.values()))
        # A thread in a batch that never ends is not waited for.
        device.shutdown(wait=not any(runtime.is_stuck for runtime in models.values()))
        host.shutdown()

    return lifespan


async def _watch_event_loop(metrics: Metrics) -> None:
    """Measures how long what is ready to run has to wait."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_EVERY_SECONDS
        await asyncio.sleep(_LAG_EVERY_SECONDS)
        metrics.event_loop_lag.observe(max(0.0, loop.time() - due))


async def _load_all(
    models: Mapping[str, LossRuntime], threads: Threads, on_loaded: Callable[[], None]
) -> None:
    for runtime in models.values():
        await runtime.start(threads)
        if runtime.state == "ready" and runtime.engine is not None:
            info = runtime.engine.info
            graph = runtime.bundle.manifest.graph(info.engine, info.precision)
            _LOG.info(
                "model %r is ready on %s in %s, off by %.1e nats per token on average (of the "
                "bundle's %s)",
                runtime.name,
                info.device,
                info.precision,
                graph.mean_error,
                ", ".join(one.precision for one in runtime.bundle.manifest.graphs),
            )
    on_loaded()


def _process_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
