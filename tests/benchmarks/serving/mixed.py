"""Interactive requests beside bulk: how long they wait, and what bulk pays for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.pairs import SEED
from benchmarks.progress import say
from benchmarks.served import ServedBundle, loss_body, post_loss
from benchmarks.serving.clients import (
    BulkLoad,
    PairStream,
    keep_full,
    meanwhile,
    open_loop,
    percentile,
    poisson_arrivals,
)
from benchmarks.serving.figures import Figure, PartResult, Row, Wanted
from benchmarks.serving.scrape import Watch, Window, until_idle
from benchmarks.serving.workbench import Workbench
from seqloss.settings import load_settings

_SHARE_OF_CAPACITY = 0.05
# Pairs are computed in the order of their lengths, and short ones cost more per token: all lengths
# have to come round several times in each phase.
_BULK = BulkLoad(request_pairs=128, requests_at_once=4)
_PERCENTILES = (0.5, 0.95, 0.99)
_BATCH = "seqloss_batch_duration_seconds"


@dataclass(frozen=True, slots=True)
class _Interactive:
    """What interactive requests had: the latency of each in seconds, and tokens of them all."""

    latencies: list[float]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Phase:
    """What one load gave: to interactive requests, and by the server's counters."""

    interactive: _Interactive
    window: Window

    @property
    def bulk_tokens_per_second(self) -> float:
        """Tokens that the model computed, without padding, less the interactive ones.

        Requests are so large that counting answered ones would be coarse; and pairs are computed in
        the order of their lengths, so that some seconds have more of them than others.
        """
        computed = self.window.rise.total("seqloss_tokens_total", kind="real")
        return (computed - self.interactive.num_tokens) / self.window.seconds

    def batch_seconds(self, share: float) -> float:
        """A percentile of the time that the device took for a batch."""
        return self.window.rise.quantile(share, _BATCH, stage="forward")

    def row(self, name: str, *, has_bulk: bool) -> Row:
        """Of the part's table."""
        asked = self.interactive.latencies
        return Row(
            name,
            (
                len(asked) or None,
                *(1000 * percentile(asked, share) if asked else None for share in _PERCENTILES),
                self.bulk_tokens_per_second if has_bulk else None,
                1000 * self.batch_seconds(0.5),
                1000 * self.batch_seconds(0.95),
            ),
        )


def measure(bench: Workbench) -> PartResult:
    """Single interactive pairs that come as they like, alone and beside a bulk client.

    First the bulk client alone, which keeps four requests of 128 pairs under way: its rate is
    the capacity. Then interactive requests of one pair, whose arrivals are a Poisson process at 5%
    of the capacity in pairs, alone and beside the bulk client. The loop is open: requests are
    sent at their times, whether or not earlier ones are answered, and latency counts from the
    intended time. A request may find a bulk batch under way, which lasts at most `max_block_ms` by
    the server's estimate, and one more batch before its own: the bound is the 95th percentile of
    the latencies alone, and `max_block_ms`, and the median time of a batch beside bulk (of the
    server's histogram, even within its buckets). Bulk should keep 80% of its tokens per second.
    """
    stream = PairStream(bench.model.limits)
    with bench.model.serve() as served:
        bulk, idle, mixed = asyncio.run(_phases(bench, served, stream))
    bound = (
        percentile(idle.interactive.latencies, 0.95)
        + _max_block_seconds()
        + mixed.batch_seconds(0.5)
    )
    kept = mixed.bulk_tokens_per_second / bulk.bulk_tokens_per_second
    return PartResult(
        name="mixed",
        about=measure.__doc__ or "",
        columns=(
            "load",
            "interactive requests",
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "bulk tokens/s",
            "batch p50 ms",
            "batch p95 ms",
        ),
        rows=[
            bulk.row("bulk alone", has_bulk=True),
            idle.row("interactive alone", has_bulk=False),
            mixed.row("both", has_bulk=True),
        ],
        figures=[
            Figure(
                "p95 beside bulk, ms",
                1000 * percentile(mixed.interactive.latencies, 0.95),
                Wanted("at most", 1000 * bound),
            ),
            Figure("bulk's kept share", kept, Wanted("at least", 0.8)),
        ],
        samples={
            "interactive alone, seconds": idle.interactive.latencies,
            "interactive beside bulk, seconds": mixed.interactive.latencies,
        },
    )


def _max_block_seconds() -> float:
    """The server's, which has the same environment."""
    return load_settings().max_block_ms / 1000


async def _phases(
    bench: Workbench, served: ServedBundle, stream: PairStream
) -> tuple[_Phase, _Phase, _Phase]:
    """Bulk alone, interactive alone, both."""
    plan = bench.plan
    async with served.client() as client:

        async def bulk() -> None:
            await keep_full(client, stream, _BULK)

        say("mixed: bulk alone")
        async with meanwhile(bulk()):
            await asyncio.sleep(plan.warm_up_seconds)
            async with Watch(client) as watch:
                await asyncio.sleep(plan.seconds)
        capacity = _Phase(_Interactive([], 0), watch.window)
        rate = _SHARE_OF_CAPACITY * capacity.bulk_tokens_per_second / stream.tokens_per_pair
        await until_idle(client)

        async def interactive(seconds: float, seed: int) -> _Interactive:
            arrivals = poisson_arrivals(rate, seconds, seed)
            singles = [stream.take(1) for _ in arrivals]
            bodies = [loss_body(pairs, "interactive") for pairs in singles]
            latencies = await open_loop(lambda number: post_loss(client, bodies[number]), arrivals)
            return _Interactive(latencies, sum(pairs.num_tokens for pairs in singles))

        say(f"mixed: interactive alone, {rate:.3g} requests per second")
        await interactive(plan.warm_up_seconds, SEED)
        idle = await _watched(client, interactive(plan.seconds, SEED + 1))
        say("mixed: both")
        async with meanwhile(bulk()):
            await interactive(plan.warm_up_seconds, SEED)
            both = await _watched(client, interactive(plan.seconds, SEED + 1))
        return capacity, idle, both


async def _watched(
    client: httpx.AsyncClient, interactive: Coroutine[Any, Any, _Interactive]
) -> _Phase:
    async with Watch(client) as watch:
        asked = await interactive
    return _Phase(asked, watch.window)
