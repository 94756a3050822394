"""What asks the server: clients that keep it busy, and clients that come when they like.

They are light: bodies are random ids with the lengths of real sentences, and replies are not read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from benchmarks.pairs import SEED, Pairs, sentence_lengths
from benchmarks.served import loss_body, post_loss

# So many lengths are drawn; then they come again, with other ids.
_NUM_LENGTHS = 50_000
# Of every vocabulary here the first two ids and the last one may be special.
_NUM_SPECIAL_IDS = 2


@dataclass(frozen=True, slots=True)
class IdLimits:
    """What ids and lengths a model takes."""

    vocabulary: int
    max_tokens: int


class PairStream:
    """Pairs without end: lengths of sentences, random ids; the same ones for the same limits."""

    def __init__(self, limits: IdLimits) -> None:
        self._limits = limits
        self._generator = np.random.default_rng(SEED)
        self.lengths_from, lengths = sentence_lengths(_NUM_LENGTHS)
        self._lengths = np.minimum(lengths, limits.max_tokens).astype(int)
        self._place = 0

    @property
    def tokens_per_pair(self) -> float:
        """Both sides together, on average."""
        return float(self._lengths.sum(axis=1).mean())

    def take(self, num_pairs: int) -> Pairs:
        """The next ones."""
        places = np.arange(self._place, self._place + num_pairs) % len(self._lengths)
        self._place += num_pairs
        sources, targets = self._lengths[places].T
        return Pairs(self.rows(sources.tolist()), self.rows(targets.tolist()))

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Random ids in rows of these lengths."""
        ids = self._generator.integers(_NUM_SPECIAL_IDS, self._limits.vocabulary - 1, sum(lengths))
        values, rows, start = ids.tolist(), [], 0
        for length in lengths:
            rows.append(values[start : start + length])
            start += length
        return rows


@dataclass(frozen=True, slots=True)
class BulkLoad:
    """Requests of so many pairs, so many of them under way at any time."""

    request_pairs: int = 2048
    requests_at_once: int = 4


async def keep_full(client: httpx.AsyncClient, stream: PairStream, load: BulkLoad) -> None:
    """A bulk client: sends its next request when one is answered, until it is cancelled."""

    async def send() -> None:
        while True:
            await post_loss(client, loss_body(stream.take(load.request_pairs), "bulk"))

    async with asyncio.TaskGroup() as group:
        for _ in range(load.requests_at_once):
            group.create_task(send())


async def keep_asking(client: httpx.AsyncClient, stream: PairStream, num_clients: int) -> None:
    """Interactive clients, each of which waits for its answer; half of them send single pairs.

    The requests of the others have two to sixteen pairs.
    """

    async def send(generator: random.Random, *, single: bool) -> None:
        while True:
            pairs = stream.take(1 if single else generator.randint(2, 16))
            await post_loss(client, loss_body(pairs, "interactive"))

    async with asyncio.TaskGroup() as group:
        for number in range(num_clients):
            group.create_task(send(random.Random(number), single=number % 2 == 0))


@asynccontextmanager
async def meanwhile(*loads: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs loads that never end until the block does; where one fails, the block does too."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(load) for load in loads]
        yield
        for task in tasks:
            task.cancel()


async def scored_in_parts(client: httpx.AsyncClient, bodies: Sequence[bytes], at_once: int) -> None:
    """Sends every body once, so many of them under way at any time."""
    left = iter(bodies)

    async def send() -> None:
        for body in left:
            await post_loss(client, body)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(send())


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times between 0 and `seconds` at which a Poisson process of `rate` per second has events."""
    generator = random.Random(seed)
    arrivals: list[float] = []
    now = generator.expovariate(rate)
    while now < seconds:
        arrivals.append(now)
        now += generator.expovariate(rate)
    return arrivals


async def open_loop(
    ask: Callable[[int], Awaitable[object]], arrivals: Sequence[float]
) -> list[float]:
    """Asks at the given times, whether or not earlier answers have come.

    A closed loop would ask less often while the server is slow, and so miss what is slow.

    Args:
        ask: sends the request of this number, and waits for its answer.
        arrivals: seconds from now, rising.

    Returns:
        Seconds from each intended arrival to its answer: being late counts.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def asked(number: int) -> float:
        await ask(number)
        return loop.time() - started - arrivals[number]

    async with asyncio.TaskGroup() as group:
        tasks = []
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(started + arrival - loop.time())
            tasks.append(group.create_task(asked(number)))
    return [task.result() for task in tasks]


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
