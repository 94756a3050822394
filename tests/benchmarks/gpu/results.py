"""What was measured, and what is computed from that."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.machine import Machine, Origin


@dataclass(frozen=True, slots=True)
class ProductRate:
    """One matrix product in bfloat16; a multiply-add counts as two operations."""

    name: str
    rows: int
    columns: int
    inner: int
    seconds: float

    @property
    def rate(self) -> float:
        """Operations per second."""
        return 2 * self.rows * self.columns * self.inner / self.seconds


@dataclass(frozen=True, slots=True)
class HeadRun:
    """One way from hidden states to losses, for the classes of one model.

    Attributes:
        name: of the way.
        seconds: of one call.
        growth_bytes: the most memory beside weights and states; None on a CPU.
    """

    name: str
    seconds: float
    growth_bytes: int | None


@dataclass(slots=True)
class BulkRun:
    """One way to score all pairs.

    Attributes:
        name: of the way.
        setting: its batches.
        seconds: of each round.
        peak_bytes: the most memory of tensors, the model's included; None on a CPU.
        failure: why it is left out; empty where it is not.
    """

    name: str
    setting: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Latency:
    """One pair after the other through HTTP."""

    num_requests: int
    p50_seconds: float
    p95_seconds: float


@dataclass(frozen=True, slots=True)
class ModelResult:
    """All that was measured of one model.

    Attributes:
        name: in `benchmarks.models.MODELS`.
        num_pairs: that were scored.
        source_tokens: of these.
        target_tokens: of these.
        operations: of their matrix products, without padding.
        rates: of products as the model has them.
        head: see `HeadRun`.
        head_tokens: in its call.
        bulk: see `BulkRun`; seqloss's in the order of batch sizes, then the others.
        latency: see `Latency`; None where the server failed.
    """

    name: str
    num_pairs: int
    source_tokens: int
    target_tokens: int
    operations: int
    rates: list[ProductRate]
    head: list[HeadRun]
    head_tokens: int
    bulk: list[BulkRun]
    latency: Latency | None


@dataclass(frozen=True, slots=True)
class Results:
    """A run."""

    started_at: str
    origin: Origin
    machine: Machine
    gpu: str
    rounds: int
    square: ProductRate
    models: list[ModelResult]
