"""How long it takes from nothing to answers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.progress import say
from benchmarks.served import loss_body, post_loss
from benchmarks.serving.clients import PairStream
from benchmarks.serving.figures import Figure, PartResult, Row, Wanted
from benchmarks.serving.scrape import scraped
from benchmarks.serving.workbench import Bundled, Workbench

_POLL_SECONDS = 0.1
# Compilers take a dozen.
_LONGEST_KERNELS_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds since the process was started; `kernels` is None where none came within a minute."""

    ready: float
    answer: float
    kernels: float | None


def measure(bench: Workbench) -> PartResult:
    """Seconds from the start of the process until it is ready, has answered a pair, has kernels.

    Cold is with no compiled kernels in the cache: Torch's own operators answer until there are.
    Warm is with those that the cold start has left. The bundle and the libraries are in the
    system's cache of files. Cold and warm take turns, and medians count.
    """
    cold: list[Start] = []
    warm: list[Start] = []
    for number in range(bench.plan.rounds):
        say(f"start: round {number + 1} of {bench.plan.rounds}")
        with _empty_cache():
            cold.append(_start(bench.model))
            warm.append(_start(bench.model))
    return PartResult(
        name="start",
        about=measure.__doc__ or "",
        columns=("kernels' cache", "ready s", "first answer s", "kernels s"),
        rows=[_row("cold", cold), _row("warm", warm)],
        figures=[
            Figure(f"ready, {name}, s", median(start.ready for start in found), wanted)
            for name, found, wanted in (
                ("cold", cold, Wanted("at most", 60)),
                ("warm", warm, Wanted("at most", 5)),
            )
        ],
        samples={
            f"{name}, ready, seconds": [start.ready for start in found]
            for name, found in (("cold", cold), ("warm", warm))
        },
    )


def _row(name: str, starts: list[Start]) -> Row:
    kernels = [start.kernels for start in starts if start.kernels is not None]
    return Row(
        name,
        (
            median(start.ready for start in starts),
            median(start.answer for start in starts),
            median(kernels) if kernels else None,
        ),
    )


@contextmanager
def _empty_cache() -> Iterator[None]:
    """Of kernels, for the servers that are started meanwhile."""
    before = os.environ.get("SEQLOSS_CACHE_DIR")
    with TemporaryDirectory() as folder:
        os.environ["SEQLOSS_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["SEQLOSS_CACHE_DIR"]
            if before is not None:
                os.environ["SEQLOSS_CACHE_DIR"] = before


def _start(bundled: Bundled) -> Start:
    body = loss_body(PairStream(bundled.limits).take(1), "interactive")
    started = time.perf_counter()
    with bundled.serve() as served:
        ready = time.perf_counter() - started

        async def asked() -> tuple[float, float | None]:
            async with served.client() as client:
                await post_loss(client, body)
                answer = time.perf_counter() - started
                while not (await scraped(client)).total("seqloss_compiled_kernels"):
                    if time.perf_counter() - started > _LONGEST_KERNELS_SECONDS:
                        return answer, None
                    await asyncio.sleep(_POLL_SECONDS)
                return answer, time.perf_counter() - started

        return Start(ready, *asyncio.run(asked()))
