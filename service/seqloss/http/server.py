"""The application behind a socket: from binding to the last answer."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

import uvicorn

from seqloss.bundle.reader import Bundle
from seqloss.errors import ConfigurationError
from seqloss.http.app import create_app
from seqloss.http.connections import ConnectionConfig
from seqloss.runtime import LossRuntime
from seqloss.settings import Settings

_LOG = logging.getLogger(__name__)

# After the drain only requests that never arrived whole are left.
_STRAGGLERS_SECONDS = 2
# Which wait in the kernel to be accepted; it may hold fewer.
_WAITING_CONNECTIONS = 2048
# Of Python's threads, each until the next one may run.
_SWITCH_SECONDS = 0.0005


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

    listener = _listen(settings.host, settings.port)
    app = create_app(bundles, settings, on_loaded=_settle, on_fatal=stop)
    config = ConnectionConfig(
        app,
        receive_timeout_seconds=settings.receive_timeout_seconds,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_STRAGGLERS_SECONDS,
    )
    server = _DrainingServer(config, app.state.models)
    server.run(sockets=[listener])
    return not fatal


class _DrainingServer(uvicorn.Server):
    """Drains the models while connections are open.

    uvicorn alone cuts off waiting requests when its time is over, and tells the application last.
    Here the models refuse new requests and finish the admitted ones, or answer them with 503 when
    the drain's time is over; health and metrics go on answering meanwhile.  A second signal ends it
    at once.
    """

    def __init__(self, config: uvicorn.Config, models: Mapping[str, LossRuntime]) -> None:
        super().__init__(config)
        self._models = models
        self._draining: asyncio.Future[list[None]] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal."""
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
        self._draining = asyncio.gather(*(runtime.drain() for runtime in self._models.values()))
        with suppress(asyncio.CancelledError):
            await self._draining
        await super().shutdown(sockets)


def _settle() -> None:
    """What was loaded stays, and threads take turns quickly.

    Without the first, parsing a large body takes three times as long: each of its many lists brings
    on collections that walk over all of Torch.  Without the second, the device's thread waits up to
    5 ms for the interpreter after each operator that it has started: 1.03 to 1.09 times as many
    pairs of a small model are scored.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_SECONDS)


def _listen(host: str, port: int) -> socket.socket:
    """Binds before anything is loaded: an address in use is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches off Nagle's algorithm where a socket says that it is TCP: else the end of a
    # reply waits for the client's delayed acknowledgement, 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another --host "
            "or --port"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    _LOG.info("listening on http://%s:%d", shown, listener.getsockname()[1])
    return listener
