"""The whole contract between the service and whatever runs a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from seqloss.bundle.manifest import EngineName, Precision
from seqloss.records import Batch, TokenTerms


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What runs the model, where, in which precision.

    Attributes:
        engine: the runtime.
        device: `cpu` or `cuda:N`.
        precision: of matrix products.
        version: the runtime's.
        source_multiple: sources are padded to multiples of it; see `bundle.manifest.Graph`.
        makes_logits: whether memory grows with target tokens times classes; see there too.
        is_packed: whether it computes no padding.
        has_kernels: whether it runs on kernels that were compiled for this CPU.
        is_batch_invariant: whether a pair's terms are the same bits whoever shares its batch.
    """

    engine: EngineName
    device: str
    precision: Precision
    version: str
    source_multiple: int = 1
    makes_logits: bool = False
    is_packed: bool = False
    has_kernels: bool = False
    is_batch_invariant: bool = False


class Engine(Protocol):
    """One model on one device. Not thread-safe: one call at a time."""

    @property
    def info(self) -> EngineInfo:
        """What runs the model, where, in which precision; it may gain kernels on the way."""
        ...

    def score(self, batch: Batch) -> TokenTerms:
        """The terms of the batch's K counted tokens, in the order of `batch.labels[counted]`.

        Raises:
            OutOfMemoryError: the batch does not fit; a smaller one may. The engine lives on.
            EngineDeadError: no call will succeed until the process is started again.
        """
        ...

    def release_memory(self) -> None:
        """Gives back what is cached and not in use, after a batch that did not fit."""
        ...

    def memory_bytes(self) -> Mapping[str, int]:
        """The device's memory by kind: `used` by the model and its batches, `cached` beside it."""
        ...

    def close(self) -> None:
        """Frees the device's memory; no call follows."""
        ...
