"""Blocks of pairs: what readers give and what requests are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from seqloss_client.corpus.errors import BadPairs
from seqloss_client.corpus.token_ids import parse_ids, rows_of
from seqloss_client.models import Ragged

Side = list[str] | Ragged


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Consecutive pairs as they stand in the input.

    Attributes:
        num_pairs: good and bad ones.
        content: what only its reader understands.
        num_pairs_read: with those of all blocks before.
        position: how far the input is read, as `Reader.size` counts.
        digest: of the whole input up to the end of the block.
    """

    num_pairs: int
    content: tuple[Any, ...]
    num_pairs_read: int
    position: int
    digest: str


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive pairs, the good ones ready to be sent.

    Attributes:
        raw: where they come from.
        sources, targets: of the good pairs, in order.
        places: of the good pairs in the block. Shape: (good pairs,).
        bad: the others, by place.
    """

    raw: RawBlock
    sources: Side
    targets: Side
    places: npt.NDArray[np.intp]
    bad: BadPairs


@dataclass(frozen=True, slots=True)
class Columns:
    """What a file with columns is asked for.

    Attributes:
        source, target: names, or numbers from 1.
        has_header: whether the first line of TSV and CSV has their names.
        of_ids: whether they hold token ids, and no text.
    """

    source: str
    target: str
    has_header: bool
    of_ids: bool

    @property
    def names(self) -> tuple[str, str]:
        """Of both."""
        return self.source, self.target


class Digest:
    """Of everything that was read so far."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def after(self, *parts: bytes) -> str:
        """Goes on with what comes next."""
        for part in parts:
            self._hash.update(len(part).to_bytes(8, "little"))
            self._hash.update(part)
        return self._hash.hexdigest()


class Reader(Protocol):
    """An input, read once from its beginning to its end.

    Attributes:
        first_line: the number of the first pair's line or row, from 1.
        has_header: whether a line before it names the columns.
    """

    first_line: int
    has_header: bool

    @property
    def size(self) -> int | None:
        """Of the input, in what `RawBlock.position` counts; None where nobody knows."""
        ...

    def blocks(self) -> Iterator[RawBlock]:
        """All of it. Where blocks end depends on the input alone."""
        ...

    def parse(self, raw: RawBlock) -> Block:
        """Makes pairs of a block."""
        ...

    def close(self) -> None:
        """Lets go of the files."""
        ...


def block_of(
    raw: RawBlock,
    sources: list[Any] | Ragged,
    targets: list[Any] | Ragged,
    of_ids: bool,
    bad: BadPairs,
) -> Block:
    """Keeps what is good.

    Args:
        raw: the block.
        sources: strings, fields of ids as `parse_ids` takes them, or ids; one per pair.
        targets: likewise.
        of_ids: whether fields are to be parsed.
        bad: pairs that are bad already; gets more.
    """
    if of_ids:
        sources, targets = _ids(sources, bad), _ids(targets, bad)
    return _kept(raw, sources, targets, bad)


def _ids(side: list[Any] | Ragged, bad: BadPairs) -> Ragged:
    return side if isinstance(side, Ragged) else parse_ids(side, bad)


def _kept(raw: RawBlock, sources: Side, targets: Side, bad: BadPairs) -> Block:
    kept = np.ones(raw.num_pairs, np.bool_)
    kept[list(bad)] = False
    places = np.flatnonzero(kept)
    if bad:
        sources, targets = _rows(sources, kept), _rows(targets, kept)
    return Block(raw, sources, targets, places, bad)


def _rows(side: Side, kept: npt.NDArray[np.bool_]) -> Side:
    if isinstance(side, Ragged):
        return rows_of(side, kept)
    return [text for text, is_kept in zip(side, kept.tolist(), strict=True) if is_kept]


def part_of(side: Side, first: int, last: int) -> Side:
    """Some consecutive rows."""
    if not isinstance(side, Ragged):
        return side[first:last]
    bounds = side.offsets
    return Ragged(side.values[bounds[first] : bounds[last]], side.lengths[first:last])
