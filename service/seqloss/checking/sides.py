"""How much of each source and target the model must see, and which ids it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqloss.bundle.manifest import Manifest
from seqloss.records import (
    IGNORE_INDEX,
    BoolArray,
    Int64Array,
    LengthLimits,
    Ragged,
    RequestArrays,
)


@dataclass(frozen=True, slots=True)
class Sources:
    """Per source: how much of it is attended, and what is wrong with that.

    Attributes:
        lengths: up to the last attended token, after truncation.
        num_cut: what truncation removed.
        has_holes: whether a mask cuts more than the end.
        first_bad: the position of the first id out of range, -1 where there is none.
    """

    lengths: Int64Array
    num_cut: Int64Array
    has_holes: BoolArray
    first_bad: Int64Array

    @classmethod
    def of(cls, request: RequestArrays, manifest: Manifest, limits: LengthLimits) -> Sources:
        """Looks at all sources at once."""
        ids = request.source_ids
        attended = np.ones(len(ids.values), np.bool_)
        has_holes = np.zeros(len(ids), np.bool_)
        if request.source_mask is not None:
            attended = request.source_mask
            num_attended = np.bincount(ids.row_of_value[attended], minlength=len(ids))
            has_holes = _length_up_to_last(ids, attended) != num_attended
        if request.pad_token_id is not None:
            attended = attended & (ids.values != request.pad_token_id)
        lengths = _length_up_to_last(ids, attended)
        lengths, num_cut = _cut(lengths, limits.max_source_tokens, request.truncation)
        bad = _out_of_range(ids.values, manifest.vocabulary.source)
        return cls(lengths, num_cut, has_holes, _first(ids, bad, lengths))


@dataclass(frozen=True, slots=True)
class Targets:
    """Per target: how much of it the model must see, what counts, and what is wrong with it.

    Attributes:
        lengths: up to the last counted token, after truncation.
        num_cut: what truncation removed.
        counted: which positions count; aligned with the request's target ids.
        first_bad: the position of the first id out of range or excluded, -1 where there is none.
        first_bad_input: the same of given decoder inputs.
        has_bad_start: whether the start id is out of range.
    """

    lengths: Int64Array
    num_cut: Int64Array
    counted: BoolArray
    first_bad: Int64Array
    first_bad_input: Int64Array
    has_bad_start: BoolArray

    @classmethod
    def of(cls, request: RequestArrays, manifest: Manifest, limits: LengthLimits) -> Targets:
        """Looks at all targets at once."""
        ids = request.target_ids
        row, place = ids.row_of_value, _place(ids)
        ignored = ids.values == IGNORE_INDEX
        counted = ~ignored & (place >= request.prefix_lengths[row])
        if request.target_mask is not None:
            counted &= request.target_mask
        if request.pad_token_id is not None:
            counted &= ids.values != request.pad_token_id
        # What follows the last counted token influences nothing that is asked for.
        lengths = _length_up_to_last(ids, counted)
        lengths, num_cut = _cut(lengths, limits.max_target_tokens, request.truncation)
        counted &= place < lengths[row]
        if request.truncation:
            lengths = _length_up_to_last(ids, counted)
        vocabulary = manifest.vocabulary
        bad = ~ignored & _out_of_range(ids.values, vocabulary.target)
        if vocabulary.excluded_classes:
            bad |= counted & ~bad & vocabulary.excluded[np.where(counted & ~bad, ids.values, 0)]
        bad_input = np.zeros_like(bad)
        has_bad_start = np.zeros(len(ids), np.bool_)
        if request.decoder_input_ids is not None:
            bad_input = _out_of_range(request.decoder_input_ids, vocabulary.target)
        elif request.start_ids is not None:
            has_bad_start = _out_of_range(request.start_ids, vocabulary.target)
        return cls(
            lengths,
            num_cut,
            counted,
            _first(ids, bad, lengths),
            _first(ids, bad_input, lengths),
            has_bad_start,
        )


def _out_of_range(ids: NDArray[np.int64], size: int) -> BoolArray:
    return (ids < 0) | (ids >= size)


def _place(rows: Ragged) -> Int64Array:
    """Each value's position in its row. Shape: (total,)."""
    return np.arange(len(rows.values)) - rows.offsets[:-1][rows.row_of_value]


def _length_up_to_last(rows: Ragged, flags: BoolArray) -> Int64Array:
    """One more than the position of the last flagged value of each row, 0 where there is none."""
    lengths = np.zeros(len(rows), np.int64)
    flagged = np.flatnonzero(flags)
    row = rows.row_of_value[flagged]
    lengths[row] = flagged - rows.offsets[:-1][row] + 1  # of several, the last one stays
    return lengths


def _first(rows: Ragged, flags: BoolArray, lengths: Int64Array) -> Int64Array:
    """The position of the first flagged value within each row's length, -1 where there is none."""
    first = np.full(len(rows), -1)
    flagged = np.flatnonzero(flags)[::-1]
    row = rows.row_of_value[flagged]
    place = flagged - rows.offsets[:-1][row]
    within = place < lengths[row]
    first[row[within]] = place[within]  # of several, the last one stays: the first in the row
    return first


def _cut(lengths: Int64Array, limit: int, truncation: bool) -> tuple[Int64Array, Int64Array]:
    """Lengths after truncation, and how many tokens it removed."""
    kept = np.minimum(lengths, limit) if truncation else lengths
    return kept, lengths - kept
