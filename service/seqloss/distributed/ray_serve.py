"""The service on Ray Serve: one replica per device, each with our batcher and a port of its own.

`serve deploy` reads a file that names `seqloss.distributed.ray_serve:application`; see
deploy/ray/serve.yaml.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Set
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seqloss import logs, process
from seqloss.bundle.reader import open_bundle
from seqloss.distributed.autoscaling import BUSY_SHARE, QUEUE_TOKENS
from seqloss.errors import ConfigurationError
from seqloss.http.app import create_app
from seqloss.http.server import SecondServer, listen_for_operators
from seqloss.models import ServedModels
from seqloss.settings import Settings, load_settings

# Replicas on one machine share its ports: each takes the first that is free.
_FIRST_OPERATORS_PORT = 8100
_OPERATORS_PORTS = 32
_LAST_PORT = 65535

# Settings of `seqloss serve`, and why they are of no effect here.
_RAYS = {
    "connections are Ray Serve's; see http_options of its config file": {
        "host",
        "port",
        "tls_certificate_file",
        "tls_key_file",
    },
    "Ray Serve drains replicas; see graceful_shutdown_timeout_s of the deployment": {
        "drain_delay_seconds",
        "drain_timeout_seconds",
    },
}

_REPLICA_HEALTH_SECONDS = 5.0
# For answers that are under way.
_LAST_REPLIES_SECONDS = 1.0

_LOG = logging.getLogger(__name__)


# As of `seqloss serve NAME=BUNDLE`.
_ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class Arguments(BaseModel):
    """What `args` of an application may say in a file for `serve deploy`."""

    model_config = ConfigDict(extra="forbid")

    models: Annotated[dict[_ModelName, Path], Field(min_length=1)]
    """The folders of bundles, by the names of their models; each machine must find them there."""

    settings: dict[str, Any] = {}
    """Those of `seqloss.settings` by their names; they win over `SEQLOSS_...`. `host`, `port` and
    TLS are Ray Serve's, `receive_timeout_seconds` is of bodies alone, and `admin_port` is the first
    of the ports that replicas take."""


class Replica:
    """One process with one device: the same application that `seqloss serve` serves.

    Its metrics are on a port of its own.  Behind Ray Serve's proxy /metrics would be those of some
    replica, each time another one, so it is not there.
    """

    def __init__(self, models: dict[str, Path], settings: dict[str, Any]) -> None:
        """Opens the bundles; they are loaded when the application starts.

        Raises:
            ConfigurationError: a setting is wrong, or Ray Serve does what it is about.
            BundleError: a folder holds no bundle, or a broken one.
        """
        process.prepare()
        _refuse_what_ray_does(settings.keys())
        given = load_settings(**settings).model_fields_set  # here, or in the environment
        defaults = {"admin_port": _FIRST_OPERATORS_PORT, "threads": _assigned_threads()}
        missing = {name: value for name, value in defaults.items() if name not in given}
        self._settings = load_settings(**(settings | missing))
        logs.configure(self._settings.log_format)
        _warn_of_what_ray_does(given - settings.keys())
        self._bundles = {name: open_bundle(folder) for name, folder in models.items()}
        self._fatal: Exception | None = None
        self._reported = time.monotonic(), 0.0

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Ray Serve starts it and stops it, which drains it."""
        self._served = create_app(
            self._bundles, self._settings, on_loaded=process.settle, on_fatal=self._died
        )
        self._served.add_middleware(_OneRequestId)
        router = self._served.router
        router.lifespan_context = _with_operators_port(
            router.lifespan_context, self._settings, self._died
        )
        return self._served

    def _died(self, error: Exception) -> None:
        """Ends the process, so that nobody is sent to it; at the start, fails its health check.

        Ray Serve would need three checks to notice, and meanwhile prefer a replica that answers 503
        at once.
        """
        self._fatal = error
        if self._served.state.loading.done():
            _LOG.critical("%s", error)
            asyncio.get_running_loop().call_later(_LAST_REPLIES_SECONDS, os._exit, 1)

    async def check_health(self) -> None:
        """Ray Serve sends requests after the first of these.

        Raises:
            ConfigurationError, EngineDeadError and others: why this replica cannot go on.
        """
        await asyncio.shield(self._served.state.loading)
        if self._fatal is not None:
            raise self._fatal

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `seqloss.distributed.autoscaling` decides by: now, and since it was asked last."""
        models: ServedModels = self._served.state.models
        now = time.monotonic()
        busy = sum(runtime.busy_seconds for runtime in models.values())
        before, busy_before = self._reported
        self._reported = now, busy
        # A bundle that was loaded anew begins at 0.
        share = max(0.0, busy - busy_before) / max(now - before, 1e-9)
        return {
            QUEUE_TOKENS: sum(runtime.queue_tokens for runtime in models.values()),
            BUSY_SHARE: min(1.0, share),
        }


LossDeployment = serve.deployment(
    serve.ingress()(Replica),
    name="seqloss",
    # Our batcher wants to see all that waits; its queue of tokens is the limit.
    max_ongoing_requests=2000,
    health_check_period_s=_REPLICA_HEALTH_SECONDS,
    # A large body holds up the loop, and health checks with it.
    health_check_timeout_s=60,
    graceful_shutdown_wait_loop_s=0.5,
    # Bulk requests may wait for minutes, and whoever is not answered until then is cut off.
    graceful_shutdown_timeout_s=900,
)


def application(arguments: Arguments | dict[str, Any]) -> serve.Application:
    """What `serve deploy` and `serve run` deploy.

    Args:
        arguments: or what a file says of them, which Ray Serve hands on as it is.

    Raises:
        ValueError: they are not as they should be.
    """
    arguments = Arguments.model_validate(arguments)
    return LossDeployment.bind(arguments.models, arguments.settings)


class _OneRequestId:
    """Leaves the id of a request out of its reply: Ray Serve adds the same."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-ID"]
            await send(message)

        await self._app(scope, receive, send_without)


