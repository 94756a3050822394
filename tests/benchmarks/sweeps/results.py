"""Measurements of sweeps, and what is computed from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from benchmarks.gemm import GemmRates
from benchmarks.machine import Machine, Origin
from benchmarks.sweeps.catalogue import Point, Sweep
from benchmarks.sweeps.task import Work


@dataclass(slots=True)
class PointResult:
    """One point in one precision.

    Attributes:
        point: what was measured.
        precision: of matrix products.
        work: what its pairs are; None until they were scored once.
        seconds: of each round.
        failure: why it is left out; empty where it is not.
    """

    point: Point
    precision: str
    work: Work | None = None
    seconds: list[float] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """A point over all rounds.

    Attributes:
        value: on the axis.
        precision: of matrix products.
        cost_micros: microseconds per token; the median.
        least_cost_micros, largest_cost_micros: of the rounds.
        limit_share: the least time that the pairs' matrix products take at the machine's largest
            GEMM rate of the same round, over the measured time; the median.
        peak_bytes: the most memory, see `Memory`.
        growth_bytes: how far that is above what was held before.
    """

    value: int
    precision: str
    cost_micros: float
    least_cost_micros: float
    largest_cost_micros: float
    limit_share: float
    peak_bytes: int | None
    growth_bytes: int | None


@dataclass(frozen=True, slots=True)
class SweepResult:
    """All points of a sweep, in the order of precisions and values; rates are of each round."""

    sweep: Sweep
    points: list[PointResult]
    gemm_rates: list[GemmRates]

    @property
    def unit(self) -> str:
        """What the cost is of."""
        token = "source or target token" if self.sweep.counts_sources else "target token"
        return f"µs per {token}"

    def summaries(self) -> list[Summary]:
        """One for each point that was measured."""
        return [
            self._summary(entry, entry.work)
            for entry in self.points
            if entry.work is not None and not entry.failure
        ]

    def _summary(self, entry: PointResult, work: Work) -> Summary:
        tokens = work.target_tokens + self.sweep.counts_sources * work.source_tokens
        costs = [seconds / tokens * 1e6 for seconds in entry.seconds]
        shares = [
            work.operations / max(rates.values()) / seconds
            for rates, seconds in zip(self.gemm_rates, entry.seconds, strict=True)
        ]
        held, peak = work.memory.held_bytes, work.memory.peak_bytes
        return Summary(
            value=entry.point.value,
            precision=entry.precision,
            cost_micros=median(costs),
            least_cost_micros=min(costs),
            largest_cost_micros=max(costs),
            limit_share=median(shares),
            peak_bytes=peak,
            growth_bytes=None if held is None or peak is None else peak - held,
        )


@dataclass(frozen=True, slots=True)
class Results:
    """All sweeps of a run."""

    started_at: str
    origin: Origin
    machine: Machine
    device: str
    threads: int
    rounds: int
    sweeps: list[SweepResult]
