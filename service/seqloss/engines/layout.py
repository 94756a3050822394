"""Lays a ragged batch out as graphs want it; the only place where padding exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from seqloss.records import Batch, Int64Array, Ragged


@dataclass(frozen=True, slots=True)
class PaddedInputs:
    """The inputs of the exported graph in its order, and the labels; all int64.

    Attributes:
        source_ids: Shape: (U, S).
        source_mask: 1 where `source_ids` is a source's, 0 where it is padding. Shape: (U, S).
        source_row: the row of `source_ids` that a target attends to. Shape: (B,).
        decoder_input_ids: Shape: (B, T).
        token_index: where the counted tokens stand, as b * T + t. Shape: (K,).
        labels: the classes of the counted tokens. Shape: (K,).
    """

    source_ids: Int64Array
    source_mask: Int64Array
    source_row: Int64Array
    decoder_input_ids: Int64Array
    token_index: Int64Array
    labels: Int64Array

    def __iter__(self) -> Iterator[Int64Array]:
        return (getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """The same without padding: sequences one after the other.

    Attributes:
        source_ids: Shape: (N,).
        source_positions: of each id in its source, from 0. Shape: (N,).
        source_starts: where each source begins. Shape: (U,).
        source_ends: and ends. Shape: (U,).
        source_row: the source that a target attends to. Shape: (B,).
        decoder_input_ids: Shape: (M,).
        target_positions: Shape: (M,).
        target_starts: Shape: (B,).
        target_ends: Shape: (B,).
        token_index: where the counted tokens stand. Shape: (K,).
        labels: the classes of the counted tokens. Shape: (K,).
    """

    source_ids: Int64Array
    source_positions: Int64Array
    source_starts: Int64Array
    source_ends: Int64Array
    source_row: Int64Array
    decoder_input_ids: Int64Array
    target_positions: Int64Array
    target_starts: Int64Array
    target_ends: Int64Array
    token_index: Int64Array
    labels: Int64Array

    def __iter__(self) -> Iterator[Int64Array]:
        return (getattr(self, name) for name in self.__slots__)


# What a graph of each layout takes; labels are the head's.
BODY_INPUTS: dict[str, tuple[str, ...]] = {
    "padded": PaddedInputs.__slots__[:-1],
    "packed": PackedInputs.__slots__[:-1],
}
# Those of a packed graph that say where sequences lie: few numbers, which the host of a GPU wants
# to know without waiting for it, so that they stay there.
HOST_INPUTS = frozenset(
    ("source_starts", "source_ends", "source_row", "target_starts", "target_ends")
)


def packed(batch: Batch) -> PackedInputs:
    """Lays sequences out one after the other."""
    sources, targets = batch.sources, batch.decoder_input_ids
    return PackedInputs(
        source_ids=sources.values.astype(np.int64),
        source_positions=_positions(sources),
        source_starts=sources.offsets[:-1].astype(np.int64),
        source_ends=sources.offsets[1:].astype(np.int64),
        source_row=batch.source_row.astype(np.int64),
        decoder_input_ids=targets.values.astype(np.int64),
        target_positions=_positions(targets),
        target_starts=targets.offsets[:-1].astype(np.int64),
        target_ends=targets.offsets[1:].astype(np.int64),
        token_index=np.flatnonzero(batch.counted),
        labels=batch.labels[batch.counted].astype(np.int64),
    )


def _positions(rows: Ragged) -> Int64Array:
    return np.arange(len(rows.values)) - rows.offsets[rows.row_of_value]


def padded(batch: Batch, source_multiple: int = 1) -> PaddedInputs:
    """Pads sources and targets with 0, which no mask lets through.

    Args:
        batch: what to lay out.
        source_multiple: see `seqloss.bundle.manifest.Graph`.
    """
    source_ids, source_mask = _pad(batch.sources, source_multiple)
    decoder_input_ids, _ = _pad(batch.decoder_input_ids)
    targets = batch.decoder_input_ids
    row = targets.row_of_value[batch.counted]
    place = np.flatnonzero(batch.counted) - targets.offsets[row]
    return PaddedInputs(
        source_ids=source_ids,
        source_mask=source_mask,
        source_row=batch.source_row.astype(np.int64),
        decoder_input_ids=decoder_input_ids,
        token_index=row * decoder_input_ids.shape[1] + place,
        labels=batch.labels[batch.counted].astype(np.int64),
    )


def _pad(rows: Ragged, multiple: int = 1) -> tuple[Int64Array, Int64Array]:
    """Values and mask. Shapes: (rows, longest), the latter rounded up."""
    lengths = rows.lengths
    longest = lengths.max()
    if multiple > 1:
        longest = max(2, -(-longest // multiple)) * multiple
    mask = np.arange(longest) < lengths[:, None]
    values = np.zeros(mask.shape, np.int64)
    values[mask] = rows.values
    return values, mask.astype(np.int64)
