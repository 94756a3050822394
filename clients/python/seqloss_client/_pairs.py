"""Pairs as they go onto either wire: checked, flat, and of a type that the wire has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqloss_client.models import Chunk, Ragged, Rows, ScoringOptions

_INT32 = np.iinfo(np.int32)
_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class IdPairs:
    """Token ids to score; every array is contiguous, little-endian, int32 or int64.

    Attributes:
        sources, targets: ids.
        source_index: the source of each target; None where target i goes with source i.
        prefix_length, decoder_start_token_id: one, or one per target.
    """

    sources: Ragged
    targets: Ragged
    source_index: NDArray[Any] | None
    prefix_length: int | NDArray[Any]
    decoder_start_token_id: int | NDArray[Any] | None

    @property
    def size(self) -> int:
        """Numbers to be sent, lengths among them."""
        return sum(len(side.values) + len(side) for side in (self.sources, self.targets))


def id_pairs(chunk: Chunk, options: ScoringOptions) -> IdPairs:
    """The pairs of a chunk of ids.

    Raises:
        TypeError: something is no integer, or no row of them.
        ValueError: an integer that 64 bits do not hold, or an array of the wrong shape.
    """
    return IdPairs(
        sources=_ids(chunk.sources, "source_ids"),  # type: ignore[arg-type]  # it refuses strings
        targets=_ids(chunk.targets, "target_ids"),  # type: ignore[arg-type]
        source_index=source_index_of(chunk),
        prefix_length=_one_or_each(options.prefix_length, "prefix_length"),
        decoder_start_token_id=(
            None
            if options.decoder_start_token_id is None
            else _one_or_each(options.decoder_start_token_id, "decoder_start_token_id")
        ),
    )


def source_index_of(chunk: Chunk) -> NDArray[Any] | None:
    """The source of each target, or None; raises as `id_pairs`."""
    return None if chunk.source_index is None else _row(chunk.source_index, "source_index")


def _ids(rows: Rows, name: str) -> Ragged:
    ragged = Ragged.from_rows(rows, name)
    return Ragged(
        _for_the_wire(ragged.values, name), _for_the_wire(ragged.lengths, f"lengths of {name}")
    )


def _one_or_each(value: Any, name: str) -> int | NDArray[Any]:
    if isinstance(value, bool | float):
        raise TypeError(f"{name} is {value!r}; it must be an integer, or one for each target")
    if isinstance(value, int | np.integer):
        return int(value)
    return _row(value, name)


def _row(values: Any, name: str) -> NDArray[Any]:
    return _for_the_wire(Ragged.from_rows([values], name).values, name)


def _for_the_wire(values: NDArray[Any], name: str) -> NDArray[Any]:
    """The same numbers as int32 where all fit, else as int64."""
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name} are {values.dtype}; they must be integers")
    lowest, highest = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    if highest > _INT64.max:
        raise ValueError(f"{name}: {highest} is no id: 63 bits do not hold it")
    fits = _INT32.min <= lowest and highest <= _INT32.max
    return np.ascontiguousarray(values, "<i4" if fits else "<i8")
