"""The way of a batch's arrays onto a GPU, and of its terms back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqloss.engines.layout import HOST_INPUTS, PackedInputs, PaddedInputs
from seqloss.records import Int64Array


class CudaStaging:
    """One copy for all inputs of a batch, one for all its terms, and one wait for both.

    Copies go through pinned memory. Torch's allocator keeps such buffers, and hands one out again
    only after the copy that reads it has ended: batches that follow each other take turns with two.
    """

    def __init__(self, device: torch.device) -> None:
        """Of another device than CUDA memory is not pinned, and all the rest is the same."""
        self._device = device
        self._pins = device.type == "cuda"

    def inputs(self, arrays: PackedInputs | PaddedInputs) -> list[Tensor]:
        """The same as tensors, on the device but for a packed graph's `HOST_INPUTS`."""
        given = {name: getattr(arrays, name) for name in arrays.__slots__}
        stay = HOST_INPUTS if isinstance(arrays, PackedInputs) else frozenset[str]()
        views = iter(self._moved([given[name] for name in given if name not in stay]))
        return [
            torch.from_numpy(array) if name in stay else next(views)
            for name, array in given.items()
        ]

    def terms(self, tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
        """Arrays of what was computed; waits until it is.

        Args:
            tensors: float32 or int32. Shapes: (K,).
        """
        together = torch.stack([tensor.view(torch.int32) for tensor in tensors])
        landed = torch.empty(together.shape, dtype=torch.int32, pin_memory=self._pins)
        landed.copy_(together, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        rows: NDArray[np.int32] = landed.numpy()
        return [
            row.view(np.float32) if tensor.dtype == torch.float32 else row
            for row, tensor in zip(rows, tensors, strict=True)
        ]

    def _moved(self, arrays: Sequence[Int64Array]) -> list[Tensor]:
        sizes = [array.size for array in arrays]
        together = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=self._pins)
        np.concatenate([array.ravel() for array in arrays], out=together.numpy())
        parts = torch.split(together.to(self._device, non_blocking=True), sizes)
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
