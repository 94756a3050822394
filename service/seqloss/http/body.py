"""Reads a request's body: within the limit while it streams in, and again once decompressed."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Protocol

import zstandard
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from seqloss.errors import (
    BodyTimeoutError,
    MalformedBodyError,
    RequestTooLargeError,
    UnsupportedMediaTypeError,
)
from seqloss.settings import Settings

# Each member costs a copy of what follows it: a million empty ones would take hours.
_MOST_MEMBERS = 100


async def read_json_body(request: Request, settings: Settings) -> bytes:
    """The decompressed body of a request that says that it is JSON; see `read_body`."""
    return await read_body(request, settings, ("application/json",))


async def read_body(request: Request, settings: Settings, media_types: tuple[str, ...]) -> bytes:
    """The decompressed body.

    Args:
        request: whose body was not read yet.
        settings: the limits.
        media_types: what it may say that it is, in lower case; "" where it may say nothing.

    Raises:
        UnsupportedMediaTypeError: it is something else, or compressed in a way not known here.
        RequestTooLargeError: it is larger than `max_body_bytes`, as sent or decompressed.
        BodyTimeoutError: it takes longer than `receive_timeout_seconds` to arrive.
        MalformedBodyError: it does not decompress.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in media_types:
        raise UnsupportedMediaTypeError(
            f"the content type {media_type!r} is not read here; send "
            + " or ".join(filter(None, media_types))
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity" and encoding not in _DECODERS:
        raise UnsupportedMediaTypeError(
            f"the content encoding {encoding!r} is not read here; these are: {', '.join(_DECODERS)}"
        )
    try:
        async with asyncio.timeout(settings.receive_timeout_seconds):
            body = await _received(request, settings.max_body_bytes)
    except TimeoutError as error:
        raise BodyTimeoutError(
            f"the body took longer than {settings.receive_timeout_seconds:g} seconds to arrive; "
            "send less at a time"
        ) from error
    if encoding == "identity":
        return body
    try:
        return await run_in_threadpool(_decoded, body, encoding, settings.max_body_bytes)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise MalformedBodyError(f"the body is not {encoding}: {error}") from error


async def _received(request: Request, max_bytes: int) -> bytes:
    """The body as sent."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body is over the limit of {max_bytes} bytes; split it")


def _decoded(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """All members or frames of the body, one after the other; a bomb never unfolds."""
    decoded = bytearray()
    for _ in range(_MOST_MEMBERS):
        decoder = _DECODERS[encoding]()
        decoded += decoder.decompress(body, max_bytes + 1 - len(decoded))
        if len(decoded) > max_bytes:
            raise _too_large(max_bytes)
        if not decoder.eof:
            raise EOFError("it ends too early")
        body = decoder.unused_data
        if not body:
            return bytes(decoded)
    raise MalformedBodyError(
        f"the body has more than {_MOST_MEMBERS} {encoding} members; compress it as one"
    )


class _Decoder(Protocol):
    """What zlib's decompressors are: one member, at most so many bytes of it."""

    @property
    def eof(self) -> bool:
        """Whether the member was whole."""

    @property
    def unused_data(self) -> bytes:
        """What follows it."""

    def decompress(self, body: bytes, max_length: int, /) -> bytes:
        """The member, or its beginning."""


class _ZstdDecoder:
    """The reader stops at a limit, the decompressor knows whether a frame is whole: ask both."""

    eof = True
    unused_data = b""

    def decompress(self, body: bytes, max_length: int, /) -> bytes:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            decoded = reader.read(max_length)
        if len(decoded) == max_length:
            return decoded
        decoder = zstandard.ZstdDecompressor().decompressobj()
        decoded = decoder.decompress(body)
        self.eof, self.unused_data = decoder.eof, decoder.unused_data
        return decoded


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    "gzip": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "deflate": lambda: zlib.decompressobj(zlib.MAX_WBITS),
    "zstd": _ZstdDecoder,
}
