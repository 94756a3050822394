"""What a person who waits is told."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)
