"""Which waiting pairs go into the next batch. Pure: arrays in, indices out.

No Python runs per pair: a hundred thousand of them are packed in two hundred milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqloss.batching.cost import BatchShape, CostModel
from seqloss.records import BoolArray, Int64Array

# Lengths are below this, so that three numbers sort as one.
_BITS = 21
_MASK = (1 << _BITS) - 1


@dataclass(frozen=True, slots=True)
class Caps:
    """What a batch of more than one pair must not exceed.

    Attributes:
        tokens: padded, both sides together.
        pairs: targets.
        seconds: by the cost model; inf where there is no bound.
    """

    tokens: int
    pairs: int
    seconds: float = np.inf


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pairs that wait, one entry each. Shapes: (N,), int64.

    Attributes:
        source_lengths: of each pair.
        target_lengths: likewise.
        source_keys: equal numbers mean the same source.
    """

    source_lengths: Int64Array
    target_lengths: Int64Array
    source_keys: Int64Array

    def __len__(self) -> int:
        return len(self.target_lengths)

    def part(self, rows: slice) -> Candidates:
        """Some of them."""
        return Candidates(
            self.source_lengths[rows], self.target_lengths[rows], self.source_keys[rows]
        )

    def reversed(self) -> Candidates:
        """The last one first."""
        return Candidates(
            self.source_lengths[::-1], self.target_lengths[::-1], self.source_keys[::-1]
        )


def packing_order(candidates: Candidates, target_weight: float) -> Int64Array:
    """An order in which neighbours make good batches: by target length, then by source length.

    Pairs of one source stand together, at the longest target among them, unless padding a shorter
    target to that costs more than encoding the source again.  Source lengths rise and fall in turn
    from one target length to the next, so that a batch across the border is even as well.

    Args:
        candidates: N pairs.
        target_weight: see `CostModel.target_weight`.

    Returns:
        Indices. Shape: (N,).
    """
    lengths = candidates.target_lengths
    longest = _longest_of_source(candidates)
    padding = target_weight * (longest - lengths)
    standing = np.where(padding <= candidates.source_lengths, longest, lengths)
    sources = np.where(standing & 1, _MASK - candidates.source_lengths, candidates.source_lengths)
    keys = (standing << 2 * _BITS) | (sources << _BITS) | (candidates.source_keys & _MASK)
    return keys.argsort(kind="stable")


def _longest_of_source(candidates: Candidates) -> Int64Array:
    """The longest target of each pair's source. Shape: (N,)."""
    order = candidates.source_keys.argsort(kind="stable")
    is_first = _differs_from_last(candidates.source_keys[order])
    starts = np.flatnonzero(is_first)
    longest = np.empty_like(candidates.target_lengths)
    if len(order):
        groups = np.maximum.reduceat(candidates.target_lengths[order], starts)
        longest[order] = groups[np.cumsum(is_first) - 1]
    return longest


