"""The application behind a socket: from binding to the last answer."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from seqloss.bundle.reader import Bundle
from seqloss.errors import ConfigurationError, SeqlossError
from seqloss.http.app import create_admin_app, create_app
from seqloss.http.connections import ConnectionConfig
from seqloss.models import ServedModels
from seqloss.process import settle
from seqloss.settings import Settings

_LOG = logging.getLogger(__name__)

# After the drain only requests that never arrived whole are left.
_STRAGGLERS_SECONDS = 2
# Which wait in the kernel to be accepted; it may hold fewer.
_WAITING_CONNECTIONS = 2048


def serve(bundles: Mapping[str, Bundle], settings: Settings) -> bool:
    """Serves until a signal comes or a model cannot go on.

    A signal that ended it is raised again, as uvicorn does.

    Returns:
        Whether all models could go on.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    fatal: list[Exception] = []

    def stop(error: Exception) -> None:
        _LOG.critical("%s", error)
        fatal.append(error)
        server.should_exit = True

    tls = _tls_of(settings)
    listener = listen(settings.host, [settings.port], "https" if tls else "http")
    app = create_app(bundles, settings, on_loaded=settle, on_fatal=stop)
    server = _DrainingServer(_config(app, settings, **tls), app.state.models)
    second = None
    if settings.admin_port is not None:
        second = SecondServer.of(app), listen_for_operators(settings, [settings.admin_port])
    gc.disable()  # until all is loaded: it would walk over Torch many times, and find nothing
    try:
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(_serve(server, listener, second, app.state.reload))
    finally:
        gc.enable()
    return not fatal


def _config(app: FastAPI, settings: Settings, **more: Any) -> ConnectionConfig:
    return ConnectionConfig(
        app,
        receive_timeout_seconds=settings.receive_timeout_seconds,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_STRAGGLERS_SECONDS,
        **more,
    )


async def _serve(
    server: _DrainingServer,
    listener: socket.socket,
    second: tuple[SecondServer, socket.socket] | None,
    reload: Callable[[], Awaitable[Mapping[str, str]]],
) -> None:
    """Both ports; the second one goes on answering until the first is done."""
    reloads: set[asyncio.Task[None]] = set()

    async def reload_and_say() -> None:
        try:
            outcomes = await reload()
        except SeqlossError as error:
            _LOG.error("nothing was reloaded: %s", error)
        else:
            said = ", ".join(f"{name} {outcome}" for name, outcome in outcomes.items())
            _LOG.info("reloaded: %s", said)

    def on_hangup() -> None:
        task = asyncio.ensure_future(reload_and_say())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    with suppress(NotImplementedError, AttributeError):  # there is no such signal on Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)
    if second is None:
        await server.serve(sockets=[listener])
        return
    second_server, its_listener = second
    answering = asyncio.create_task(second_server.serve(sockets=[its_listener]))

    def on_end(_: asyncio.Task[None]) -> None:
        if not second_server.should_exit:
            _LOG.critical("the second port answers no more")
            server.should_exit = True

    answering.add_done_callback(on_end)
    try:
        await server.serve(sockets=[listener])
    finally:
        second_server.should_exit = True
        await answering


class SecondServer(uvicorn.Server):
    """The port for operators: leaves signals to the first server, and ends when that one has."""

    @classmethod
    def of(cls, app: FastAPI) -> SecondServer:
        """Health, metrics and reloads of an application."""
        return cls(_config(create_admin_app(app), app.state.settings, lifespan="off"))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class _DrainingServer(uvicorn.Server):
    """Drains the models while connections are open.

    uvicorn alone cuts off waiting requests when its time is over, and tells the application last.
    Here the models refuse new requests and finish the admitted ones, or answer them with 503 when
    the drain's time is over; health and metrics go on answering meanwhile.  A second signal ends it
    at once.
    """

    def __init__(self, config: uvicorn.Config, models: ServedModels) -> None:
        super().__init__(config)
        self._models = models
        self._draining: asyncio.Future[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Raises the signal again once all that was logged is written: that ends the process."""
        with super().capture_signals():
            try:
                yield
            finally:
                for handler in logging.getLogger().handlers:
                    handler.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal."""
        _LOG.info("got %s", signal.Signals(sig).name)
        if self.should_exit:
            self.force_exit = True
            if self._draining is not None:
                self._draining.get_loop().call_soon_threadsafe(self._draining.cancel)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept, a few at a time, while many may wait for that."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_WAITING_CONNECTIONS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains, then closes what is left."""
        self._draining = asyncio.ensure_future(self._models.drain())
        with suppress(asyncio.CancelledError):
            await self._draining
        await super().shutdown(sockets)


def _tls_of(settings: Settings) -> dict[str, Any]:
    """What uvicorn needs for TLS; nothing where it is not asked for."""
    certificate, key = settings.tls_certificate_file, settings.tls_key_file
    if certificate is None and key is None:
        return {}
    if certificate is None or key is None:
        missing = "tls_certificate_file" if certificate is None else "tls_key_file"
        raise ConfigurationError(f"TLS needs a certificate and its key; {missing} is missing")
    try:

        def no_passphrase() -> str:
            raise ValueError("the key has a passphrase, and nobody is here to type it")

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, no_passphrase)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"TLS cannot be had with {certificate} and {key}: {error}"
        ) from error
    return {"ssl_certfile": certificate, "ssl_keyfile": key}


def listen_for_operators(settings: Settings, ports: Sequence[int]) -> socket.socket:
    """As `listen`, on the second port."""
    return listen(settings.admin_host, ports, purpose="for operators")


def listen(
    host: str, ports: Sequence[int], scheme: str = "http", purpose: str = "listening"
) -> socket.socket:
    """Binds before anything is loaded: an address in use is said at once.

    Args:
        host: an address or a name of this machine.
        ports: the first that is free is taken; 0 is any.
        scheme: for the log.
        purpose: for the log.

    Raises:
        ConfigurationError: there is no such address, or none of the ports is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        # asyncio switches off Nagle's algorithm where a socket says that it is TCP: else the end of
        # a reply waits for the client's delayed acknowledgement, 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_WAITING_CONNECTIONS)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE and port != ports[-1]:
                continue
            tried = f"port {port}" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]}"
            raise ConfigurationError(
                f"cannot listen on {host} {tried}: {error.strerror or error}; give another host "
                "or port"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        _LOG.info("%s on %s://%s:%d", purpose, scheme, shown, listener.getsockname()[1])
        return listener
    raise ValueError("no port was given to listen on. This is a bug.")
