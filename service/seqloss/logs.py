"""The log: lines for people, or a JSON object on each line for programs.

Lines are written by a thread of their own.  Whoever reads them may stop to read, a terminal that is
scrolled or a collector that is stuck; the service goes on, and says later how many lines it lost.
"""

from __future__ import annotations

import atexit
import json
import logging
import queue
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import orjson

# What a line has beside its message: `_LOG.info("...", extra={FIELDS: {...}})`.
FIELDS = "seqloss_fields"

# Some 5 MB of lines that wait for a reader.
_MOST_WAITING = 10_000
_PAUSE_SECONDS = 0.1
# At the end nobody is waited for any longer.
_LAST_SECONDS = 2.0


def configure(log_format: Literal["text", "json"]) -> None:
    """Has everything that is logged from `INFO` on go to standard error."""
    handler = WaitingLines(sys.stderr)
    handler.setFormatter(TextFormatter() if log_format == "text" else JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class WaitingLines(logging.Handler):
    """Formats at once and writes on a thread; what does not fit meanwhile is counted."""

    def __init__(self, stream: TextIO, most_waiting: int = _MOST_WAITING) -> None:
        super().__init__()
        self._stream = stream
        self._most_waiting = most_waiting
        # One that a signal's handler may put into while its thread does.
        self._lines: queue.SimpleQueue[str | threading.Event | None] = queue.SimpleQueue()
        self._num_lost = 0
        self._counting = threading.RLock()
        self._thread = threading.Thread(target=self._write, name="seqloss-log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def emit(self, record: logging.LogRecord) -> None:
        """Never waits."""
        try:
            line = self.format(record)
        except Exception:  # what is logged is no reason to fail
            self.handleError(record)
            return
        if self._lines.qsize() >= self._most_waiting:
            with self._counting:
                self._num_lost += 1
            return
        self._lines.put(line)

    def _missing(self, num_lost: int) -> str:
        """What is said before the next line."""
        if not num_lost:
            return ""
        message = f"{num_lost} lines of the log were lost: nobody read them"
        told = logging.LogRecord(__name__, logging.WARNING, "", 0, message, (), None)
        return f"{self.format(told)}\n"

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            told = self._num_lost
            try:
                if isinstance(line, str):
                    self._stream.write(f"{self._missing(told)}{line}\n")
                    with self._counting:
                        self._num_lost -= told
                if self._lines.empty():
                    self._stream.flush()
            except (BrokenPipeError, ValueError):
                return  # the reader is gone, or the stream closed, and with it who could be told
            except OSError:  # a full disk, or a reader that is slow: maybe not for ever
                with self._counting:
                    self._num_lost += 1
                time.sleep(_PAUSE_SECONDS)
            if isinstance(line, threading.Event):
                line.set()

    def flush(self) -> None:
        """Waits until what was logged is written, for as long as somebody reads it."""
        if self._thread.is_alive():
            written = threading.Event()
            self._lines.put(written)
            written.wait(_LAST_SECONDS)

    def close(self) -> None:
        """Writes what waits, for as long as somebody reads it."""
        atexit.unregister(self.close)
        self._lines.put(None)
        self._thread.join(_LAST_SECONDS)
        super().close()


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, then the fields as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """Without what was raised, which follows."""
        fields = getattr(record, FIELDS, {})
        return " ".join(
            [super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())]
        )


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, message, then the fields that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """Without the newline."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except orjson.JSONEncodeError:  # a file's name that is not UTF-8, for example
            return json.dumps(line, default=str)
