"""How much of what the device computes is padding."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from benchmarks.progress import say
from benchmarks.served import ServedBundle
from benchmarks.serving.clients import BulkLoad, PairStream, keep_asking, keep_full, meanwhile
from benchmarks.serving.figures import Figure, PartResult, Row, Wanted
from benchmarks.serving.scrape import Scrape, Watch, padded_over_real, until_idle
from benchmarks.serving.workbench import Workbench

_BULK, _MIXED = "bulk alone", "interactive clients beside bulk"
_NUM_CLIENTS = 32


def measure(bench: Workbench) -> PartResult:
    """Padded tokens over real ones, both sides together, as the service's own metric counts them.

    Pairs have the lengths of real sentences. Bulk: one client keeps four requests of 2,048 pairs
    under way. Mixed: 32 interactive clients, each of which asks again when it is answered, beside
    the bulk client; half of them send single pairs, half two to sixteen pairs. What sources are
    rounded up to, where a graph needs that, is counted apart, as grid.
    """
    stream = PairStream(bench.model.limits)
    with bench.model.serve() as served:
        rises = asyncio.run(_phases(bench, served, stream))
    return PartResult(
        name="padding",
        about=measure.__doc__ or "",
        columns=(
            "load",
            "real tokens",
            "padded over real",
            "of sources",
            "of targets",
            "grid over real",
            "pairs per batch",
        ),
        rows=[_row(name, rise) for name, rise in rises.items()],
        figures=[
            Figure(f"padded over real, {name}", padded_over_real(rise), Wanted("at most", bound))
            for (name, rise), bound in zip(rises.items(), (1.10, 1.30), strict=True)
        ],
    )


async def _phases(bench: Workbench, served: ServedBundle, stream: PairStream) -> dict[str, Scrape]:
    """What the counters rose by under each load."""
    async with served.client() as client:

        async def watched(name: str, loads: Sequence[Coroutine[Any, Any, None]]) -> Scrape:
            say(f"padding: {name}")
            async with meanwhile(*loads):
                await asyncio.sleep(bench.plan.warm_up_seconds)
                async with Watch(client) as watch:
                    await asyncio.sleep(bench.plan.seconds)
            await until_idle(client)
            return watch.window.rise

        def bulk() -> Coroutine[Any, Any, None]:
            return keep_full(client, stream, BulkLoad())

        return {
            _BULK: await watched(_BULK, [bulk()]),
            _MIXED: await watched(_MIXED, [bulk(), keep_asking(client, stream, _NUM_CLIENTS)]),
        }


def _row(name: str, rise: Scrape) -> Row:
    real = rise.total("seqloss_tokens_total", kind="real")
    return Row(
        name,
        (
            real,
            padded_over_real(rise),
            padded_over_real(rise, side="source"),
            padded_over_real(rise, side="target"),
            rise.total("seqloss_tokens_total", kind="grid") / real,
            rise.total("seqloss_batch_pairs_sum") / rise.total("seqloss_batch_pairs_count"),
        ),
    )
