"""Requests of every kind, so that there is something to see of everything."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx
from troubled_service import NOT_FINITE, SLOW

from tensor_bodies import pack, tensors_of


def ids(generator: random.Random, num_pairs: int, length: int) -> dict[str, Any]:
    """As many pairs as told, none of which has a label that means trouble."""

    def rows() -> list[list[int]]:
        return [
            [generator.randrange(3, SLOW) for _ in range(generator.randint(1, length))]
            for _ in range(num_pairs)
        ]

    return {"source_ids": rows(), "target_ids": rows()}


def ask_a_sound_service(client: httpx.Client, generator: random.Random) -> None:
    """Every way of asking, both classes, two streams, pairs that are wrong."""
    pairs = ids(generator, 8, 12)
    shared = pairs | {"source_ids": pairs["source_ids"][:2], "source_index": [0, 1] * 4}
    news = {"X-Seqloss-Stream": "news"}
    for body in (shared, pairs | {"priority": "bulk"}):
        for headers in (news, {}):
            assert client.post("/loss", json=body, headers=headers).status_code == 200
    texts = {"sources": ["May 7, 2026"], "targets": ["7. Mai 2026"], "target_language": "de"}
    assert client.post("/loss/text", json=texts).status_code == 200
    infer = client.post("/v2/models/demo/infer", **pack(tensors_of(pairs)))
    assert infer.status_code == 200, infer.text
    wrong = pairs | {"target_ids": [[5], [99_999], *pairs["target_ids"][2:]]}
    assert client.post("/loss", json=wrong | {"on_error": "partial"}).status_code == 200
    assert client.post("/loss", json=wrong).status_code == 422
    assert client.post("/loss", json=pairs | {"model": "unheard-of"}).status_code == 404
    assert client.post("/loss", content=b"{").status_code in {400, 415}
    assert client.get("/models").status_code == 200


def ask_a_troubled_service(client: httpx.Client, generator: random.Random) -> None:
    """What fails: for want of memory, of room, of time, and of finite numbers."""
    pairs = ids(generator, 16, 6)
    for priority in ("interactive", "bulk"):
        reply = client.post("/loss", json=pairs | {"priority": priority})
        assert reply.status_code in {200, 413, 429}, reply.text
    bad = {"source_ids": [[5], [6]], "target_ids": [[7], [NOT_FINITE]]}
    reply = client.post("/loss", json=bad | {"on_error": "partial"})
    assert reply.status_code in {200, 429}, reply.text
    assert client.post("/loss", json=bad).status_code in {429, 500}
    late = {"source_ids": [[5]], "target_ids": [[SLOW]], "timeout_ms": 200}
    assert client.post("/loss", json=late).status_code in {429, 504}


class Load:
    """Asks all the while, from several threads; the first thing that goes wrong ends it."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.error: BaseException | None = None

    def add(self, address: str, ask: Callable[[httpx.Client, random.Random], None]) -> None:
        """One client more."""
        thread = threading.Thread(target=self._go_on, args=(address, ask, len(self._threads)))
        self._threads.append(thread)
        thread.start()

    def _go_on(
        self, address: str, ask: Callable[[httpx.Client, random.Random], None], seed: int
    ) -> None:
        generator = random.Random(seed)
        try:
            with httpx.Client(base_url=address, timeout=30) as client:
                while not self._over.is_set():
                    ask(client, generator)
                    # Leaves something of two cores to the others.
                    self._over.wait(0.1)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
