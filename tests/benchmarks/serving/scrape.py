"""The service's own metrics, as a scraper sees them."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of `GET /metrics`, by name and labels."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def of(cls, text: str) -> Scrape:
        """Reads Prometheus's text format."""
        return cls(
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        )

    def since(self, earlier: Scrape) -> Scrape:
        """How much every counter rose."""
        return Scrape({key: n - earlier.samples.get(key, 0.0) for key, n in self.samples.items()})

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples with at least these labels; 0 where there is none."""
        wanted = labels.items()
        return sum(n for (have, of), n in self.samples.items() if have == name and wanted <= of)

    def quantile(self, share: float, name: str, **labels: str) -> float:
        """Of a histogram, even within its buckets, as Prometheus's `histogram_quantile` has it."""
        counts: dict[float, float] = {}
        wanted = labels.items()
        for (have, of), count in self.samples.items():
            if have == f"{name}_bucket" and wanted <= of:
                bound = float(dict(of)["le"])
                counts[bound] = counts.get(bound, 0.0) + count
        rank = share * counts.get(math.inf, 0.0)
        lower, below = 0.0, 0.0
        for bound in sorted(counts):
            if counts[bound] >= rank > 0:
                if bound == math.inf:
                    return lower
                return lower + (bound - lower) * (rank - below) / (counts[bound] - below)
            lower, below = bound, counts[bound]
        return math.nan


def padded_over_real(rise: Scrape, **side: str) -> float:
    """Tokens with padding, without those of the grid, over tokens."""
    real = rise.total("seqloss_tokens_total", kind="real", **side)
    padding = rise.total("seqloss_tokens_total", kind="padding", **side)
    return (real + padding) / real


@dataclass(frozen=True, slots=True)
class Window:
    """What counters rose by in so many seconds."""

    rise: Scrape
    seconds: float


async def scraped(client: httpx.AsyncClient) -> Scrape:
    """The metrics as they are now."""
    reply = await client.get("/metrics")
    reply.raise_for_status()
    return Scrape.of(reply.text)


class Watch:
    """Counts from its entry to its end: `async with Watch(client) as watch: ...`."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._window: Window | None = None

    async def __aenter__(self) -> Watch:
        self._before, self._started = await scraped(self._client), time.perf_counter()
        return self

    async def __aexit__(self, *_: object) -> None:
        after = await scraped(self._client)
        self._window = Window(after.since(self._before), time.perf_counter() - self._started)

    @property
    def window(self) -> Window:
        """What was counted, once it is over."""
        if self._window is None:
            raise RuntimeError("This is a bug. The watch is not over.")
        return self._window


async def until_idle(client: httpx.AsyncClient) -> None:
    """Waits until nothing waits, and the last batch is over."""
    num_batches = -1.0
    while True:
        now = await scraped(client)
        waiting = now.total("seqloss_queue_pairs") + now.total("seqloss_inflight_requests")
        if not waiting and now.total("seqloss_batches_total") == num_batches:
            return
        num_batches = now.total("seqloss_batches_total")
        await asyncio.sleep(_POLL_SECONDS if waiting else 10 * _POLL_SECONDS)
