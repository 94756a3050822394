"""The flat arrays that flow from the wire to the engine and back.

The pairs of a request never become objects: a request of 2,000 pairs is a handful of arrays.

Dimension key, used in every docstring and shape comment of the project:

    U  unique sources        S  source length      V  vocabulary (classes of the softmax)
    B  targets in a batch    T  target length      D  model width
    N  targets of a request  K  counted tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

Priority = Literal["interactive", "bulk"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

# Marks target positions that do not count, as everywhere in PyTorch and Hugging Face.
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of different lengths, one after the other.

    Attributes:
        values: all rows' entries. Shape: (total,).
        offsets: row i is `values[offsets[i]:offsets[i + 1]]`. Shape: (rows + 1,), int64, offsets[0]
            is 0.
    """

    values: NDArray[Any]
    offsets: Int64Array

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], dtype: type[np.generic]) -> Ragged:
        """Flattens lists of numbers; raises OverflowError where one does not fit the dtype."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        offsets = offsets_of(lengths)
        return cls(np.fromiter(chain.from_iterable(rows), dtype, int(offsets[-1])), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64Array:
        """Shape: (rows,)."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: NDArray[Any]) -> Int64Array:
        """Of the given rows alone. Shape: (len(rows),)."""
        lengths: Int64Array = self.offsets[rows + 1] - self.offsets[rows]
        return lengths

    @property
    def row_of_value(self) -> Int64Array:
        """The row that each value belongs to. Shape: (total,)."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def row(self, index: int) -> NDArray[Any]:
        """A view of one row."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def rows(self) -> Iterable[NDArray[Any]]:
        """Views of all rows, in order."""
        return np.split(self.values, self.offsets[1:-1]) if len(self) else ()

    def take(self, rows: NDArray[Any]) -> Ragged:
        """The given rows, in the given order, copied."""
        lengths = self.lengths_of(rows)
        return Ragged(self.values[ranges(self.offsets[:-1][rows], lengths)], offsets_of(lengths))

    def truncated(self, lengths: Int64Array) -> Ragged:
        """The first `lengths[i]` entries of each row i, copied."""
        return Ragged(self.values[ranges(self.offsets[:-1], lengths)], offsets_of(lengths))


def shift_right(targets: Ragged, start_ids: NDArray[Any]) -> Ragged:
    """Decoder inputs of labels: `[start_id] + row[:-1]` for every row.

    The one place where labels are shifted; shifting twice is the field's classic bug.

    Args:
        targets: labels, no row empty.
        start_ids: the decoder's first input, one per row. Shape: (rows,).
    """
    shifted = np.empty_like(targets.values)
    shifted[1:] = targets.values[:-1]
    shifted[targets.offsets[:-1]] = start_ids
    return Ragged(shifted, targets.offsets)


def offsets_of(lengths: NDArray[Any] | Sequence[int]) -> Int64Array:
    """Where rows of these lengths begin, and where the last one ends. Shape: (rows + 1,)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(starts: NDArray[Any], lengths: NDArray[Any]) -> Int64Array:
    """`concatenate([arange(s, s + n) for s, n in zip(starts, lengths)])`, without the loop."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


@dataclass(frozen=True, slots=True)
class RequestArrays:
    """A request as it was sent, flat; its shapes are consistent, its values unchecked.

    Attributes:
        source_ids: int64.
        target_ids: int64, `IGNORE_INDEX` where a position is not counted. N rows.
        source_index: the source of each target, within range. Shape: (N,).
        source_mask: aligned with `source_ids.values`; None where all is attended.
        target_mask: aligned with `target_ids.values`; None where all is counted.
        decoder_input_ids: aligned with `target_ids.values`, int64; None where they are the shifted
            targets.
        start_ids: the decoder's first input; None where it is the model's own. Shape: (N,).
        prefix_lengths: tokens at each target's beginning that are fed and not counted. Shape: (N,).
        pad_token_id: an id that is not counted in targets, nor attended at the end of sources.
        truncation: whether what is too long is cut.
    """

    source_ids: Ragged
    target_ids: Ragged
    source_index: Int64Array
    source_mask: BoolArray | None
    target_mask: BoolArray | None
    decoder_input_ids: Int64Array | None
    start_ids: Int64Array | None
    prefix_lengths: Int64Array
    pad_token_id: int | None
    truncation: bool


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """The longest source and target that are taken."""

    max_source_tokens: int
    max_target_tokens: int


