"""Pairs, one by one, become chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from seqloss_client.models import Chunk, Pair


class Grouping:
    """Collects pairs until there are enough for a request.

    Args:
        pairs_per_request: how many that is.
    """

    def __init__(self, pairs_per_request: int) -> None:
        if pairs_per_request < 1:
            raise ValueError(f"pairs_per_request is {pairs_per_request} and must be at least 1")
        self._most = pairs_per_request
        self._pairs: list[Pair] = []

    def add(self, pair: Pair) -> Chunk | None:
        """A chunk, if the pair makes it full.

        Raises:
            TypeError: it is no pair.
        """
        if isinstance(pair, str) or len(pair) != 2:
            raise TypeError(f"{str(pair)[:100]!r} is no pair of a source and a target")
        self._pairs.append(pair)
        return self.rest() if len(self._pairs) == self._most else None

    def rest(self) -> Chunk | None:
        """A chunk of what is left, if anything is."""
        if not self._pairs:
            return None
        sources, targets = map(list, zip(*self._pairs, strict=True))
        self._pairs = []
        return Chunk(sources, targets)


def chunks_of(pairs: Iterable[Pair], grouping: Grouping) -> Iterator[Chunk]:
    """Groups pairs; where they break off with an error, those before it are a chunk first."""
    try:
        for pair in pairs:
            if (chunk := grouping.add(pair)) is not None:
                yield chunk
    except Exception:
        if (chunk := grouping.rest()) is not None:
            yield chunk
        raise
    if (chunk := grouping.rest()) is not None:
        yield chunk
