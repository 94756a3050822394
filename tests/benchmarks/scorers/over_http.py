"""seqloss as a service: a real server, and a client that makes and reads JSON beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import orjson

from benchmarks.pairs import Pairs
from benchmarks.scoring import Scorer, Setting, Setup
from benchmarks.served import ServedBundle, loss_body, post_loss
from seqloss.bundle.manifest import EngineName
from seqloss.settings import load_settings

_REQUEST_PAIRS = 256
# So many requests are under way: the server never waits for the client.
_REQUESTS_AT_ONCE = 4


def make(setup: Setup, engine: EngineName, precision: str) -> Scorer:
    """A server that is ready."""
    return _OverHttp(setup, engine, precision)


class _OverHttp:
    def __init__(self, setup: Setup, engine: EngineName, precision: str) -> None:
        self._served = ServedBundle(setup.bundles[engine], precision, setup.threads)
        self._runner = asyncio.Runner()
        self._client = self._served.client()

    @property
    def pid(self) -> int:
        return self._served.pid

    @property
    def candidates(self) -> Sequence[Setting]:
        return [
            {
                "max_batch_tokens": load_settings().max_batch_tokens,
                "request_pairs": _REQUEST_PAIRS,
                "requests_at_once": _REQUESTS_AT_ONCE,
            }
        ]

    def use(self, setting: Setting) -> None:
        """There is but one."""

    def score(self, pairs: Pairs) -> list[float]:
        return self._runner.run(self._scored(pairs))

    async def _scored(self, pairs: Pairs) -> list[float]:
        free = asyncio.Semaphore(_REQUESTS_AT_ONCE)
        parts = [
            pairs.part(start, start + _REQUEST_PAIRS)
            for start in range(0, len(pairs), _REQUEST_PAIRS)
        ]
        scored = await asyncio.gather(*(self._posted(part, free) for part in parts))
        return [mean for means in scored for mean in means]

    async def _posted(self, pairs: Pairs, free: asyncio.Semaphore) -> list[float]:
        async with free:
            reply = await post_loss(self._client, loss_body(pairs, "bulk"))
        body = orjson.loads(reply)
        return [nll / n for nll, n in zip(body["nlls"], body["num_tokens"], strict=True)]

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()
        self._served.close()
