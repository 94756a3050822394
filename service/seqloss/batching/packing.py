"""Which waiting pairs go into the next batch. Pure: arrays in, indices out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqloss.records import BoolArray, Int64Array


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pairs that wait, one entry each.

    Attributes:
        source_lengths: Shape: (N,).
        target_lengths: Shape: (N,).
        source_keys: equal numbers mean the same source. Shape: (N,).
        request_numbers: equal numbers mean the same request. Shape: (N,).
    """

    source_lengths: Int64Array
    target_lengths: Int64Array
    source_keys: Int64Array
    request_numbers: Int64Array


def form_batch(
    candidates: Candidates, anchor: int, max_batch_tokens: int, max_batch_pairs: int
) -> Int64Array:
    """Grows a batch around the anchor: first with pairs of its own request, then with others.

    Of each kind pairs with shorter targets come first, then longer ones.  The cost is the padded
    work on both sides, U * S + B * T tokens, where a source that several pairs share counts once.
    The anchor is always in the batch, even where it alone is above the limit, so that nothing waits
    for ever; and no request's batches are filled with others' pairs while its own wait.

    Args:
        candidates: N pairs.
        anchor: the index of the pair that must be in the batch.
        max_batch_tokens: the largest cost of a batch of more than one pair.
        max_batch_pairs: the largest B.

    Returns:
        Indices into the candidates, ordered by target length. Shape: (B,).
    """
    own = candidates.request_numbers == candidates.request_numbers[anchor]
    by_length = np.lexsort((candidates.source_lengths, candidates.target_lengths))
    middle = int(np.flatnonzero(by_length == anchor)[0])
    around = np.concatenate([by_length[middle::-1], by_length[middle + 1 :]])
    way = np.concatenate([around[own[around]], around[~own[around]]])
    # Costs rise along the way, so what fits is a beginning of it.
    way = way[: _how_many(candidates, way, max_batch_tokens, max_batch_pairs)]
    return way[np.argsort(candidates.target_lengths[way], kind="stable")]


def _how_many(
    candidates: Candidates, way: Int64Array, max_batch_tokens: int, max_batch_pairs: int
) -> int:
    """How many pairs from the beginning of the way stay within the limits; at least one."""
    num_pairs = np.arange(1, len(way) + 1)
    num_sources = np.cumsum(_first_occurrences(candidates.source_keys[way]))
    longest_source = np.maximum.accumulate(candidates.source_lengths[way])
    longest_target = np.maximum.accumulate(candidates.target_lengths[way])
    cost = num_sources * longest_source + num_pairs * longest_target
    fitting = int(np.searchsorted(cost, max_batch_tokens, side="right"))
    return max(1, min(fitting, max_batch_pairs))


def _first_occurrences(keys: Int64Array) -> BoolArray:
    first = np.zeros(len(keys), np.bool_)
    first[np.unique(keys, return_index=True)[1]] = True
    return first
