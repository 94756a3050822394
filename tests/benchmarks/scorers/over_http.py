"""seqloss as a service: a real server, and a client that makes and reads JSON beside it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence

import httpx
import orjson

from benchmarks.scoring import Scorer, Setting, Setup
from benchmarks.workload import Pairs
from seqloss.settings import load_settings
from server import Server

_REQUEST_PAIRS = 256
# So many requests are under way: the server never waits for the client.
_REQUESTS_AT_ONCE = 4


def make(setup: Setup, precision: str) -> Scorer:
    """A server that is ready."""
    return _OverHttp(setup, precision)


class _OverHttp:
    def __init__(self, setup: Setup, precision: str) -> None:
        os.environ["SEQLOSS_TORCH_THREADS"] = str(setup.threads)  # the server inherits it
        self._server = Server(f"bench={setup.bundle}", "--device", "cpu", "--precision", precision)
        try:
            with self._server.client() as client:
                address = client.base_url
        except BaseException:
            self._server.process.kill()
            raise
        self._runner = asyncio.Runner()
        self._client = httpx.AsyncClient(base_url=address, timeout=None)  # noqa: S113 - as long as it takes

    @property
    def pid(self) -> int:
        return self._server.process.pid

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
            reply = await self._client.post(
                "/loss",
                headers={"Content-Type": "application/json"},
                content=orjson.dumps(
                    {
                        "source_ids": pairs.source_ids,
                        "target_ids": pairs.target_ids,
                        "priority": "bulk",
                    }
                ),
            )
        reply.raise_for_status()
        body = orjson.loads(reply.content)
        return [nll / n for nll, n in zip(body["nlls"], body["num_tokens"], strict=True)]

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()
        self._server.process.send_signal(signal.SIGTERM)
        self._server.exit_status()
