"""What a conversation with the service is made of; nothing here does any I/O.

A conversation is a generator: it yields what is to be done, is sent what came of it, and returns
the result. The blocking and the asynchronous client do what it asks for, each in its own way; when
to try again, and how long to wait, is decided in the conversation alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP reply; the names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """There was no reply.

    Attributes:
        detail: why, for people.
        is_timeout: whether it took too long.
        is_final: whether it would be the same again.
        cause: the error below.
    """

    detail: str
    is_timeout: bool = False
    is_final: bool = False
    cause: Exception | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """To be sent now.

    Attributes:
        request: what.
        reply_seconds: how long to wait for the reply.
    """

    request: Request
    reply_seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing is to be done for so long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Where time and chance come from; tests have their own.

    Attributes:
        clock: seconds, never going back.
        wall_clock: seconds since 1970, in UTC.
        random: numbers from 0 to 1.
        sleep: waits for so many seconds.
        async_sleep: likewise; None: `asyncio.sleep`.
    """

    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    random: Callable[[], float] = random.random
    sleep: Callable[[float], None] = time.sleep
    async_sleep: Callable[[float], Awaitable[None]] | None = None


Conversation = Generator[Attempt | Pause, Reply | Lost | None, _T]