@dataclass(frozen=True, slots=True)
class Pairs:
    """What is to be scored: checked, cut to what the model must see, and ready to be batched.

    Every id is known to lie in the model's vocabulary, every pair to have a source token and a
    counted target token.

    Attributes:
        sources: source ids, int32.
        source_index: the source of each target. Shape: (N,), int32.
        labels: target ids, int32; where a position is not counted, what is fed on in its place.
            N rows.
        counted: which label positions count. Aligned with `labels.values`, bool.
        start_ids: the first decoder input of each target. Shape: (N,), int32.
        decoder_input_ids: given decoder inputs, aligned with `labels.values`, int32; None where
            they are the labels shifted to the right.
    """

    sources: Ragged
    source_index: Int32Array
    labels: Ragged
    counted: BoolArray
    start_ids: Int32Array
    decoder_input_ids: Int32Array | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_tokens(self) -> int:
        """Of all sources and targets, padding and repetitions not counted."""
        return len(self.sources.values) + len(self.labels.values)

    @property
    def source_lengths(self) -> Int64Array:
        """The length of each target's source. Shape: (N,)."""
        return self.sources.lengths_of(self.source_index)

    @property
    def target_lengths(self) -> Int64Array:
        """Shape: (N,)."""
        return self.labels.lengths


@dataclass(frozen=True, slots=True)
class Batch:
    """What an engine scores in one go; ragged, so that no caller ever sees padding.

    Attributes:
        sources: unique sources, int32. U rows.
        source_row: the row of `sources` that each target attends to. Shape: (B,), int32.
        decoder_input_ids: what the decoder is fed, int32. B rows.
        labels: what it should predict, aligned with `decoder_input_ids.values`, int32.
        counted: which positions are scored, aligned likewise, bool.
        with_ranks_and_entropies: whether TokenTerms carry ranks and entropies.
    """

    sources: Ragged
    source_row: Int32Array
    decoder_input_ids: Ragged
    labels: Int32Array
    counted: BoolArray
    with_ranks_and_entropies: bool = False


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the model says of each counted token, in nats; everything else follows from it.

    Attributes:
        target_logprob: log p(y_t), at most 0. Shape: (K,), float32.
        mean_logprob: the mean over the V classes of log p(v). Shape: (K,), float32.
        rank: classes with a greater logit than the target's. Shape: (K,), int32, or None.
        entropy: -sum_v p log p. Shape: (K,), float32, or None.
    """

    target_logprob: Float32Array
    mean_logprob: Float32Array
    rank: Int32Array | None = None
    entropy: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Losses of a request's targets; row i belongs to target i as it was sent.

    A target that could not be scored has NaN in `losses` and `nlls`, and 0 in `num_tokens`.

    Attributes:
        losses, nlls: sums over counted tokens, in nats. Shape: (N,), float64.
        num_tokens: counted tokens. Shape: (N,), int64.
        token_losses, token_nlls: per token, NaN where a position does not count, float32. N rows.
        token_ranks: per token, -1 where a position does not count, int32. N rows, or None.
        token_entropies: per token, NaN where a position does not count, float32. N rows, or None.
    """

    losses: Float64Array
    nlls: Float64Array
    num_tokens: Int64Array
    token_losses: Ragged
    token_nlls: Ragged
    token_ranks: Ragged | None = None
    token_entropies: Ragged | None = None
