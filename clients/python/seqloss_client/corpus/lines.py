"""Lines of a file of any size: only a block of them is in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from seqloss_client.corpus.compression import READ_ERRORS, compression_of, decompressed
from seqloss_client.corpus.errors import CorpusError

MAX_LINE_BYTES = 1024 * 1024
"""A longer line is a bad pair, and is not kept: a file without a line end must not fill memory."""

MAX_BLOCK_BYTES = 2 * 1024 * 1024
"""A block ends before it, however few lines it has: several blocks are under way at once."""

_READ_BYTES = 256 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def open_input(path: str) -> IO[bytes]:
    """A file, or the standard input for `-`, not yet decompressed."""
    if path == "-":
        # Unbuffered, as files are: a pipe gives what it has.
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    try:
        return Path(path).open("rb", buffering=0)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error


class LineSource:
    r"""Takes lines from a file, from its beginning to its end.

    Lines end with "\n" and nothing else. The last one may lack it. A byte order mark at the
    beginning is no text. Of a line over `MAX_LINE_BYTES` one byte more than that is kept, so that
    it can be told.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_taken = 0
        compression = compression_of(path)
        self._is_compressed = compression is not None
        self._raw = open_input(path)
        self._stream = decompressed(self._raw, compression)
        self._blob = b""
        self._ends: npt.NDArray[np.int64] = np.empty(0, np.int64)  # after each line end in the blob
        self._taken_bytes = 0
        self._is_dropping = False
        self._is_at_start = True
        self._is_at_end = False

    @property
    def size(self) -> int | None:
        """The file's bytes on disk; None for a pipe."""
        path = Path(self.path)
        return path.stat().st_size if self.path != "-" and path.is_file() else None

    @property
    def position(self) -> int:
        """How far it is read, in bytes as `size` counts them."""
        return self._raw.tell() if self._is_compressed and self.size else self._taken_bytes

    def fill(self, num_lines: int) -> int:
        """Reads ahead.

        Returns:
            How many lines there are to take: `num_lines`, or fewer where they would be over
            `MAX_BLOCK_BYTES`, or where the file ends; 0 at its end. It depends on what the file
            holds alone, not on how it arrives.
        """
        if self._is_at_start:
            self._is_at_start = False
            self._append(self._first_bytes().removeprefix(_BYTE_ORDER_MARK))
        while not self._is_at_end and len(self._ends) < num_lines:
            if len(self._blob) >= MAX_BLOCK_BYTES:
                break
            self._append(self._read())
        within = int(np.searchsorted(self._ends, MAX_BLOCK_BYTES, side="right"))
        return min(num_lines, within)

    def take(self, num_lines: int) -> bytes:
        """The next lines, each with its end; `fill` has said that they are there."""
        end = int(self._ends[num_lines - 1])
        lines, self._blob = self._blob[:end], self._blob[end:]
        self._ends = self._ends[num_lines:] - end
        self._taken_bytes += end
        self.num_taken += num_lines
        return lines

    def num_lines(self) -> int:
        """Reads to the end: how many lines the file has."""
        while count := self.fill(10**6):
            self.take(count)
        return self.num_taken

    def close(self) -> None:
        """The standard input stays open."""
        if self.path != "-":
            self._stream.close()
            self._raw.close()

    def _first_bytes(self) -> bytes:
        """At least as many as a byte order mark has, where there are so many."""
        first = b""
        while len(first) < len(_BYTE_ORDER_MARK) and not self._is_at_end:
            first += self._read()
        return first

    def _read(self) -> bytes:
        try:
            data = self._stream.read(_READ_BYTES)
        except READ_ERRORS as error:
            raise CorpusError(
                f"{self.path} is damaged, or cut off, after line {self._num_read}: {error}"
            ) from error
        self._is_at_end = not data
        return data

    @property
    def _num_read(self) -> int:
        return self.num_taken + len(self._ends)

    def _append(self, data: bytes) -> None:
        """Adds what was read; nothing read is the end of the file."""
        if self._is_dropping:
            end = data.find(b"\n")
            data = b"" if end < 0 else data[end:]
            self._is_dropping = end < 0 and not self._is_at_end
        last = int(self._ends[-1]) if len(self._ends) else 0
        tail = self._blob[last:] + data
        if self._is_at_end and tail and not tail.endswith(b"\n"):
            tail += b"\n"
        ends = _line_ends(tail)
        if self._longest(ends, len(tail)) > MAX_LINE_BYTES + 2:
            tail = self._cut(tail)
            ends = _line_ends(tail)
        self._blob = self._blob[:last] + tail
        self._ends = np.concatenate([self._ends, ends + last])

    def _longest(self, ends: npt.NDArray[np.int64], size: int) -> int:
        bounds = np.concatenate([[0], ends, [size]])
        return int(np.diff(bounds).max())

    def _cut(self, blob: bytes) -> bytes:
        """Without the rest of lines that are too long, one of which may not have ended yet."""
        *lines, rest = blob.split(b"\n")
        self._is_dropping = len(rest) > MAX_LINE_BYTES
        kept = [line[: MAX_LINE_BYTES + 1] for line in (*lines, rest)]
        return b"\n".join(kept)


def _line_ends(blob: bytes) -> npt.NDArray[Any]:
    return np.flatnonzero(np.frombuffer(blob, np.uint8) == ord("\n")) + 1
