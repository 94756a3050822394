"""`seqloss serve` with an engine that fails in a chosen way, as a program of its own.

    python tests/faulty_service.py FAULT

It says `tasks: N` whenever it gets SIGUSR1.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable

from fakes import FakeEngine, fake_bundle
from seqloss import cli
from seqloss.bundle import reader
from seqloss.errors import EngineDeadError, OutOfMemoryError
from seqloss.http import server
from seqloss.http.app import create_app
from seqloss.records import Batch, TokenTerms

_LOG = logging.getLogger("faulty")

# So that requests meet: the fake model alone would be done before the next one comes.
_SECONDS_PER_BATCH = 0.01


def healthy(_: Batch) -> None:
    """Computes."""
    time.sleep(_SECONDS_PER_BATCH)


def out_of_memory(batch: Batch) -> None:
    """Does not fit now and then, whatever the batch; a single pair always does."""
    time.sleep(_SECONDS_PER_BATCH)
    if len(batch.decoder_input_ids) > 1 and random.random() < 0.4:
        raise OutOfMemoryError("not now")


def slow(_: Batch) -> None:
    """Takes its time."""
    time.sleep(0.3)


def bug(_: Batch) -> None:
    """Raises what nobody foresaw."""
    raise RuntimeError("a bug")


class Countdown:
    """Fails for good after some batches."""

    def __init__(self, num_batches: int, end: Callable[[], None]) -> None:
        self._left = num_batches
        self._end = end

    def __call__(self, batch: Batch) -> None:
        healthy(batch)
        self._left -= 1
        if self._left < 0:
            self._end()


def _die() -> None:
    raise EngineDeadError("the device failed: an illegal memory access")


def _hang() -> None:
    while True:
        time.sleep(3600)


FAULTS: dict[str, Callable[[], Callable[[Batch], TokenTerms | None]]] = {
    "healthy": lambda: healthy,
    "out-of-memory": lambda: out_of_memory,
    "slow": lambda: slow,
    "bug": lambda: bug,
    "dies": lambda: Countdown(10, _die),
    "hangs": lambda: Countdown(10, _hang),
}


def main(fault: str) -> int:
    """Runs `seqloss serve` with the faulty engine in place of a bundle's."""
    engine = FakeEngine(FAULTS[fault]())
    engine.batches = deque(maxlen=1)  # type: ignore[assignment]  # it serves for hours
    server.create_app = functools.partial(create_app, load=lambda *_: engine)  # type: ignore[attr-defined]
    reader.open_bundle = lambda _: fake_bundle()

    def tell(*_: object) -> None:
        _LOG.info("tasks: %d", len(asyncio.all_tasks(asyncio.get_running_loop())))

    signal.signal(signal.SIGUSR1, tell)
    return cli.main(["serve", "fake=nowhere", "--port", "0"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
