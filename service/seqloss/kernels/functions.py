"""The kernels' functions on tensors. They trust what they are given: whoever calls them checks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqloss.errors import KernelsUnavailableError
from seqloss.kernels.build import instructions

_ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}

# See kernels/cpu/outcome.h.
_WRONG_ROWS, _NO_MEMORY = 1, 2

_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "pack": [_P, _P, _N, _N, _I],
    "linear": [*[_P] * 6, _N, _N, _N, _I, _I],
    "norm": [_P, _P, _P, _P, _P, _N, _N, _F, _I],
    "attention": [*[_P] * 4, *[_N] * 3, *[_P] * 5, *[_N] * 6, _F, _I, _I],
    "head": [*[_P] * 10, _N, _N, _N, _I],
    "label_logits": [*[_P] * 5, _N, _N, _I],
}


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight as the kernels read it.

    Attributes:
        values: Shape: (panels, inner * width), with the width of the library's panels.
        rows: of the weight: columns of products.
        inner: what is summed over.
    """

    values: Tensor
    rows: int
    inner: int


@dataclass(frozen=True, slots=True)
class ClassSums:
    """Sums over the classes but the label, with d = z - z_label. Shapes: (K,).

    Attributes:
        nlls: log(1 + total), float32.
        totals: of exp(d), float64.
        weighted: of exp(d) d, float64.
        ranks: how many d are positive, int32.
        leads: the largest d, float32; meaningless where that is below -100.
    """

    nlls: Tensor
    totals: Tensor
    weighted: Tensor
    ranks: Tensor
    leads: Tensor


class HeadTokens(NamedTuple):
    """What the head is asked for. Shapes: (K, D) and (K,).

    Attributes:
        hidden: in the dtype of the products.
        label_logits: float32; of another number in their place, sums are relative to it.
        labels: the classes that sums leave out, int64.
    """

    hidden: Tensor
    label_logits: Tensor
    labels: Tensor


class AttentionSettings(NamedTuple):
    """The last arguments of `seqloss.model.operators.attention`."""

    bias: Tensor | None
    heads: int
    scale: float
    causal: bool
    dtype: torch.dtype


