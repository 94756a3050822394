"""Blocks to scores: requests in order, and what is too large for one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

from seqloss_client import Chunk, LossClient, TooLarge
from seqloss_client.corpus.blocks import Block, part_of
from seqloss_client.corpus.errors import BadPair
from seqloss_client.corpus.scores import Scores

# Blocks without a good pair bring no reply behind which they could be passed on.
_MOST_EMPTY_BLOCKS = 16


class Asker:
    """Scores blocks, one request each.

    Args:
        client: of the service.
        options: of every request, as `LossClient.score_chunks` takes them.
    """

    def __init__(self, client: LossClient, options: dict[str, Any]) -> None:
        self._client = client
        self._options = options
        self._sent: deque[Block] = deque()  # in order: the first one's reply comes next
        self._unsent: deque[Block] = deque()  # were sent behind one that was too large
        self._is_at_end = False

    def scores(self, blocks: Iterator[Block]) -> Iterator[Scores]:
        """The scores of each block, in order; blocks are read as they are needed.

        A block that is over a limit of the service is sent in halves; a pair that is over one alone
        is bad.
        """
        while not self._is_at_end or self._unsent:
            results = self._client.score_chunks(self._chunks(blocks), **self._options)
            with closing(results), suppress(TooLarge):
                for result in results:
                    yield from self._without_good_pairs()
                    scores = Scores(self._sent.popleft())
                    scores.add(result, 0)
                    yield scores
            yield from self._without_good_pairs()
            if self._sent:
                too_large = self._sent.popleft()
                self._unsent.extendleft(reversed(self._sent))
                self._sent.clear()
                yield self._in_halves(too_large)

    def _chunks(self, blocks: Iterator[Block]) -> Iterator[Chunk]:
        while True:
            block = self._unsent.popleft() if self._unsent else next(blocks, None)
            if block is None:
                self._is_at_end = True
                return
            self._sent.append(block)
            if len(block.places):
                yield Chunk(block.sources, block.targets)
            elif len(self._sent) >= _MOST_EMPTY_BLOCKS and not any(
                len(block.places) for block in self._sent
            ):
                return

    def _without_good_pairs(self) -> Iterator[Scores]:
        while self._sent and not len(self._sent[0].places):
            yield Scores(self._sent.popleft())

    def _in_halves(self, block: Block) -> Scores:
        scores = Scores(block)
        parts = [(0, len(block.places))]
        while parts:
            first, last = parts.pop()
            chunk = Chunk(part_of(block.sources, first, last), part_of(block.targets, first, last))
            try:
                (result,) = self._client.score_chunks([chunk], **self._options)
            except TooLarge as error:
                middle = (first + last) // 2
                if middle == first:
                    why = BadPair("too_large", error.detail)
                    scores.refuse(int(block.places[first]), why)
                else:
                    parts += [(middle, last), (first, middle)]
            else:
                scores.add(result, first)
        return scores
