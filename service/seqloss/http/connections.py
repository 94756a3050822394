"""Connections that end: a client that sends or reads too slowly loses its own.

uvicorn bounds how long a connection idles between two requests, and nothing else: whoever sends a
byte now and then, or never reads a reply, keeps a connection as long as he likes.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

# asyncio accepts so many before it looks at any of them, and closes an aborted one only some
# rounds later: without a bound a burst would take all files before there is a chance to make room.
_ACCEPTED_AT_ONCE = 16
# Those, and files that are not connections: bundles, the device, the listener, pipes.
_OTHER_FILES = 128
# Each may cost some 100 kB of buffers before the application sees a request.
_MOST_CONNECTIONS = 4096


class ConnectionConfig(uvicorn.Config):
    """uvicorn's configuration, with bounds on connections.

    Args:
        app: the application.
        receive_timeout_seconds: how long a connection may take to bring a request's headers, from
            its opening or the reply before, and how long to take in that reply.
        max_connections: beyond it the connection that has waited for its client longest is closed
            for a new one. None: what the limit on open files leaves.
        **rest: as for uvicorn.
    """

    def __init__(
        self,
        app: Any,
        *,
        receive_timeout_seconds: float,
        max_connections: int | None = None,
        **rest: Any,
    ) -> None:
        # An upgrade would take the connection out of these bounds. asyncio's loop whatever else is
        # installed: what these bounds count on was tried there.
        super().__init__(
            app, http=BoundedProtocol, loop="asyncio", ws="none", backlog=_ACCEPTED_AT_ONCE, **rest
        )
        self.receive_timeout_seconds = receive_timeout_seconds
        self.max_connections = max_connections or _default_max_connections()
        self.connections: dict[BoundedProtocol, None] = {}
        """All that are open, the one whose last reply (or opening) is longest ago first."""


def _default_max_connections() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(1, min(files - _OTHER_FILES, _MOST_CONNECTIONS))


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 within the bounds of a `ConnectionConfig`."""

    config: ConnectionConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._expiry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Makes room where there is none."""
        super().connection_made(transport)
        config = self.config
        if len(config.connections) >= config.max_connections:
            waiting = (one for one in config.connections if one._waits_for_client())
            # Where all are being answered, it is the new one that has to come again.
            next(waiting, self)._abort()
        if not transport.is_closing():
            self._begin_to_wait()

    def on_response_complete(self) -> None:
        """The client has its time once more, for the next request."""
        # First: uvicorn goes on with what was sent ahead.
        if not self.transport.is_closing():
            self._begin_to_wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._forget()
        super().connection_lost(exc)

    def _begin_to_wait(self) -> None:
        self._forget()
        self.config.connections[self] = None
        self._expiry = self.loop.call_later(self.config.receive_timeout_seconds, self._on_expiry)

    def _forget(self) -> None:
        self.config.connections.pop(self, None)
        if self._expiry is not None:
            self._expiry.cancel()

    def _on_expiry(self) -> None:
        """Ends a connection without a request, or with a reply that nobody reads.

        A request under way has bounds of its own, and begins a new wait when it is answered.
        """
        has_no_request = self.cycle is None or self.cycle.response_complete
        if has_no_request or self.transport.get_write_buffer_size():
            self._abort()

    def _waits_for_client(self) -> bool:
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _abort(self) -> None:
        """Unlike `close` it does not wait for the client to read what is left."""
        self._forget()
        self.transport.abort()
