"""Who asks: an API key becomes a tenant before anything of a request is read."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from seqloss.errors import AuthenticationError
from seqloss.http.problems import response_to
from seqloss.tenants import Tenant, Tenants

# Whoever looks after the process has no key.
_OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"})


class KeyMiddleware:
    """Puts the tenant in `request.state.tenant`, or answers 401."""

    def __init__(self, app: ASGIApp, tenants: Callable[[], Tenants]) -> None:
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in _OPEN_PATHS:
            tenant = Tenant()
        else:
            try:
                tenant = self._tenants().of_key(_key_of(Headers(scope=scope)))
            except AuthenticationError as error:
                response = await response_to(Request(scope), error)
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        scope["state"]["tenant"] = tenant
        scope["state"]["facts"]["tenant"] = tenant.name
        await self._app(scope, receive, send)


def _key_of(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get("x-api-key")
