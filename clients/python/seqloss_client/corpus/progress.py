"""What a person who waits is told: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

_BAR_SECONDS = 0.2
_LINE_SECONDS = 30.0
_BAR_WIDTH = 24


class ProgressDisplay:
    """Rates are of this run alone, and time left goes by how much of the input is read.

    Args:
        size: of the input, in what positions count; None where nobody knows.
        is_quiet: whether nothing is shown.
        stream: where it goes.
        clock: seconds.
    """

    def __init__(
        self,
        size: int | None,
        *,
        is_quiet: bool = False,
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size = size
        self._stream = stream
        self._clock = clock
        self._is_quiet = is_quiet
        self._is_terminal = stream.isatty()
        self._started = self._shown = clock()
        self._first_position: int | None = None
        self._num_pairs = self._num_tokens = 0
        self._width = 0

    def start(self, position: int) -> None:
        """What lies before was done by an earlier run."""
        self._first_position = position

    def add(self, num_pairs: int, num_tokens: int, position: int, num_pairs_done: int) -> None:
        """A block is done.

        Args:
            num_pairs: in it.
            num_tokens: in it, of both sides.
            position: of its end in the input.
            num_pairs_done: by earlier runs too.
        """
        self._num_pairs += num_pairs
        self._num_tokens += num_tokens
        now = self._clock()
        if now - self._shown >= (_BAR_SECONDS if self._is_terminal else _LINE_SECONDS):
            self._shown = now
            self._show(self._line(now, position, num_pairs_done))

    def pairs_per_second(self) -> float:
        """Of this run."""
        return self._num_pairs / max(self._clock() - self._started, 1e-9)

    def close(self) -> None:
        """Leaves the terminal to others."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()

    def _line(self, now: float, position: int, num_pairs_done: int) -> str:
        seconds = max(now - self._started, 1e-9)
        line = (
            f"{num_pairs_done:,} pairs, {self._num_pairs / seconds:,.0f} pairs/s, "
            f"{self._num_tokens / seconds:,.0f} tokens/s"
        )
        if not self._size:
            return line
        share = min(position / self._size, 1.0)
        first = self._first_position or 0
        left = seconds * (self._size - position) / max(position - first, 1)
        bar = ""
        if self._is_terminal:
            filled = round(share * _BAR_WIDTH)
            bar = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] "
        return f"{bar}{share:.0%}, {line}, {_clock_time(left)} left"

    def _show(self, line: str) -> None:
        if self._is_quiet:
            return
        if self._is_terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + line.ljust(self._width))
            self._width = max(self._width, len(line))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
