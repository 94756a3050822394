"""How fast this machine multiplies matrices: the limit of everything else."""

from __future__ import annotations

import time

import torch

# Rows, columns, and what is summed over: a square, a feed-forward layer and its way back.
_SHAPES = ((2048, 2048, 2048), (1024, 512, 2048), (2048, 512, 1024))
_SECONDS = 0.3
_LEAST_REPEATS = 3
PRECISIONS = ("float32", "bfloat16")

GemmRates = dict[str, float]
"""Operations per second by precision; a multiply-add counts as two."""


class GemmTask:
    """Measures the rates in its worker process."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def warm_up(self) -> None:
        """Runs once."""
        self.run()

    def run(self) -> GemmRates:
        """The best rate over a few shapes."""
        return {
            precision: max(_rate(*shape, getattr(torch, precision)) for shape in _SHAPES)
            for precision in PRECISIONS
        }

    def close(self) -> None:
        """Nothing was started."""


@torch.inference_mode()
def _rate(rows: int, columns: int, inner: int, dtype: torch.dtype) -> float:
    """Of the fastest of some products, written as a linear layer's: its weight is transposed."""
    values = torch.randn(rows, inner).to(dtype)
    weight = torch.randn(columns, inner).to(dtype)
    product = torch.empty(rows, columns, dtype=dtype)
    fastest, repeats = float("inf"), 0
    end = time.perf_counter() + _SECONDS
    while repeats < _LEAST_REPEATS or time.perf_counter() < end:
        started = time.perf_counter()
        torch.matmul(values, weight.t(), out=product)
        fastest = min(fastest, time.perf_counter() - started)
        repeats += 1
    return 2 * rows * columns * inner / fastest
