"""How much work a batch is, as its engine lays it out: padded to rectangles, or packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from seqloss.records import BoolArray, Int32Array, Int64Array

# Encoder tokens, decoder tokens, and pairs of positions that attend.
Work = tuple[Any, Any, Any]


class BatchShape(Protocol):
    """A batch, or one per entry of arrays of one length.

    Attributes:
        pads: whether a longer pair makes others dearer.
    """

    pads: ClassVar[bool]

    @property
    def num_sources(self) -> Any:
        """U."""

    @property
    def num_targets(self) -> Any:
        """B."""

    @property
    def tokens(self) -> Any:
        """On both sides, padding included."""

    @property
    def fewest_more(self) -> int:
        """What any further pair adds to the tokens at least."""

    @classmethod
    def of(
        cls,
        source_lengths: Int64Array,
        target_lengths: Int64Array,
        source_row: Int32Array | Int64Array,
        /,
    ) -> Self:
        """Of a batch. Shapes: (U,), (B,), (B,)."""

    def work(self) -> Work:
        """What the batch is made of."""

    def more(
        self, source_lengths: Int64Array, target_lengths: Int64Array
    ) -> tuple[BoolArray, Work]:
        """Pairs that might ride along, each with a source of its own. Shapes: (N,).

        Returns:
            Which of them leave the work for the others as it is, and what each of these adds.
        """

    def grown(
        self, source_lengths: Int64Array, target_lengths: Int64Array, is_new: BoolArray
    ) -> Self:
        """Of the batch with one pair more, with two, and so on.

        Args:
            source_lengths: of the pairs. Shape: (N,).
            target_lengths: likewise.
            is_new: whether a pair's source is another one than that before it.

        Returns:
            N shapes in one.
        """

    def at(self, index: int) -> Self:
        """One of several."""


@dataclass(frozen=True, slots=True)
class PaddedShape:
    """A rectangle for either side; see `BatchShape`.

    Attributes:
        num_sources: U.
        source_length: S, of the longest source.
        num_targets: B.
        target_length: T, of the longest target.
    """

    pads: ClassVar[bool] = True

    num_sources: Any
    source_length: Any
    num_targets: Any
    target_length: Any

    @property
    def tokens(self) -> Any:
        """U * S + B * T."""
        return self.num_sources * self.source_length + self.num_targets * self.target_length

    @property
    def fewest_more(self) -> int:
        """See `BatchShape.fewest_more`."""
        return int(self.target_length)

    @classmethod
    def of(
        cls,
        source_lengths: Int64Array,
        target_lengths: Int64Array,
        _source_row: Int32Array | Int64Array,
    ) -> Self:
        """See `BatchShape.of`."""
        return cls(
            len(source_lengths),
            int(source_lengths.max()),
            len(target_lengths),
            int(target_lengths.max()),
        )

    def work(self) -> Work:
        """See `BatchShape.work`."""
        source, target = self.source_length, self.target_length
        encoded, decoded = self.num_sources * source, self.num_targets * target
        return encoded, decoded, encoded * source + decoded * (source + target)

    def more(
        self, source_lengths: Int64Array, target_lengths: Int64Array
    ) -> tuple[BoolArray, Work]:
        """See `BatchShape.more`: those that raise neither length, and are padded to both."""
        source, target = self.source_length, self.target_length
        fits = (source_lengths <= source) & (target_lengths <= target)
        return fits, PaddedShape(1, source, 1, target).work()

    def grown(
        self, source_lengths: Int64Array, target_lengths: Int64Array, is_new: BoolArray
    ) -> PaddedShape:
        """See `BatchShape.grown`."""
        return PaddedShape(
            is_new.cumsum() + self.num_sources,
            np.maximum.accumulate(np.maximum(source_lengths, self.source_length)),
            np.arange(self.num_targets + 1, self.num_targets + len(target_lengths) + 1),
            np.maximum.accumulate(np.maximum(target_lengths, self.target_length)),
        )

    def at(self, index: int) -> PaddedShape:
        """See `BatchShape.at`."""
        return PaddedShape(
            int(self.num_sources[index]),
            int(self.source_length[index]),
            int(self.num_targets[index]),
            int(self.target_length[index]),
        )


@dataclass(frozen=True, slots=True)
class PackedShape:
    """Sequences one after the other; see `BatchShape`.

    Attributes:
        num_sources: U.
        num_targets: B.
        encoded: tokens of all sources.
        decoded: tokens of all targets.
        attended: pairs of positions.
    """

    pads: ClassVar[bool] = False

    num_sources: Any
    num_targets: Any
    encoded: Any
    decoded: Any
    attended: Any

    @property
    def tokens(self) -> Any:
        """Of all sources and all targets."""
        return self.encoded + self.decoded

    @property
    def fewest_more(self) -> int:
        """See `BatchShape.fewest_more`: a target of a source that is there."""
        return 1

    @classmethod
    def of(
        cls,
        source_lengths: Int64Array,
        target_lengths: Int64Array,
        source_row: Int32Array | Int64Array,
    ) -> Self:
        """See `BatchShape.of`."""
        attended = (source_lengths * source_lengths).sum()
        attended += (target_lengths * (source_lengths[source_row] + target_lengths)).sum()
        return cls(
            len(source_lengths),
            len(target_lengths),
            int(source_lengths.sum()),
            int(target_lengths.sum()),
            int(attended),
        )

    def work(self) -> Work:
        """See `BatchShape.work`."""
        return self.encoded, self.decoded, self.attended

    def more(
        self, source_lengths: Int64Array, target_lengths: Int64Array
    ) -> tuple[BoolArray, Work]:
        """See `BatchShape.more`: all of them, and what they are alone."""
        alone = PaddedShape(1, source_lengths, 1, target_lengths)
        return np.ones(len(target_lengths), np.bool_), alone.work()

    def grown(
        self, source_lengths: Int64Array, target_lengths: Int64Array, is_new: BoolArray
    ) -> PackedShape:
        """See `BatchShape.grown`."""
        encoded = np.where(is_new, source_lengths, 0)
        attended = encoded * source_lengths + target_lengths * (source_lengths + target_lengths)
        return PackedShape(
            is_new.cumsum() + self.num_sources,
            np.arange(self.num_targets + 1, self.num_targets + len(target_lengths) + 1),
            encoded.cumsum() + self.encoded,
            target_lengths.cumsum() + self.decoded,
            attended.cumsum() + self.attended,
        )

    def at(self, index: int) -> PackedShape:
        """See `BatchShape.at`."""
        return PackedShape(
            int(self.num_sources[index]),
            int(self.num_targets[index]),
            int(self.encoded[index]),
            int(self.decoded[index]),
            int(self.attended[index]),
        )


def shapes_of(*, is_packed: bool) -> type[BatchShape]:
    """What batches are to an engine that pads nothing, or that pads."""
    return PackedShape if is_packed else PaddedShape
