"""Attention over packed sequences by the variable-length flash kernel that Torch has for CUDA.

N is the number of query tokens of all sequences, M that of key tokens. The kernel reads memory as
it is told, and a stranger's graph tells it: what does not fit together is an error of the bundle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqloss.errors import BundleError

# Its first ten arguments and `scale` are the same from Torch 2.5 on.
_FLASH: Any = torch.ops.aten._flash_attention_forward.default
# The widest head that the kernel has, and what widths are multiples of.
_MAX_WIDTH, _WIDTH_MULTIPLE = 256, 8


class Layout(NamedTuple):
    """Where sequences lie, as the kernel wants to know it; the same for all layers of a batch.

    Attributes:
        query_offsets: of the first query of each sequence, and of the end. Shape: (B + 1,), int32.
        key_offsets: likewise, of the keys once they are in the order of `key_rows`.
        longest_query: of the sequences.
        longest_keys: of the sequences.
        num_queries: N.
        num_keys: M.
        key_rows: the row of each sequence's keys one after the other; None where keys already
            stand so. Shape: (keys of all sequences,), int64.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    longest_query: int
    longest_keys: int
    num_queries: int
    num_keys: int
    key_rows: Tensor | None


def takes(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel computes in the dtype, with heads of the width."""
    is_16_bits = dtype in {torch.float16, torch.bfloat16}
    return is_16_bits and 0 < width <= _MAX_WIDTH and width % _WIDTH_MULTIPLE == 0


def laid_out(
    query_starts: Tensor,
    query_ends: Tensor,
    key_starts: Tensor,
    key_ends: Tensor,
    queries: Tensor,
    keys: Tensor,
) -> Layout:
    """Lays sequences out for the queries' device, without waiting for it.

    Args:
        query_starts: on the CPU, as the other three; see `seqloss.model.operators.attention`.
        query_ends: Shape: (B,).
        key_starts: Shape: (B,).
        key_ends: Shape: (B,).
        queries: Shape: (N, any).
        keys: Shape: (M, any).

    Raises:
        BundleError: there are no such rows.
    """
    bounds = (query_starts, query_ends, key_starts, key_ends)
    kinds = {(bound.device.type, bound.dtype, tuple(bound.shape)) for bound in bounds}
    _require(kinds == {("cpu", torch.int64, (query_starts.numel(),))} and query_starts.numel() > 0)
    _require(bool((key_starts >= 0).all()) and bool((key_ends <= len(keys)).all()))
    num_queries, num_keys = query_ends - query_starts, key_ends - key_starts
    _require(bool((num_queries > 0).all()) and bool((num_keys > 0).all()))
    # Each sequence has the rows behind those of the last one, and together they have all.
    ends = torch.nn.functional.pad(query_ends, (1, 0))
    _require(torch.equal(ends[:-1], query_starts) and int(ends[-1]) == len(queries))
    key_offsets = _offsets(num_keys)
    parts = [ends, key_offsets]
    if not torch.equal(key_offsets[:-1], key_starts):
        shift = torch.repeat_interleave(key_starts - key_offsets[:-1], num_keys)
        parts.append(torch.arange(len(shift)) + shift)
    query_offsets, key_offsets, *key_rows = _moved(parts, queries.device)
    return Layout(
        query_offsets=query_offsets.int(),
        key_offsets=key_offsets.int(),
        longest_query=int(num_queries.max()),
        longest_keys=int(num_keys.max()),
        num_queries=len(queries),
        num_keys=len(keys),
        key_rows=key_rows[0] if key_rows else None,
    )


def flash_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """`softmax(scale * Q @ K.T) @ V` of each sequence and head.

    Args:
        queries: 16 bits; rows may lie apart. Shape: (N, heads * width).
        keys: likewise. Shape: (M, heads * width).
        values: Shape: (M, heads * width).
        layout: of `laid_out`.
        heads: how many.
        scale: of scores.
        causal: whether query q sees keys 0 to q only: sequences have as many keys as queries then,
            since the kernel aligns the last ones of both.

    Returns:
        Of the queries' dtype. Shape: (N, heads * width).

    Raises:
        BundleError: the rows are not those of the layout.
    """
    _require((len(queries), len(keys)) == (layout.num_queries, layout.num_keys))
    _require(keys.shape == values.shape and keys.shape[1:] == queries.shape[1:])
    _require(queries.dim() == 2 and heads > 0)
    _require(takes(queries.dtype, queries.shape[1] // heads) and queries.shape[1] % heads == 0)
    _require(queries.dtype == keys.dtype == values.dtype)
    if layout.key_rows is not None:
        keys, values = (
            keys.index_select(0, layout.key_rows),
            values.index_select(0, layout.key_rows),
        )
    by_head = [rows.view(len(rows), heads, -1) for rows in (queries, keys, values)]
    attended: Tensor = _FLASH(
        *by_head,
        layout.query_offsets,
        layout.key_offsets,
        layout.longest_query,
        layout.longest_keys,
        0.0,  # no dropout
        causal,
        False,  # no mask to look at
        scale=scale,
    )[0]
    return attended.flatten(1)


def _require(holds: bool) -> None:
    if not holds:
        raise BundleError("a graph has attention to rows that are not there, or of other sizes")


def _offsets(lengths: Tensor) -> Tensor:
    """Shape: (B,) to (B + 1,)."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The same on the device, in one copy that nobody waits for. Shapes: (any,), int64."""
    together = torch.cat(tensors)
    if device.type == "cuda":
        together = together.pin_memory()
    moved = together.to(device, non_blocking=True)
    return list(torch.split(moved, [len(tensor) for tensor in tensors]))
