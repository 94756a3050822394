"""How the service is: for those who run it."""

from __future__ import annotations

import answers
import inside
from panels import Board

SERVICE = Board(
    "seqloss-service",
    "seqloss: the service",
    "Traffic, latency, the queue, batches, what goes wrong, and the process.",
    labels=(
        ("job", "seqloss_ready"),
        ("instance", "seqloss_ready{@job}"),
        ("model", "seqloss_ready{@process}"),
    ),
    rows=(*answers.ROWS, *inside.ROWS),
)
