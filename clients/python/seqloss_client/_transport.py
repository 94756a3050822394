"""Between httpx and the conversations; what both clients share of it."""

from __future__ import annotations

import os

import httpx

from seqloss_client._steps import Attempt, Lost, Reply

# Longer than a lost packet takes to be sent again, twice.
_CONNECT_SECONDS = 10.0

CAUGHT = (httpx.TransportError, httpx.DecodingError)
"""What httpx raises where there is no reply."""

_SAME_AGAIN = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)


def key_headers(api_key: str | None) -> dict[str, str]:
    """What tells the service who asks: the key that is given, or that of the environment."""
    key = os.environ.get("SEQLOSS_API_KEY") if api_key is None else api_key
    return {"Authorization": f"Bearer {key}"} if key else {}


def timeout_of(attempt: Attempt) -> httpx.Timeout:
    """How long httpx may wait for each thing."""
    seconds = attempt.reply_seconds
    return httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))


def lost(error: Exception) -> Lost:
    """Why there is no reply."""
    is_timeout = isinstance(error, httpx.TimeoutException)
    # Without a connection nothing was asked, so nothing is late.
    is_late = is_timeout and not isinstance(error, httpx.ConnectTimeout)
    return Lost(
        detail=str(error) or type(error).__name__,
        is_timeout=is_late,
        is_final=isinstance(error, _SAME_AGAIN),
        cause=error,
    )


def reply_of(response: httpx.Response) -> Reply:
    """What the conversation reads."""
    return Reply(response.status_code, response.headers, response.content)