def form_batch(candidates: Candidates, anchor: int, caps: Caps, cost: CostModel) -> slice:
    """Grows a batch around the anchor while that makes a token cheaper.

    It grows the one way, then the other; of the two beginnings the one with the cheaper tokens is
    taken.  On each way the cost model says where to stop, within the caps.  The anchor is always in
    the batch, even where it alone exceeds the caps, so that nothing waits for ever.

    Args:
        candidates: N pairs in their `packing_order`.
        anchor: the index of the pair that must be in the batch.
        caps: bounds on more than one pair.
        cost: what a batch takes.

    Returns:
        The batch, as a range of indices around the anchor.
    """
    first = candidates.target_lengths[anchor] or 1
    # More pairs than that exceed the tokens, since no target is padded to less than the anchor's.
    furthest = min(caps.pairs, caps.tokens // int(first) + 1)
    up = slice(anchor + 1, min(anchor + furthest, len(candidates)))
    down = slice(max(anchor - furthest, 0), anchor)
    alone = _Grown(
        BatchShape(1, int(candidates.source_lengths[anchor]), 1, int(first)),
        int(candidates.source_lengths[anchor] + first),
    )
    upwards = alone.grow(candidates.part(up), caps, cost)
    downwards = alone.grow(candidates.part(down).reversed(), caps, cost)
    if upwards.seconds_per_token <= downwards.seconds_per_token:
        whole = upwards.grow(candidates.part(down).reversed(), caps, cost)
        num_up = upwards.num_pairs - 1
    else:
        whole = downwards.grow(candidates.part(up), caps, cost)
        num_up = whole.num_pairs - downwards.num_pairs
    stop = anchor + 1 + num_up
    return slice(stop - whole.num_pairs, stop)


@dataclass(frozen=True, slots=True)
class _Grown:
    """A batch as far as it was grown.

    Attributes:
        shape: what it is padded to.
        num_tokens: without padding.
        seconds_per_token: what the last growth came to; inf where nothing was added.
    """

    shape: BatchShape
    num_tokens: int
    seconds_per_token: float = np.inf

    @property
    def num_pairs(self) -> int:
        return int(self.shape.num_targets)

    def grow(self, way: Candidates, caps: Caps, cost: CostModel) -> _Grown:
        """Adds a beginning of the way, where equal sources are neighbours; maybe nothing of it."""
        if not len(way):
            return self
        shape, sources, targets = self.shape, way.source_lengths, way.target_lengths
        is_first = _differs_from_last(way.source_keys)
        shapes = BatchShape(
            num_sources=is_first.cumsum() + shape.num_sources,
            source_length=np.maximum.accumulate(np.maximum(sources, shape.source_length)),
            num_targets=np.arange(shape.num_targets + 1, shape.num_targets + len(way) + 1),
            target_length=np.maximum.accumulate(np.maximum(targets, shape.target_length)),
        )
        # Both rise along the way: what fits is a beginning of it.
        fitting = min(
            int(shapes.tokens.searchsorted(caps.tokens, side="right")),
            caps.pairs - self.num_pairs,
        )
        seconds = cost.seconds(shapes)
        if caps.seconds < np.inf:
            fitting = min(fitting, int(seconds.searchsorted(caps.seconds, side="right")))
        if fitting <= 0:
            return self
        num_tokens = (targets + sources * is_first)[:fitting].cumsum() + self.num_tokens
        per_token = seconds[:fitting] / num_tokens
        best = int(per_token.argmin())
        if per_token[best] > float(cost.seconds(shape)) / self.num_tokens:
            return self
        return _Grown(shapes.at(best), int(num_tokens[best]), float(per_token[best]))


def riders(candidates: Candidates, shape: BatchShape, caps: Caps, cost: CostModel) -> Int64Array:
    """Pairs that may ride along in a batch of this shape, and raise neither of its lengths.

    Returns:
        Indices, rising: the longest of those that fit, as many as the caps allow.
    """
    fits = (candidates.source_lengths <= shape.source_length) & (
        candidates.target_lengths <= shape.target_length
    )
    found = np.flatnonzero(fits)
    more = np.arange(1, min(len(found), caps.pairs) + 1)
    shapes = BatchShape(
        shape.num_sources + more,
        shape.source_length,
        shape.num_targets + more,
        shape.target_length,
    )
    allowed = (shapes.tokens <= caps.tokens) & (shapes.num_targets <= caps.pairs)
    allowed &= cost.seconds(shapes) <= caps.seconds
    return found[len(found) - int(allowed.sum()) :]


def shape_of(candidates: Candidates) -> BatchShape:
    """Of a batch of all the candidates, in packing order."""
    return BatchShape(
        num_sources=int(_differs_from_last(candidates.source_keys).sum()),
        source_length=int(candidates.source_lengths.max()),
        num_targets=len(candidates),
        target_length=int(candidates.target_lengths.max()),
    )


def _differs_from_last(keys: Int64Array) -> BoolArray:
    differs = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=differs[1:])
    return differs
