"""One pair after the other through HTTP, from one client."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from benchmarks.gpu.results import Latency
from benchmarks.served import loss_body, post_loss
from benchmarks.serving.clients import PairStream
from benchmarks.serving.workbench import Bundled

_WARM_UP_REQUESTS = 10


def latency_of(bundled: Bundled, num_requests: int) -> Latency:
    """Of a server that has nothing else to do."""
    pairs = PairStream(bundled.limits).take(_WARM_UP_REQUESTS + num_requests)
    bodies = [loss_body(pairs.part(row, row + 1), "interactive") for row in range(len(pairs))]
    with bundled.serve() as served:

        async def asked() -> list[float]:
            seconds = []
            async with served.client() as client:
                for body in bodies:
                    started = time.perf_counter()
                    await post_loss(client, body)
                    seconds.append(time.perf_counter() - started)
            return seconds[_WARM_UP_REQUESTS:]

        p50, p95 = np.percentile(asyncio.run(asked()), [50, 95]).tolist()
    return Latency(num_requests, p50, p95)
