"""What every request gets, whatever its path."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seqloss.metrics import Metrics
from seqloss.scorer import Times

_LOG = logging.getLogger(__name__)

OnBug = Callable[[Request, Exception], Awaitable[Response]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_PROBES = frozenset(
    {"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/metrics"}
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request that was answered; times are seconds of the monotonic clock.

    Attributes:
        request_id: in its reply.
        method: of HTTP, or `other`.
        route: its path with the names of parameters, or `unmatched`.
        status: of the reply; empty where nobody was left to reply to.
        started: its headers were there.
        finished: the last byte of its reply was handed on.
        headers: of the request.
        facts: what may be told of it: tenant, model, priority and counts; no ids, texts or keys.
        timings: seconds by stage, as in `Server-Timing`.
        parsed: when parsing began and ended; None where it did not come to that.
        times: of its pairs; None where none were scored.
    """

    request_id: str
    method: str
    route: str
    status: str
    started: float
    finished: float
    headers: Headers
    facts: Mapping[str, Any]
    timings: Mapping[str, float]
    parsed: tuple[float, float] | None
    times: Times | None

    @property
    def is_probe(self) -> bool:
        """Whether it is one of those that come every few seconds from who watches the service."""
        return self.route in _PROBES


OnDone = Callable[[RequestRecord], None]


class RequestMiddleware:
    """Sets `X-Request-ID` and `Server-Timing`, observes the duration, and answers for bugs.

    Handlers find the id in `request.state.request_id`, the time of arrival on the monotonic clock
    in `request.state.started`, and leave behind what `RequestRecord` has of it: seconds in
    `timings`, `facts`, `parsed` and `times`.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, on_bug: OnBug, on_done: tuple[OnDone, ...] = ()
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._on_bug = on_bug
        self._on_done = on_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        # Only harmless ids are taken over: they are written to logs.
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        timings: dict[str, float] = {}
        state = scope.setdefault("state", {})
        state.update(
            request_id=request_id,
            timings=timings,
            started=started,
            facts={},
            parsed=None,
            times=None,
        )
        status = ""

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                total = {"total": time.monotonic() - started}
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
            record = RequestRecord(
                request_id,
                scope["method"] if scope["method"] in _METHODS else "other",
                getattr(scope.get("route"), "path", "unmatched"),
                status,
                started,
                time.monotonic(),
                headers,
                state["facts"],
                timings,
                state["parsed"],
                state["times"],
            )
            self._metrics.http_request_duration.labels(record.route, record.method, status).observe(
                record.finished - started
            )
            for tell in self._on_done:
                try:
                    tell(record)
                except Exception:  # it is answered: what is told of it is no reason to fail
                    _LOG.exception("request %s could not be told of", request_id)
