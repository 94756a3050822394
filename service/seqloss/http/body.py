"""Reads a request's body: within the limit while it streams in, and again once decompressed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from io import BytesIO

import zstandard
from fastapi import Request

from seqloss.errors import MalformedBodyError, RequestTooLargeError, UnsupportedMediaTypeError


async def read_json_body(request: Request, max_bytes: int) -> bytes:
    """The decompressed body.

    Raises:
        UnsupportedMediaTypeError: it is not JSON, or compressed in a way not known here.
        RequestTooLargeError: it is larger than `max_bytes`, as sent or decompressed.
        MalformedBodyError: it does not decompress.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaTypeError(
            f"the content type {media_type!r} is not read here; send application/json"
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in _DECODERS:
        raise UnsupportedMediaTypeError(
            f"the content encoding {encoding!r} is not read here; these are: {', '.join(_DECODERS)}"
        )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    try:
        decoded = _DECODERS[encoding](bytes(body), max_bytes)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise MalformedBodyError(f"the body is not {encoding}: {error}") from error
    if len(decoded) > max_bytes:
        raise _too_large(max_bytes)
    return decoded


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"the body is over the limit of {max_bytes} bytes; split it")


def _inflate(window_bits: int) -> Callable[[bytes, int], bytes]:
    def decode(body: bytes, max_bytes: int) -> bytes:
        decompressor = zlib.decompressobj(window_bits)
        decoded = decompressor.decompress(body, max_bytes + 1)
        if not decompressor.eof and len(decoded) <= max_bytes:
            raise EOFError("it ends too early")
        return decoded

    return decode


def _zstd(body: bytes, max_bytes: int) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(BytesIO(body)) as reader:
        return reader.read(max_bytes + 1)


# Each stops at one byte more than is allowed: a bomb never unfolds.
_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "identity": lambda body, _: body,
    "gzip": _inflate(zlib.MAX_WBITS | 16),
    "deflate": _inflate(zlib.MAX_WBITS),
    "zstd": _zstd,
}
