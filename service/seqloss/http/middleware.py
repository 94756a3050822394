"""Gives each request an id, times it, and counts it.

Plain ASGI: Starlette's BaseHTTPMiddleware hides from a handler that its client went away.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seqloss.metrics import Metrics

OnBug = Callable[[Request, Exception], Awaitable[Response]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestMiddleware:
    """Sets `X-Request-ID` and `Server-Timing`, observes the duration, and answers for bugs.

    Handlers find the id in `request.state.request_id`, the time of arrival on the performance
    counter in `request.state.started`, and add what they timed, in seconds, to
    `request.state.timings`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, on_bug: OnBug) -> None:
        self._app = app
        self._metrics = metrics
        self._on_bug = on_bug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        # Only harmless ids are taken over: they are written to logs.
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        timings: dict[str, float] = {}
        scope.setdefault("state", {}).update(
            request_id=request_id, timings=timings, started=started
        )
        status = ""

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                total = {"total": time.perf_counter() - started}
                headers["Server-Timing"] = ", ".join(
                    f"{name};dur={seconds * 1000:.3f}"
                    for name, seconds in (timings | total).items()
                )
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if status:  # half a reply is out: only closing the connection can say that it broke
                raise
            response = await self._on_bug(Request(scope), error)
            await response(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http_request_duration.labels(route, method, status).observe(
                time.perf_counter() - started
            )
