"""The operators of a packed graph, in plain Torch.

A graph names what it computes; whoever runs it may compute it in another way (`engines.binding`
puts modules in their place). These definitions are what the others are held against.

N is the number of tokens of all sequences, one after the other without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional

# By the names that graphs have for them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda values: values,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda values: functional.gelu(values, approximate="tanh"),
}
# Of pairs of a query and a key; beyond that sequences are padded in groups.
_MOST_PADDING = 2


def linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """`activation(inputs @ weight.T + bias)`.

    Args:
        inputs: Shape: (N, inner).
        weight: of the inputs' dtype. Shape: (outputs, inner).
        bias: float32. Shape: (outputs,).
        activation: one of `ACTIVATIONS`.
        dtype: of the outputs: float32, or that of the inputs.

    Returns:
        Shape: (N, outputs).
    """
    products = functional.linear(inputs, weight, None if bias is None else bias.to(inputs.dtype))
    activated: Tensor = ACTIVATIONS[activation](products)
    return activated.to(dtype)


def linear_add(inputs: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`residual + inputs @ weight.T + bias`, in float32 as the residual is; see `linear`."""
    products = functional.linear(inputs, weight, None if bias is None else bias.to(inputs.dtype))
    return residual + products.float()


def norm(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Layer norm of rows; RMS norm where there is no bias.

    Args:
        inputs: float32. Shape: (N, D).
        weight: float32. Shape: (D,).
        bias: float32. Shape: (D,).
        epsilon: added to the variance, or to the mean square.
        dtype: of the second result.

    Returns:
        In float32, and the same rounded to the dtype. Shapes: (N, D).
    """
    if bias is None:
        normed = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + epsilon) * weight
    else:
        normed = functional.layer_norm(inputs, weight.shape, weight, bias, epsilon)
    return normed, normed.to(dtype, copy=True)


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    query_ends: Tensor,
    key_starts: Tensor,
    key_ends: Tensor,
    bias: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`softmax(scale * Q @ K.T + bias) @ V` of each sequence and head.

    Args:
        queries: float32, or of `dtype`; rows may lie apart. Shape: (N, heads * width).
        keys: of M tokens, likewise. Shape: (M, heads * width).
        values: Shape: (M, heads * width).
        query_starts: sequence b has the rows from here; this and the other three may be on the
            CPU where the queries are not. Shape: (B,).
        query_ends: to before here, where the next one starts. Shape: (B,).
        key_starts: its first key. Shape: (B,).
        key_ends: one beyond its last key; every sequence has keys. Shape: (B,).
        bias: added to a score, by how far the key stands behind the query (before it where
            negative): float32, of distances from -R to R, and beyond them as at them.
            Shape: (heads, 2 R + 1).
        heads: how many.
        scale: of scores.
        causal: whether query q sees keys 0 to q only.
        dtype: of the result.

    Returns:
        Shape: (N, heads * width).
    """
    device = queries.device
    attended = queries.new_zeros(queries.shape, dtype=dtype)
    for group in _alike(query_ends - query_starts, key_ends - key_starts):
        starts, ends = query_starts[group], query_ends[group]
        query_index, _ = _rectangle(starts, ends, device)
        key_index, is_key = _rectangle(key_starts[group], key_ends[group], device)
        padded = functional.scaled_dot_product_attention(
            _by_head(queries[query_index], heads),
            _by_head(keys[key_index], heads),
            _by_head(values[key_index], heads),
            attn_mask=_mask(query_index.shape[1], is_key, bias, causal).to(queries.dtype),
            scale=scale,
        )
        row, place = _row_and_place(ends - starts)
        token = (starts[row] + place).to(device)
        found = padded.transpose(1, 2).flatten(2)[row.to(device), place.to(device)]
        attended[token] = found.to(dtype)
    return attended


def _alike(num_queries: Tensor, num_keys: Tensor) -> list[Tensor | slice]:
    """Sequences that are padded to the longest among them, a group each.

    Where one is much longer than the others, they are not padded to it: in a group no length is
    twice another.
    """
    pairs = (num_queries * num_keys).sum()
    if len(num_queries) * num_queries.max() * num_keys.max() <= _MOST_PADDING * pairs:
        return [slice(None)]
    sizes = torch.stack([num_queries, num_keys]).float().frexp().exponent
    size = torch.where(num_queries > 0, 64 * sizes[0] + sizes[1], -1)
    return [torch.nonzero(size == one)[:, 0] for one in set(size.tolist()) - {-1}]


def _rectangle(starts: Tensor, ends: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of sequences, padded with row 0, and which of them are none of that. Shapes: (B, L)."""
    positions = torch.arange(int((ends - starts).max()), device=device)
    exists = positions < (ends - starts).to(device)[:, None]
    return torch.where(exists, starts.to(device)[:, None] + positions, 0), exists


def _mask(num_queries: int, is_key: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """What is added to scores: -inf, or a bias. Shape: (B, 1 or heads, queries, keys)."""
    device, num_keys = is_key.device, is_key.shape[1]
    positions = torch.arange(num_keys, device=device)
    distance = positions - torch.arange(num_queries, device=device)[:, None]
    mask = torch.zeros(len(is_key), 1, *distance.shape, device=device)
    if bias is not None:
        reach = bias.shape[1] // 2
        mask = mask + bias[:, distance.clamp(-reach, reach) + reach]
    mask = mask.masked_fill(~is_key[:, None, None], -torch.inf)
    return mask.masked_fill(distance > 0, -torch.inf) if causal else mask


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """Shape: (B, L, heads * width) to (B, heads, L, width)."""
    return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)


def _row_and_place(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each token, and where it stands in it. Shapes: (N,)."""
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = lengths.cumsum(0) - lengths
    return row, torch.arange(len(row), device=lengths.device) - starts[row]


# As graphs call them.
_LINEAR = library.custom_op("seqloss::linear", linear, mutates_args=())
_LINEAR_ADD = library.custom_op("seqloss::linear_add", linear_add, mutates_args=())
_NORM = library.custom_op("seqloss::norm", norm, mutates_args=())
_ATTENTION = library.custom_op("seqloss::attention", attention, mutates_args=())


@_LINEAR.register_fake
def _(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0], dtype=dtype)


@_LINEAR_ADD.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return torch.empty_like(residual)


@_NORM.register_fake
def _(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs), torch.empty_like(inputs, dtype=dtype)


@_ATTENTION.register_fake
def _(queries: Tensor, *others: Any) -> Tensor:
    return queries.new_empty(queries.shape[0], queries.shape[1], dtype=others[-1])
