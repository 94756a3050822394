"""How fast this machine multiplies matrices: the limit of everything else."""

from __future__ import annotations

import time

import torch

# Rows, columns, and what is summed over: a square, a feed-forward layer and its way back. A GPU is
# filled by larger ones only.
_SHAPES = {
    "cpu": ((2048, 2048, 2048), (1024, 512, 2048), (2048, 512, 1024)),
    "cuda": ((8192, 8192, 8192), (4096, 4096, 16384), (16384, 4096, 4096)),
}
_SECONDS = 0.3
_LEAST_REPEATS = 3
PRECISIONS = ("float32", "bfloat16")

GemmRates = dict[str, float]
"""Operations per second by precision; a multiply-add counts as two."""


class GemmTask:
    """Measures the rates in its worker process."""

    def __init__(self, threads: int, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        self._device = torch.device(device)

    def warm_up(self) -> None:
        """Runs once."""
        self.run()

    def run(self) -> GemmRates:
        """The best rate over a few shapes."""
        shapes = _SHAPES[self._device.type]
        return {
            precision: max(
                _rate(shape, getattr(torch, precision), self._device) for shape in shapes
            )
            for precision in PRECISIONS
        }

    def close(self) -> None:
        """Nothing was started."""


@torch.inference_mode()
def _rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Of the fastest of some products, written as a linear layer's: its weight is transposed."""
    rows, columns, inner = shape
    values = torch.randn(rows, inner).to(device, dtype)
    weight = torch.randn(columns, inner).to(device, dtype)
    product = torch.empty(rows, columns, dtype=dtype, device=device)
    fastest, repeats = float("inf"), 0
    end = time.perf_counter() + _SECONDS
    while repeats < _LEAST_REPEATS or time.perf_counter() < end:
        started = time.perf_counter()
        torch.matmul(values, weight.t(), out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
        repeats += 1
    return 2 * rows * columns * inner / fastest
