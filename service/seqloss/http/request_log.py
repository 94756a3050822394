"""A line for each request: who asked, of what, how it ended, how long it took."""

from __future__ import annotations

import logging
from typing import Any

from seqloss.http.middleware import RequestRecord
from seqloss.logs import FIELDS

_LOG = logging.getLogger("seqloss.requests")


def log_request(record: RequestRecord) -> None:
    """Counts and times, never ids, texts or keys: facts hold none."""
    if record.is_probe:
        return
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": record.method,
        "route": record.route,
        "status": int(record.status) if record.status else None,
        **record.facts,
    }
    seconds = {**record.timings, "total": record.finished - record.started}
    fields |= {f"{name}_ms": round(value * 1000, 3) for name, value in seconds.items()}
    _LOG.info("answered", extra={FIELDS: fields})
