"""The composition root: settings and bundles become an application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from seqloss import __version__
from seqloss.batching.loop import Threads
from seqloss.bundle.reader import Bundle
from seqloss.engines.loader import load_engine
from seqloss.errors import ConfigurationError, ReloadError
from seqloss.http import admin, health, inference_v2, problems, routes, served_v2, text_routes
from seqloss.http.keys import KeyMiddleware
from seqloss.http.middleware import RequestMiddleware
from seqloss.http.request_log import log_request
from seqloss.metrics import Metrics, ReloadOutcome
from seqloss.models import ServedModels
from seqloss.runtime import LoadEngine
from seqloss.settings import Settings
from seqloss.tenants import Tenants, read_tenants

# Replies are text; the fastest level takes most of what there is to gain.
_COMPRESS_FROM_BYTES = 4096
_COMPRESSION_LEVEL = 1

if TYPE_CHECKING:
    from seqloss.http.tracing import RequestTracer

_LAG_EVERY_SECONDS = 0.25

_CORS_REQUEST_HEADERS = [
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    "Inference-Header-Content-Length",
    "X-API-Key",
    "X-Request-ID",
    "X-Seqloss-Stream",
]
_CORS_REPLY_HEADERS = [
    "Inference-Header-Content-Length",
    "Retry-After",
    "Server-Timing",
    "X-Request-ID",
]


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

    Raises:
        ConfigurationError: the file of API keys, or what tracing needs, is not as it should be.
    """
    metrics = Metrics(registry or _process_registry())
    models = ServedModels(bundles, settings, metrics, load, on_fatal)
    keys = _Keys(settings)
    tracer = _tracer(settings)
    app = FastAPI(
        title="seqloss",
        version=__version__,
        summary="The loss of an encoder-decoder model as a service",
        lifespan=_lifespan(models, on_loaded, tracer),
        redirect_slashes=False,
        middleware=[
            Middleware(
                RequestMiddleware,
                metrics=metrics,
                on_bug=problems.on_bug,
                on_done=((log_request,) if settings.log_requests else ())
                + ((tracer,) if tracer else ()),
            ),
            # Browsers ask for leave without a key.
            *_cors(settings),
            Middleware(KeyMiddleware, tenants=lambda: keys.tenants),
            Middleware(
                GZipMiddleware,
                minimum_size=_COMPRESS_FROM_BYTES,
                compresslevel=_COMPRESSION_LEVEL,
            ),
        ],
    )
    app.state.models = models
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.reload = partial(_reload, models, keys)
    problems.install(app)
    _include(app, routes.router, text_routes.router, served_v2.router, inference_v2.router)
    _include(app, health.health)
    if settings.admin_port is None:
        _include(app, health.metrics)
    return app


def create_admin_app(app: FastAPI) -> FastAPI:
    """What the second port answers for the application: health, metrics, reloads; to anybody."""
    second = FastAPI(
        openapi_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(
                RequestMiddleware,
                metrics=app.state.metrics,
                on_bug=problems.on_bug,
                on_done=(log_request,) if app.state.settings.log_requests else (),
            )
        ],
    )
    second.state = app.state
    problems.install(second)
    _include(second, health.health, health.metrics, admin.router)
    return second


def _include(app: FastAPI, *routers: APIRouter) -> None:
    for router in routers:
        app.include_router(router)


class _Keys:
    """The tenants of the file of API keys, which can be read again."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.api_keys_file
        self.tenants = Tenants()
        self.read()

    def read(self) -> None:
        """Takes what the file says now; where something in it is wrong all stays as it was.

        Raises:
            ConfigurationError: something is.
        """
        if self._path is not None:
            self.tenants = read_tenants(self._path, time.monotonic, self.tenants)


async def _reload(models: ServedModels, keys: _Keys) -> dict[str, ReloadOutcome]:
    """API keys first: whoever lost access should not wait for models.

    Raises:
        ReloadError: the file of keys is wrong; models were not looked at.
    """
    try:
        keys.read()
    except ConfigurationError as error:
        raise ReloadError(f"all goes on as it was: {error}") from error
    return await models.reload_all()


def _cors(settings: Settings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=_CORS_REQUEST_HEADERS,
            expose_headers=_CORS_REPLY_HEADERS,
        )
    ]


def _tracer(settings: Settings) -> RequestTracer | None:
    if not settings.traces:
        return None
    try:
        from seqloss.http.tracing import RequestTracer  # noqa: PLC0415 - it need not be installed
    except ImportError as error:
        raise ConfigurationError(
            f"SEQLOSS_TRACES needs {error.name}: pip install 'seqloss[tracing]'"
        ) from error
    try:
        return RequestTracer()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"a variable OTEL_... is wrong: {error}") from error


def _lifespan(
    models: ServedModels, on_loaded: Callable[[], None], tracer: RequestTracer | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # One thread per device: models that share it take turns.
        device, host = (
            ThreadPoolExecutor(1, "seqloss-device"),
            ThreadPoolExecutor(1, "seqloss-host"),
        )
        loading = asyncio.create_task(_load(models, Threads(device, host), on_loaded))
        watching = asyncio.create_task(_watch_event_loop(app.state.metrics))
        app.state.loading = loading
        yield
        for task in (loading, watching):
            task.cancel()
        await asyncio.gather(loading, watching, return_exceptions=True)
        await models.close()
        # A thread in a batch that never ends is not waited for.
        device.shutdown(wait=not models.is_stuck)
        host.shutdown()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    return lifespan


async def _watch_event_loop(metrics: Metrics) -> None:
    """Measures how long what is ready to run has to wait."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_EVERY_SECONDS
        await asyncio.sleep(_LAG_EVERY_SECONDS)
        metrics.event_loop_lag.observe(max(0.0, loop.time() - due))


async def _load(models: ServedModels, threads: Threads, on_loaded: Callable[[], None]) -> None:
    await models.start(threads)
    on_loaded()


def _process_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