class KernelLibrary:
    """The functions of one compiled library, for the dtypes that its CPU has.

    Attributes:
        lanes: how many floats the CPU computes at a time; what kernels write rows in.
        panel_width: how many outputs of a product stand together.
    """

    def __init__(self, path: Path) -> None:
        """Loads it into the process; Torch must be there already, whose OpenMP it uses.

        Raises:
            KernelsUnavailableError: it is broken.
        """
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelsUnavailableError(f"{path} does not load; remove it: {error}") from error
        self.lanes: int = self._library.lanes()
        self.panel_width: int = self._library.panel_width()
        self._has_amx = "amx_bf16" in instructions()
        self._functions: dict[tuple[str, torch.dtype], Callable[..., int]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            suffix = str(dtype).removeprefix("torch.")
            for name, arguments in _ARGUMENTS.items():
                if function := getattr(self._library, f"{name}_{suffix}", None):
                    function.argtypes = arguments
                    self._functions[name, dtype] = function

    def has(self, dtype: torch.dtype) -> bool:
        """Whether there are kernels for the dtype."""
        return ("linear", dtype) in self._functions

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether products are for them: oneDNN has those of a unit that they do not use."""
        return self.has(dtype) and not (dtype == torch.bfloat16 and self._has_amx)

    def pack(self, weight: Tensor) -> Panels:
        """Shape of the weight: (rows, inner); bfloat16 ones have an even inner size."""
        weight = weight.detach().contiguous()
        rows, inner = weight.shape
        values = weight.new_empty(-(-rows // self.panel_width), inner * self.panel_width)
        self._functions["pack", weight.dtype](
            weight.data_ptr(), values.data_ptr(), rows, inner, torch.get_num_threads()
        )
        return Panels(values, rows, inner)

    def linear(
        self,
        inputs: Tensor,
        panels: Panels,
        bias: Tensor,
        activation: str,
        outputs: Tensor,
        residual: Tensor | None = None,
    ) -> None:
        """`activation(inputs @ weight.T + bias)`, or with a residual the sum with it.

        Args:
            inputs: Shape: (N, inner).
            panels: of the weight.
            bias: float32, as long as the panels.
            activation: one of `seqloss.model.operators.ACTIVATIONS`; none with a residual.
            outputs: where it goes; float32, or without a residual of the inputs' dtype.
            residual: float32. Shape: that of the outputs.
        """
        rounds = outputs.dtype == torch.bfloat16
        self._functions["linear", inputs.dtype](
            inputs.data_ptr(),
            panels.values.data_ptr(),
            bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            outputs.data_ptr() if rounds else None,
            None if rounds else outputs.data_ptr(),
            len(inputs),
            panels.inner,
            panels.rows,
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
        )

    def norm(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
        normed: Tensor | None,
        rounded: Tensor | None,
    ) -> None:
        """Layer norm, or RMS norm without a bias, into either or both of two tensors."""
        dtype = torch.float32 if rounded is None else rounded.dtype
        self._functions["norm", dtype](
            inputs.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if normed is None else normed.data_ptr(),
            None if rounded is None else rounded.data_ptr(),
            *inputs.shape,
            epsilon,
            torch.get_num_threads(),
        )

    def attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bounds: Sequence[Tensor],
        how: AttentionSettings,
    ) -> Tensor | None:
        """See `seqloss.model.operators.attention`.

        Args:
            queries: float32; rows may lie apart. Shape: (N, heads * width).
            keys: likewise. Shape: (M, heads * width).
            values: likewise. Shape: (M, heads * width).
            bounds: starts and ends of queries, then of keys; int64. Shapes: (B,).
            how: all that is not the batch's.

        Returns:
            None where sequences name rows beyond the end. Shape: (N, heads * width).

        Raises:
            MemoryError: there is too little.
        """
        attended = queries.new_empty(queries.shape, dtype=how.dtype)
        outcome = self._functions["attention", how.dtype](
            queries.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            attended.data_ptr(),
            queries.stride(0),
            keys.stride(0),
            values.stride(0),
            *(bound.data_ptr() for bound in bounds),
            None if how.bias is None else how.bias.data_ptr(),
            0 if how.bias is None else how.bias.shape[1] // 2,
            len(bounds[0]),
            len(queries),
            len(keys),
            how.heads,
            queries.shape[1] // how.heads,
            how.scale,
            how.causal,
            torch.get_num_threads(),
        )
        _require_memory(outcome)
        return None if outcome == _WRONG_ROWS else attended

    def label_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """`(hidden * weight[labels]).sum(-1) + bias[labels]` in float32. Shape: (K,)."""
        logits = hidden.new_empty(len(hidden))
        self._functions["label_logits", weight.dtype](
            hidden.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            labels.data_ptr(),
            logits.data_ptr(),
            *hidden.shape,
            torch.get_num_threads(),
        )
        return logits

    def nlls(self, tokens: HeadTokens, panels: Panels, bias: Tensor) -> Tensor:
        """-log softmax of the labels, in one pass over the vocabulary. Shape: (K,), float32.

        Args:
            tokens: what is asked for.
            panels: of the output projection.
            bias: float32, as long as the panels.

        Raises:
            MemoryError: there is too little.
        """
        nlls = torch.empty_like(tokens.label_logits)
        self._head(tokens, panels, bias, (nlls, None, None, None, None))
        return nlls

    def class_sums(self, tokens: HeadTokens, panels: Panels, bias: Tensor) -> ClassSums:
        """The same, with all that ranks and entropies are made of."""
        like = tokens.label_logits
        sums = ClassSums(
            torch.empty_like(like),
            torch.empty_like(like, dtype=torch.float64),
            torch.empty_like(like, dtype=torch.float64),
            torch.empty_like(like, dtype=torch.int32),
            torch.empty_like(like),
        )
        outputs = (sums.nlls, sums.totals, sums.weighted, sums.ranks, sums.leads)
        self._head(tokens, panels, bias, outputs)
        return sums

    def _head(
        self,
        tokens: HeadTokens,
        panels: Panels,
        bias: Tensor,
        outputs: tuple[Tensor | None, ...],
    ) -> None:
        outcome = self._functions["head", tokens.hidden.dtype](
            tokens.hidden.data_ptr(),
            tokens.label_logits.data_ptr(),
            tokens.labels.data_ptr(),
            panels.values.data_ptr(),
            bias.data_ptr(),
            *(None if output is None else output.data_ptr() for output in outputs),
            *tokens.hidden.shape,
            len(panels.values),
            torch.get_num_threads(),
        )
        _require_memory(outcome)


def _require_memory(outcome: int) -> None:
    if outcome == _NO_MEMORY:
        raise MemoryError("a kernel has no memory for its sums")
