"""Puts pairs of several requests into one batch, and takes the batch's terms apart again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seqloss.records import (
    Batch,
    Int32Array,
    Int64Array,
    Pairs,
    Ragged,
    offsets_of,
    ranges,
    shift_right,
)


@dataclass(frozen=True, slots=True)
class Part:
    """Some pairs of one request.

    Attributes:
        pairs: all pairs of the request.
        rows: which of them. Shape: (n,).
    """

    pairs: Pairs
    rows: Int64Array

    @property
    def positions(self) -> Int64Array:
        """Where the tokens of these rows stand in `pairs.labels.values`, row by row."""
        labels = self.pairs.labels
        return ranges(labels.offsets[self.rows], labels.lengths_of(self.rows))

    @property
    def counted_positions(self) -> Int64Array:
        """The same of the counted tokens alone: the order of the engine's terms."""
        positions = self.positions
        return positions[self.pairs.counted[positions]]


def collate(parts: Sequence[Part], *, with_ranks_and_entropies: bool) -> Batch:
    """One batch of all parts' rows, in order; equal sources become one."""
    sources, source_row = _unique_sources(parts)
    labels = concatenate([part.pairs.labels.take(part.rows) for part in parts])
    return Batch(
        sources=sources,
        source_row=source_row,
        decoder_input_ids=Ragged(
            np.concatenate([_decoder_input_ids(part) for part in parts]), labels.offsets
        ),
        labels=labels.values,
        counted=np.concatenate([part.pairs.counted[part.positions] for part in parts]),
        with_ranks_and_entropies=with_ranks_and_entropies,
    )


def concatenate(parts: Sequence[Ragged]) -> Ragged:
    """The rows of all parts, in order."""
    return Ragged(
        np.concatenate([part.values for part in parts]),
        offsets_of(np.concatenate([part.lengths for part in parts])),
    )


def _decoder_input_ids(part: Part) -> Int32Array:
    """Flat, as given or shifted from the labels."""
    pairs = part.pairs
    if pairs.decoder_input_ids is not None:
        return pairs.decoder_input_ids[part.positions]
    values: Int32Array = shift_right(
        pairs.labels.take(part.rows), pairs.start_ids[part.rows]
    ).values
    return values


def _unique_sources(parts: Sequence[Part]) -> tuple[Ragged, Int32Array]:
    """Every distinct source once, compared id by id, and each target's row among them."""
    used = [np.unique(part.pairs.source_index[part.rows], return_inverse=True) for part in parts]
    sources = concatenate(
        [part.pairs.sources.take(index) for part, (index, _) in zip(parts, used, strict=True)]
    )
    first_row = offsets_of(np.array([len(index) for index, _ in used]))[:-1]
    row = np.concatenate(
        [inverse + start for (_, inverse), start in zip(used, first_row, strict=True)]
    )
    # Sources of different lengths differ: the gap is no id.
    padded = np.full((len(sources), int(sources.lengths.max())), -1, np.int32)
    padded[np.arange(padded.shape[1]) < sources.lengths[:, None]] = sources.values
    _, first, inverse = np.unique(padded, axis=0, return_index=True, return_inverse=True)
    return sources.take(first), inverse.reshape(-1)[row].astype(np.int32)
