"""Time and memory of something that a device does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Together they take at least this long, and the fastest of some such groups counts.
_GROUP_SECONDS = 0.05
_NUM_GROUPS = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one call.

    Attributes:
        seconds: without the host's part, as long as that is less.
        growth_bytes: the most memory of tensors, above what was held before; None on a CPU.
    """

    seconds: float
    growth_bytes: int | None


def measured(work: Callable[[], object], device: torch.device) -> Measured:
    """Calls it again and again; a GPU is never waited for within a group."""
    work()  # kernels are compiled, and memory is fetched
    growth = _growth(work, device) if device.type == "cuda" else None
    once = _seconds(work, 1, device)
    calls = max(1, min(1000, round(_GROUP_SECONDS / once)))
    groups = [_seconds(work, calls, device) / calls for _ in range(_NUM_GROUPS)]
    return Measured(min(groups), growth)


def _seconds(work: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    _wait(device)
    return time.perf_counter() - started


def _growth(work: Callable[[], object], device: torch.device) -> int:
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    work()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - held


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
