"""Files of lines, read and written as bytes, compressed as their names say."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

from seqloss_client.corpus.compression import compression_of, compressor
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus.lines import MAX_LINE_BYTES, LineSource

_LINES_AT_A_TIME = 10_000
_BLOCK_BYTES = 1024 * 1024


def read_lines(path: str) -> Generator[bytes, None, None]:
    r"""The lines of a file without their "\n"; `-` is the standard input.

    Raises:
        CorpusError: the file cannot be read, is damaged, or has a line of over a mebibyte.
    """
    source = LineSource(path)
    try:
        number = 0
        while count := source.fill(_LINES_AT_A_TIME):
            for line in source.take(count).split(b"\n")[:-1]:
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise CorpusError(
                        f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes"
                    )
                yield line
    finally:
        source.close()


def read_text_lines(path: str) -> Generator[str, None, None]:
    """As `read_lines`, in UTF-8.

    Raises:
        CorpusError: as above, or a line that is not UTF-8.
    """
    for number, line in enumerate(read_lines(path), 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{path}, line {number}: not UTF-8, byte {error.start} is {line[error.start]:#04x}"
            ) from None


class LineWriter:
    r"""Writes a file that is there once it is whole; `-` is the standard output.

    Args:
        path: what the file is called in the end; until then it has `.partial` behind its name.
            Pipes and devices are written as they are.

    Raises:
        CorpusError: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._compress = compressor(compression_of(path))
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._is_empty = True
        self._final = Path(path)
        self._partial = self._final.with_name(self._final.name + ".partial")
        self._is_stdout = path == "-"
        self._is_in_place = self._final.exists() and not self._final.is_file()
        if self._is_stdout:
            self._stream: IO[bytes] = sys.stdout.buffer
            return
        try:
            self._stream = (self._final if self._is_in_place else self._partial).open("wb")
        except OSError as error:
            raise CorpusError(f"{path} cannot be written: {error.strerror}") from error

    @property
    def has_lines(self) -> bool:
        """Whether anything was written."""
        return bool(self._waiting) or not self._is_empty

    def write(self, lines: Iterable[bytes]) -> None:
        r"""Adds lines, each with its "\n"."""
        for line in lines:
            self._waiting.append(line)
            self._waiting_bytes += len(line)
            if self._waiting_bytes >= _BLOCK_BYTES:
                self._flush()

    def _flush(self) -> None:
        # An empty file that is compressed has bytes, too.
        if self._waiting or self._is_empty:
            self._stream.write(self._compress(b"".join(self._waiting)))
        self._waiting, self._waiting_bytes, self._is_empty = [], 0, False

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        if self._is_stdout:
            self._stream.flush()
            return
        self._stream.close()
        if self._is_in_place:
            return
        if kind is None:
            self._partial.replace(self._final)
        else:
            self._partial.unlink()
