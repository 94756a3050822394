"""Where a filter's losses come from: files of scores, or services."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqloss_client._client import LossClient
from seqloss_client.corpus.asking import Asker
from seqloss_client.corpus.blocks import Block
from seqloss_client.corpus.errors import BadPair

Losses = NDArray[np.float64]

DEFAULT_URL = "http://localhost:8000"

# A corpus may be bad from beginning to end.
_BAD_KEPT = 10


@dataclass(frozen=True, slots=True)
class Direction:
    """A model that scores one side given the other.

    Attributes:
        url: the service's address.
        model: its name there; None where the service has one model.
        is_backward: whether it reads targets and scores sources.
        source_language: of what it reads, where its tokenizer asks.
        target_language: of what it scores.
        timeout: for each reply, in seconds.
        max_requests: under way at once.
        retry_for: seconds that the service may be away.
    """

    url: str = DEFAULT_URL
    model: str | None = None
    is_backward: bool = False
    source_language: str | None = None
    target_language: str | None = None
    timeout: float = 600.0
    max_requests: int = 16
    retry_for: float = 300.0

    def options(self) -> dict[str, Any]:
        """Of every request; the same pairs give the same bits."""
        return {
            "source_language": self.source_language,
            "target_language": self.target_language,
            "max_requests": self.max_requests,
            "retry_for": self.retry_for,
            "reproducible": True,
        }


@dataclass(slots=True)
class ServiceLosses:
    """Mean losses by a service, block by block.

    Attributes:
        direction: who is asked.
        first_bad: filled on the way: the first bad pairs, by place in the input, and why.
    """

    direction: Direction
    first_bad: dict[int, BadPair] = field(default_factory=dict)

    def of(self, blocks: Iterable[Block]) -> Iterator[Losses]:
        """Nats per token of every pair of every block, NaN of bad ones."""
        start = 0
        with LossClient(
            self.direction.url, model=self.direction.model, timeout=self.direction.timeout
        ) as client:
            turned = (self._turned(block) for block in blocks)
            for scores in Asker(client, self.direction.options()).scores(turned):
                for place in sorted(scores.bad)[: _BAD_KEPT - len(self.first_bad)]:
                    self.first_bad[start + place] = scores.bad[place]
                start += len(scores.records)
                yield scores.records["mean_loss"]

    def _turned(self, block: Block) -> Block:
        if not self.direction.is_backward:
            return block
        return replace(block, sources=block.targets, targets=block.sources)
