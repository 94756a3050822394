"""Numbers that equal rows share, so that equal rows are found without comparing all with all."""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

from seqloss.records import Int64Array, Ragged

_random = np.random.default_rng(secrets.randbits(128))
# One odd multiplier per position. They are drawn anew in every process, so that nobody can prepare
# rows that collide.
_multipliers = _random.integers(0, 2**63, 4096, dtype=np.uint64) | np.uint64(1)


def row_digests(rows: Ragged) -> Int64Array:
    """A digest per row: equal rows have equal ones, others almost never.

    Multilinear hashing modulo 2^64: the sum over positions of multiplier times entry. Whoever acts
    on equality has to compare the rows.

    Shape: (rows,), int64.
    """
    lengths = rows.lengths
    multipliers = _multipliers_up_to(int(lengths.max(initial=0)) + 1)
    # Its own multiplier for the length keeps zeros at the end from being lost.
    digests = lengths.astype(np.uint64) * multipliers[0]
    occupied = lengths > 0
    if occupied.any():
        places = np.arange(len(rows.values)) - rows.offsets[:-1].repeat(lengths) + 1
        products = multipliers[places] * rows.values.astype(np.uint64)
        digests[occupied] += np.add.reduceat(products, rows.offsets[:-1][occupied])
    as_signed: Int64Array = digests.view(np.int64)
    return as_signed


def _multipliers_up_to(count: int) -> NDArray[np.uint64]:
    global _multipliers  # noqa: PLW0603 - it only ever grows
    if len(_multipliers) < count:
        more = _random.integers(0, 2**63, count, dtype=np.uint64) | np.uint64(1)
        _multipliers = np.concatenate([_multipliers, more])
    return _multipliers


def first_of_equals(digests: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Where each distinct one stands first, in order; and which of these each one's own is.

    Shapes: (distinct,) and as given. Both are the same in every process, which digests are not.
    """
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    order = first.argsort()
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[inverse]