def _with_operators_port(
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[Any]],
    settings: Settings,
    on_death: Callable[[Exception], None],
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """The lifespan of an application, and around it a port that answers to its end."""

    @asynccontextmanager
    async def with_port(app: FastAPI) -> AsyncIterator[None]:
        first = settings.admin_port or 0
        ports = range(first, min(first + _OPERATORS_PORTS, _LAST_PORT + 1))
        listener = listen_for_operators(settings, ports)
        server = SecondServer.of(app)
        answering = asyncio.create_task(server.serve(sockets=[listener]))

        def on_end(_: asyncio.Task[None]) -> None:
            if not server.should_exit:
                on_death(RuntimeError("the port for operators answers no more"))

        answering.add_done_callback(on_end)
        try:
            async with lifespan(app):
                yield
        finally:
            server.should_exit = True
            await answering

    return with_port


def _refuse_what_ray_does(given: Set[str]) -> None:
    """Nothing that is set is silently of no effect.

    Raises:
        ConfigurationError: one of them is set.
    """
    for why, names in _RAYS.items():
        if found := sorted(names & given):
            raise ConfigurationError(f"{', '.join(found)}: {why}")


def _warn_of_what_ray_does(given: Set[str]) -> None:
    """An environment may be that of other programs too."""
    for why, names in _RAYS.items():
        for name in sorted(names & given):
            _LOG.warning("SEQLOSS_%s in the environment has no effect: %s", name.upper(), why)


def _assigned_threads() -> int | None:
    """On a machine without GPUs what a replica was given computes; None for what the engine finds.

    Torch would see it by itself, and ONNX Runtime would take the whole machine.
    """
    if not ray.is_initialized():
        return None
    assigned = ray.get_runtime_context().get_assigned_resources()
    return None if assigned.get("GPU") else max(1, int(assigned.get("CPU", 0)))
