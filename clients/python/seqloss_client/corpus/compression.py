"""Files that are compressed as their names say, read and written as streams."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from seqloss_client.corpus.errors import CorpusError

_SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
# One block's text takes no longer at these than it takes to be scored.
_LEVEL = 6
_ZSTD_LEVEL = 3
# So little at a time, so that what it expands to is bounded too.
_ZSTD_INPUT_BYTES = 4096

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What streams of `decompressed` raise where a file is cut off or damaged."""


def compression_of(path: str) -> str | None:
    """`gzip`, `bzip2`, `xz`, `zstd`, or None, by the end of a name."""
    return _SUFFIXES.get(Path(path).suffix.lower())


def without_compression(path: str) -> str:
    """The end of a name such as `.tsv` that says a format, in lower case; `""` without one."""
    name = Path(path)
    return (Path(name.stem) if compression_of(path) else name).suffix.lower()


def decompressed(raw: IO[bytes], compression: str | None) -> IO[bytes]:
    """A stream of what the file holds; it raises one of `READ_ERRORS` where the end is missing."""
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[return-value]
    if compression == "bzip2":
        return bz2.BZ2File(raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
    if compression == "zstd":
        return io.BufferedReader(_ZstdFile(raw))
    return raw


def compressor(compression: str | None) -> Callable[[bytes], bytes]:
    """Makes a member of its own of each block: the same bytes whenever and in whatever run.

    Members that follow each other are a valid file in all four formats.
    """
    if compression == "gzip":
        return lambda data: gzip.compress(data, _LEVEL, mtime=0)
    if compression == "bzip2":
        return bz2.compress
    if compression == "xz":
        return lambda data: lzma.compress(data, preset=_LEVEL)
    if compression == "zstd":
        zstd = _zstandard().ZstdCompressor(level=_ZSTD_LEVEL)
        return lambda data: bytes(zstd.compress(data))
    return lambda data: data


def _zstandard() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise CorpusError(
            "zstd needs zstandard: pip install 'seqloss-client[compression]'"
        ) from error


class _ZstdFile(io.RawIOBase):
    """Frames that follow each other; unlike zstandard's own reader it misses a missing end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._zstandard = _zstandard()
        self._raw = raw
        self._frame: Any = None
        self._compressed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = self._raw.read(_ZSTD_INPUT_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._ready = self._frame.decompress(self._compressed)
        except self._zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
