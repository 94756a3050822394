"""A packed graph's operators as modules that call the kernels.

A graph may be a stranger's, and kernels read memory as they are told: sizes are held against one
another here, in each call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqloss.errors import BundleError
from seqloss.kernels.functions import AttentionSettings, KernelLibrary


class CompiledLinear(nn.Module):
    """`seqloss::linear` and, with a residual, `seqloss::linear_add`."""

    def __init__(
        self,
        library: KernelLibrary,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        _require(dtype in (torch.float32, weight.dtype), "a product's dtypes")
        self._library, self._activation, self._outputs = library, activation, dtype
        self._panels = library.pack(weight)
        _require(bias is None or bias.shape == weight.shape[:1], "a bias")
        self._bias = torch.zeros(len(self._panels.values) * library.panel_width)
        if bias is not None:
            self._bias[: len(bias)] = bias
        self._dtype = weight.dtype

    @staticmethod
    def fits(library: KernelLibrary, weight: Tensor) -> bool:
        """Whether there is a kernel for the weight."""
        if weight.dim() != 2 or not library.multiplies(weight.dtype):
            return False
        return weight.shape[0] % library.lanes == 0 and weight.shape[1] % 2 == 0

    def forward(self, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        """Shapes: (N, inner) and (N, outputs) to (N, outputs)."""
        _require(
            _is_here(inputs)
            and inputs.dtype == self._dtype
            and inputs.shape[1:] == (self._panels.inner,),
            "a product",
        )
        shape = (len(inputs), self._panels.rows)
        outputs = inputs.new_empty(shape, dtype=self._outputs)
        if residual is not None:
            _require(
                _is_here(residual) and residual.dtype == torch.float32 and residual.shape == shape,
                "a residual",
            )
            residual = residual.contiguous()
        self._library.linear(
            inputs.contiguous(), self._panels, self._bias, self._activation, outputs, residual
        )
        return outputs


class CompiledNorm(nn.Module):
    """`seqloss::norm`, of which a graph may use only one of two results."""

    def __init__(
        self,
        library: KernelLibrary,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
        dtype: torch.dtype,
        wanted: frozenset[int],
    ) -> None:
        super().__init__()
        vectors = [weight] if bias is None else [weight, bias]
        _require(
            all(one.dtype == torch.float32 and one.shape == weight.shape for one in vectors),
            "a norm's weights",
        )
        self._library, self._weight, self._bias = library, weight.contiguous(), bias
        self._epsilon, self._dtype = epsilon, dtype
        # In float32 both results are the same.
        self._one = dtype == torch.float32
        self._values, self._rounded = self._one or 0 in wanted, not self._one and 1 in wanted

    @staticmethod
    def fits(library: KernelLibrary, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for the norm."""
        return library.has(dtype) and weight.dim() == 1 and len(weight) % library.lanes == 0

    def forward(self, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Shape: (N, D) to both of (N, D), as far as they are wanted."""
        _require(
            _is_here(inputs)
            and inputs.dtype == torch.float32
            and inputs.shape[1:] == self._weight.shape,
            "a norm",
        )
        inputs = inputs.contiguous()
        values = torch.empty_like(inputs) if self._values else None
        rounded = torch.empty_like(inputs, dtype=self._dtype) if self._rounded else None
        self._library.norm(inputs, self._weight, self._bias, self._epsilon, values, rounded)
        return values, values if self._one else rounded


class CompiledAttention(nn.Module):
    """`seqloss::attention`."""

    def __init__(self, library: KernelLibrary, how: AttentionSettings) -> None:
        super().__init__()
        self._library = library
        bias = how.bias
        _require(how.heads > 0 and (bias is None or len(bias) == how.heads), "an attention's bias")
        _require(
            bias is None
            or (bias.dtype == torch.float32 and bias.dim() == 2 and bias.shape[1] % 2 == 1),
            "an attention's bias",
        )
        self._how = how._replace(bias=None if bias is None else bias.contiguous())

    @staticmethod
    def fits(library: KernelLibrary, width: int, how: AttentionSettings) -> bool:
        """Whether there is a kernel for queries of the width, all heads together."""
        return width % (how.heads * library.lanes) == 0 and library.has(how.dtype)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, *bounds: Tensor) -> Tensor:
        """Starts and ends of queries and keys; see `seqloss.model.operators.attention`."""
        _require(
            all(map(_is_here, (queries, keys, values, *bounds)))
            and all(map(_has_rows, (queries, keys, values)))
            and queries.shape[1] % (self._how.heads * self._library.lanes) == 0
            and queries.shape[1] == keys.shape[1]
            and keys.shape == values.shape
            and all(bound.dtype == torch.int64 and bound.dim() == 1 for bound in bounds)
            and len({len(bound) for bound in bounds}) == 1,
            "an attention",
        )
        bounds = tuple(bound.contiguous() for bound in bounds)
        attended = self._library.attention(queries, keys, values, bounds, self._how)
        if attended is None:
            raise BundleError("a graph has sequences of rows that are not there")
        return attended


def _is_here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _has_rows(tensor: Tensor) -> bool:
    """Whether it is rows of floats, some at least in each, that do not overlap."""
    return (
        tensor.dim() == 2
        and tensor.dtype == torch.float32
        and tensor.shape[1] > 0
        and tensor.stride(1) == 1
        and (len(tensor) <= 1 or tensor.stride(0) >= tensor.shape[1])
    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise BundleError(f"a graph has sizes or dtypes that do not belong together: {what}")
