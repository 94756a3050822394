"""The log: lines for people, or a JSON object on each line for programs."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

# What a line has beside its message: `_LOG.info("...", extra={FIELDS: {...}})`.
FIELDS = "seqloss_fields"


def configure(log_format: Literal["text", "json"]) -> None:
    """Has everything that is logged from `INFO` on go to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if log_format == "text" else JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


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
        return orjson.dumps(line, default=str).decode()
