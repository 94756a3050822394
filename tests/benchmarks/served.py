"""A bundle behind a real server, and how it is asked."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import orjson

from benchmarks.pairs import Pairs
from seqloss.records import Priority
from server import Server


class ServedBundle:
    """`seqloss serve` with one bundle, ready; a process of its own on a port of its own."""

    def __init__(self, bundle: Path, precision: str, threads: int, device: str = "cpu") -> None:
        os.environ["SEQLOSS_THREADS"] = str(threads)  # the server inherits it
        self._server = Server(f"bench={bundle}", "--device", device, "--precision", precision)
        try:
            with self._server.client() as client:
                self.address = str(client.base_url)
        except BaseException:
            self._server.process.kill()
            raise

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._server.process.pid

    def client(self) -> httpx.AsyncClient:
        """As many connections as there are requests, and as much time as they take."""
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.address, timeout=None, limits=limits)  # noqa: S113

    def close(self) -> None:
        """Ends the server; what it still holds is finished."""
        self._server.process.send_signal(signal.SIGTERM)
        self._server.exit_status()

    def __enter__(self) -> ServedBundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def loss_body(pairs: Pairs, priority: Priority, **more: Any) -> bytes:
    """The JSON of `POST /loss`."""
    ids = {"source_ids": pairs.source_ids, "target_ids": pairs.target_ids}
    return orjson.dumps({**ids, "priority": priority, **more})


async def post_loss(client: httpx.AsyncClient, body: bytes) -> bytes:
    """The JSON of the reply; raises where it is an error."""
    headers = {"Content-Type": "application/json"}
    reply = await client.post("/loss", headers=headers, content=body)
    reply.raise_for_status()
    return reply.content
