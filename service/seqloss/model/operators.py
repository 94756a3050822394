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
    num_queries, num_keys = query_ends - query_starts, key_ends - key_starts
    row, place = (index.to(queries.device) for index in _row_and_place(num_queries))
    padded = queries.new_zeros(len(num_queries), int(num_queries.max()), queries.shape[1])
    padded[row, place] = queries
    positions = torch.arange(int(num_keys.max()), device=keys.device)
    exists = positions < num_keys.to(keys.device)[:, None]
    index = torch.where(exists, key_starts.to(keys.device)[:, None] + positions, 0)
    distance = positions - torch.arange(padded.shape[1], device=keys.device)[:, None]
    mask = torch.zeros(len(num_queries), 1, *distance.shape, device=keys.device)
    if bias is not None:
        reach = bias.shape[1] // 2
        mask = mask + bias[:, distance.clamp(-reach, reach) + reach]
    mask = mask.masked_fill(~exists[:, None, None], -torch.inf)
    if causal:
        mask = mask.masked_fill(distance > 0, -torch.inf)
    attended = functional.scaled_dot_product_attention(
        _by_head(padded, heads),
        _by_head(keys[index], heads),
        _by_head(values[index], heads),
        attn_mask=mask.to(queries.dtype),
        scale=scale,
    )
    return attended.transpose(1, 2).flatten(2)[row, place].to(dtype)


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
