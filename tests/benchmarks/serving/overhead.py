"""What is lost between the engine and the client."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from statistics import median

import numpy as np

from benchmarks.pairs import Pairs, sorted_batches
from benchmarks.processes import Worker
from benchmarks.progress import say
from benchmarks.served import loss_body
from benchmarks.serving.clients import PairStream, scored_in_parts
from benchmarks.serving.figures import Figure, PartResult, Row, Wanted
from benchmarks.serving.workbench import Bundled, Workbench
from seqloss.bundle.reader import open_bundle
from seqloss.engines.loader import load_engine
from seqloss.records import Batch, Ragged, shift_right
from seqloss.settings import load_settings

_REQUESTS_AT_ONCE = 4
_MOST_REQUEST_PAIRS = 2048
# The demo model is so much faster.
_DEMO_TIMES_MORE = 16
# Threads that computed last spin a while before they sleep.
_PAUSE_SECONDS = 0.3


def measure(bench: Workbench) -> PartResult:
    """Pairs per second through `POST /loss`, over those of the engine alone.

    The engine runs in a process of its own, on batches that were made beforehand: sorted by the
    lengths of targets and sources, filled up to the padded tokens that the server's batches have.
    The client sends the same pairs in their given order, in bulk requests of which four are under
    way; bodies are made beforehand, and replies are not read. Both run in turn; ratios are of the
    same round, and their median counts. Once on the demo model, once on the one that is asked for.
    """
    demo_pairs = _DEMO_TIMES_MORE * bench.plan.pairs
    rows: list[Row] = []
    figures: list[Figure] = []
    samples: dict[str, list[float]] = {}
    for bundled, num_pairs in ((bench.demo, demo_pairs), (bench.model, bench.plan.pairs)):
        pairs = PairStream(bundled.limits).take(num_pairs)
        direct, over_http = _rounds(bundled, pairs, bench.plan.rounds)
        share = median(a / b for a, b in zip(direct, over_http, strict=True))
        rows.append(
            Row(
                bundled.name,
                (num_pairs, num_pairs / median(direct), num_pairs / median(over_http), share),
            )
        )
        figures.append(
            Figure(f"service over engine, {bundled.name}", share, Wanted("at least", 0.9))
        )
        samples[f"{bundled.name}, engine, seconds"] = direct
        samples[f"{bundled.name}, service, seconds"] = over_http
    return PartResult(
        name="overhead",
        about=measure.__doc__ or "",
        columns=("model", "pairs", "engine pairs/s", "service pairs/s", "ratio"),
        rows=rows,
        figures=figures,
        samples=samples,
    )


def _rounds(bundled: Bundled, pairs: Pairs, num_rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the engine alone and of the service, one per round."""
    request_pairs = min(_MOST_REQUEST_PAIRS, -(-len(pairs) // _REQUESTS_AT_ONCE))
    bodies = [
        loss_body(pairs.part(start, start + request_pairs), "bulk")
        for start in range(0, len(pairs), request_pairs)
    ]
    direct, over_http = [], []
    with bundled.serve() as served, Worker(partial(DirectTask, bundled, pairs)) as worker:

        async def sent() -> float:
            async with served.client() as client:
                started = time.perf_counter()
                await scored_in_parts(client, bodies, _REQUESTS_AT_ONCE)
                return time.perf_counter() - started

        worker.warm_up()
        asyncio.run(sent())
        for number in range(num_rounds):
            say(f"overhead: {bundled.name}, round {number + 1} of {num_rounds}")
            time.sleep(_PAUSE_SECONDS)
            direct.append(worker.run())
            time.sleep(_PAUSE_SECONDS)
            over_http.append(asyncio.run(sent()))
    return direct, over_http


class DirectTask:
    """The engine on batches that were made beforehand, in its worker process."""

    def __init__(self, bundled: Bundled, pairs: Pairs) -> None:
        bundle = open_bundle(bundled.bundle)
        settings = load_settings()
        self._engine = load_engine(bundle, bundled.device, bundled.precision, bundled.threads)
        start = bundle.manifest.special_ids.decoder_start
        self._batches = [
            _batch_of(pairs, rows, start)
            for rows in sorted_batches(pairs, settings.max_batch_tokens, settings.max_batch_pairs)
        ]

    def warm_up(self) -> None:
        """Runs once."""
        self.run()

    def run(self) -> float:
        """Seconds of all batches."""
        started = time.perf_counter()
        for batch in self._batches:
            self._engine.score(batch)
        return time.perf_counter() - started

    def close(self) -> None:
        """Frees the device."""
        self._engine.close()


def _batch_of(pairs: Pairs, rows: list[int], start: int) -> Batch:
    """What the engine takes; every pair has a source of its own, and all its tokens count."""
    targets = Ragged.from_rows([pairs.target_ids[row] for row in rows], np.int32)
    return Batch(
        sources=Ragged.from_rows([pairs.source_ids[row] for row in rows], np.int32),
        source_row=np.arange(len(rows), dtype=np.int32),
        decoder_input_ids=shift_right(targets, np.full(len(rows), start)),
        labels=targets.values,
        counted=np.ones(len(targets.values), np.bool_),
    )
