"""Which waiting pairs go into the next batch. Pure: arrays in, indices out.

No Python runs per pair: a hundred thousand of them are packed in two hundred milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from seqloss.batching.cost import CostModel
from seqloss.batching.shapes import BatchShape, PaddedShape
from seqloss.records import BoolArray, Float64Array, Int64Array

# Lengths are below this, so that three numbers sort as one.
_BITS = 21
_MASK = (1 << _BITS) - 1
# A rider's own work is at least so much of what it adds to its batch; else a batch of its like is
# the better one.
_WORTH_RIDING = 0.9
# How often a batch is filled up with those who fit into what the ones before them left.
_FILLINGS = 8


@dataclass(frozen=True, slots=True)
class Caps:
    """What a batch of more than one pair must not exceed.

    Attributes:
        tokens: as the engine lays them out, both sides together.
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

    def part(self, rows: slice | Int64Array) -> Candidates:
        """Some of them."""
        return Candidates(
            self.source_lengths[rows], self.target_lengths[rows], self.source_keys[rows]
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
    is_first = differs_from_last(candidates.source_keys[order])
    starts = np.flatnonzero(is_first)
    longest = np.empty_like(candidates.target_lengths)
    if len(order):
        groups = np.maximum.reduceat(candidates.target_lengths[order], starts)
        longest[order] = groups[np.cumsum(is_first) - 1]
    return longest


def form_batch(candidates: Candidates, anchor: int, caps: Caps, cost: CostModel) -> slice:
    """Grows a batch around the anchor to where it is the most efficient.

    Efficient is what takes little more than its pairs must: their tokens without padding, and of
    each source as large a part as there are pairs of it, so that a batch which encodes a source for
    few of them has that against it.

    It grows the one way, then the other; of the two beginnings the more efficient one is taken.  On
    each way the cost model says where to stop, within the caps.  The anchor is always in the batch,
    even where it alone exceeds the caps, so that nothing waits for ever.

    Args:
        candidates: N pairs in their `packing_order`.
        anchor: the index of the pair that must be in the batch.
        caps: bounds on more than one pair.
        cost: what a batch takes.

    Returns:
        The batch, as a range of indices around the anchor.
    """
    shape = shape_of(candidates.part(slice(anchor, anchor + 1)), cost)
    # More pairs than that exceed the tokens.
    longest = min(caps.pairs, caps.tokens // shape.fewest_more + 1)
    first, last = max(anchor - longest, 0), min(anchor + longest, len(candidates))
    near, place = candidates.part(slice(first, last)), anchor - first
    least = _least_seconds(near, cost)
    down, up = slice(place - 1, None, -1) if place else slice(0, 0), slice(place + 1, None)
    below, above = (_Way(near.part(way), least[way]) for way in (down, up))

    seconds = float(least[place])
    alone = _Grown(
        shape, seconds, seconds / float(cost.seconds(shape)), int(near.source_keys[place])
    )
    upwards, downwards = alone.grow(above, caps, cost), alone.grow(below, caps, cost)
    if upwards.efficiency >= downwards.efficiency:
        whole = upwards.grow(below, caps, cost)
        num_up = upwards.num_pairs - 1
    else:
        whole = downwards.grow(above, caps, cost)
        num_up = whole.num_pairs - downwards.num_pairs
    stop = anchor + 1 + num_up
    return slice(stop - whole.num_pairs, stop)


def _least_seconds(candidates: Candidates, cost: CostModel) -> Float64Array:
    """What each pair must take at least, its share of its source included. Shape: (N,)."""
    _, by_encoded, by_decoded, by_attended = cost.numbers
    sources, targets = candidates.source_lengths, candidates.target_lengths
    by_source = (by_encoded + by_attended * sources) * sources
    is_first = differs_from_last(candidates.source_keys)
    if not is_first.all():
        source = is_first.cumsum() - 1
        by_source = by_source / np.bincount(source)[source]
    seconds: Float64Array = by_source + (by_decoded + by_attended * (sources + targets)) * targets
    return seconds


class _Way(NamedTuple):
    """Pairs in the order in which a batch may take them in, and what each must take."""

    candidates: Candidates
    least_seconds: Float64Array


@dataclass(frozen=True, slots=True)
class _Grown:
    """A batch as far as it was grown.

    Attributes:
        shape: what it is to the engine.
        least_seconds: what its pairs must take.
        efficiency: of what it takes, so much is what it must.
        anchor_source: the key of the anchor's source, which both ways begin beside.
    """

    shape: BatchShape
    least_seconds: float
    efficiency: float
    anchor_source: int

    @property
    def num_pairs(self) -> int:
        return int(self.shape.num_targets)

    def grow(self, way: _Way, caps: Caps, cost: CostModel) -> _Grown:
        """Adds a beginning of the way, where equal sources are neighbours; maybe nothing of it."""
        shape, candidates = self.shape, way.candidates
        if not len(candidates) or shape.tokens + shape.fewest_more > caps.tokens:
            return self
        is_first = differs_from_last(candidates.source_keys)
        is_first[0] = candidates.source_keys[0] != self.anchor_source
        shapes = shape.grown(candidates.source_lengths, candidates.target_lengths, is_first)
        encoded, decoded, attended = shapes.work()
        # Both rise along the way: what fits is a beginning of it.
        fitting = min(
            int((encoded + decoded).searchsorted(caps.tokens, side="right")),
            caps.pairs - self.num_pairs,
        )
        seconds = cost.seconds_of_work(encoded, decoded, attended)
        if caps.seconds < np.inf:
            fitting = min(fitting, int(seconds.searchsorted(caps.seconds, side="right")))
        if fitting <= 0:
            return self
        least_seconds = way.least_seconds[:fitting].cumsum() + self.least_seconds
        efficiency = least_seconds / seconds[:fitting]
        best = int(efficiency.argmax())
        if efficiency[best] < self.efficiency:
            return self
        return _Grown(
            shapes.at(best), float(least_seconds[best]), float(efficiency[best]), self.anchor_source
        )


def riders(candidates: Candidates, shape: BatchShape, caps: Caps, cost: CostModel) -> Int64Array:
    """Pairs that may ride along in a batch of this shape: they make it no dearer for the others.

    Returns:
        Indices, rising: the longest that fit, and of those that are left again. So a padded batch
        is padded the least, and any other is filled up.
    """
    sources, targets = candidates.source_lengths, candidates.target_lengths
    fits, more = shape.more(sources, targets)
    alone = cost.seconds_of_work(0, 0, 0)
    added = cost.seconds_of_work(*more) - alone
    worth = cost.seconds(PaddedShape(1, sources, 1, targets)) - alone
    waiting = np.flatnonzero(fits & (worth >= _WORTH_RIDING * added))
    waiting = waiting[(-worth[waiting]).argsort(kind="stable")]
    # Of each, where a padded batch has one number for all.
    tokens, added = (np.broadcast_to(one, fits.shape) for one in (more[0] + more[1], added))
    chosen = waiting[:0]
    for _ in range(_FILLINGS):
        fits = shape.tokens + tokens[waiting] <= caps.tokens
        fits &= cost.seconds(shape) + added[waiting] <= caps.seconds
        waiting = waiting[fits]
        first = waiting[: max(caps.pairs - shape.num_targets, 0)]
        shapes = shape.grown(sources[first], targets[first], np.ones(len(first), np.bool_))
        allowed = (shapes.tokens <= caps.tokens) & (shapes.num_targets <= caps.pairs)
        num_allowed = int((allowed & (cost.seconds(shapes) <= caps.seconds)).sum())
        if not num_allowed:
            break
        chosen = np.concatenate([chosen, waiting[:num_allowed]])
        waiting = waiting[num_allowed:]
        shape = shapes.at(num_allowed - 1)
    return np.sort(chosen)


def shape_of(candidates: Candidates, cost: CostModel) -> BatchShape:
    """Of a batch of all the candidates, in packing order."""
    is_first = differs_from_last(candidates.source_keys)
    return cost.shapes.of(
        candidates.source_lengths[is_first], candidates.target_lengths, is_first.cumsum() - 1
    )


def differs_from_last(keys: Int64Array) -> BoolArray:
    """Where a key is another one than that before it; the first one is. Shape: as given."""
    differs = np.empty(len(keys), np.bool_)
    differs[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=differs[1:])
    return differs
