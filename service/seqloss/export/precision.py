"""A model whose matrix products run in 16 bits, and nothing else.

Only the linear layers are lowered: weights are cast once, inputs as they come. What is added up
layer by layer (the residual stream), norms and embeddings stay in float32, and a linear layer's
16-bit output turns into float32 where it is added to the stream.  Softmaxes of attention are
float32 inside Torch's kernels.  Lowering the stream too was measured to cost accuracy and to gain
about a tenth in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class LoweredLinear(nn.Module):
    """A linear layer that multiplies in 16 bits, whatever the precision of its inputs."""

    def __init__(self, original: nn.Linear, dtype: torch.dtype, *, widen: bool) -> None:
        super().__init__()
        self._widen = widen
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight = _cast(original.weight, dtype)
        self.bias = None if original.bias is None else _cast(original.bias, dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape: (..., in_features) to (..., out_features)."""
        outputs = linear(inputs.to(self.weight.dtype), self.weight, self.bias)
        return outputs.float() if self._widen else outputs


@contextmanager
def lowered(module: nn.Module, dtype: torch.dtype, *, widen: bool = False) -> Iterator[None]:
    """Within the block all linear layers below `module` compute in `dtype`.

    Layers keep their names, so that the lowered weights are called as the original ones are.

    Args:
        module: the model, as it is again after the block.
        dtype: bfloat16 or float16; with float32 nothing is done.
        widen: whether outputs are float32 at once, so that the model's own code meets no other.
    """
    if dtype == torch.float32:
        yield
        return
    swapped = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    cast: dict[nn.Linear, LoweredLinear] = {}
    try:
        for parent, name, child in swapped:
            if child not in cast:
                cast[child] = LoweredLinear(child, dtype, widen=widen)
            setattr(parent, name, cast[child])
        yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)


def _cast(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
