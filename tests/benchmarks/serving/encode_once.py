"""What it gains that a source with many targets is encoded once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from statistics import median

from benchmarks.operations import encode_once_gain
from benchmarks.pairs import Pairs
from benchmarks.progress import say
from benchmarks.served import ServedBundle, loss_body, post_loss
from benchmarks.serving.clients import PairStream
from benchmarks.serving.figures import Figure, PartResult, Row, Wanted
from benchmarks.serving.workbench import Workbench

_NUM_SOURCES, _NUM_CANDIDATES = 64, 16
_TARGET_TOKENS = 24
_TIMES_AS_LONG = (1, 8)


def measure(bench: Workbench) -> PartResult:
    """64 sources with 16 candidates each, against 1,024 pairs whose sources all differ.

    Both are one bulk request with the same targets of 24 ids. All sources have the same length: as
    long as the targets, then 8 times as long. The one and the other are sent in turn, and timed by
    the client from the first byte to the last. The gain is the ratio of their times, the median
    over rounds. What to expect of it is the ratio of their operations: only the encoder's are
    saved, since the graph computes the cross-attention's keys and values of every target anew.
    """
    stream = PairStream(bench.model.limits)
    rows: list[Row] = []
    figures: list[Figure] = []
    samples: dict[str, list[float]] = {}
    with bench.model.serve() as served:
        for times in _TIMES_AS_LONG:
            length = min(times * _TARGET_TOKENS, bench.model.limits.max_tokens)
            seconds = asyncio.run(_rounds(served, _bodies(stream, length), bench.plan.rounds))
            gains = [a / b for a, b in zip(seconds["distinct"], seconds["shared"], strict=True)]
            expected = encode_once_gain(bench.shape, length, _TARGET_TOKENS, _NUM_CANDIDATES)
            name = f"sources of {length} ids"
            rows.append(
                Row(
                    name,
                    (
                        median(seconds["distinct"]),
                        median(seconds["shared"]),
                        expected,
                        median(gains),
                        median(gains) / expected,
                    ),
                )
            )
            figures.append(
                Figure(
                    f"measured gain over expected gain, {name}",
                    median(gains) / expected,
                    Wanted("at least", 0.9),
                )
            )
            samples |= {f"{name}, {kind}, seconds": values for kind, values in seconds.items()}
    return PartResult(
        name="encode_once",
        about=measure.__doc__ or "",
        columns=("", "distinct s", "shared s", "expected gain", "measured gain", "ratio"),
        rows=rows,
        figures=figures,
        samples=samples,
    )


def _bodies(stream: PairStream, source_tokens: int) -> Mapping[str, bytes]:
    count = _NUM_SOURCES * _NUM_CANDIDATES
    targets = stream.rows([_TARGET_TOKENS] * count)
    shared = Pairs(stream.rows([source_tokens] * _NUM_SOURCES), targets)
    source_index = [target // _NUM_CANDIDATES for target in range(count)]
    return {
        "distinct": loss_body(Pairs(stream.rows([source_tokens] * count), targets), "bulk"),
        "shared": loss_body(shared, "bulk", source_index=source_index),
    }


async def _rounds(
    served: ServedBundle, bodies: Mapping[str, bytes], num_rounds: int
) -> dict[str, list[float]]:
    """Seconds of each body, one per round; before them comes a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    async with served.client() as client:
        for number in range(num_rounds + 1):
            say(f"encode_once: round {number} of {num_rounds}")
            for name, body in bodies.items():
                started = time.perf_counter()
                await post_loss(client, body)
                seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}
