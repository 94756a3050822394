"""Measurements, and what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from benchmarks.gemm import GemmRates
from benchmarks.independence import IndependenceResult
from benchmarks.machine import Machine, Origin
from benchmarks.memory import MemoryResult
from benchmarks.scoring import Choice, Run, Variant


@dataclass(frozen=True, slots=True)
class WorkloadSummary:
    """What was scored: see `benchmarks.workload.Workload`."""

    model: str
    scale: float
    num_pairs: int
    source_tokens: int
    target_tokens: int
    lengths_from: str
    mean_nll: float
    operations: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run, in one round; the fields are those of `benchmarks.scoring.Run`."""

    seconds: float
    peak_resident_bytes: int | None
    minor_page_faults: int | None


@dataclass(slots=True)
class Outcome:
    """What became of a variant.

    Attributes:
        name, precision, without_pad: of the variant.
        choice: its setting.
        measurements: one per round.
        max_error, mean_error: of the pairs' mean nlls against transformers in float32, in nats.
        failure: why it is left out; empty where it is not.
    """

    name: str
    precision: str
    without_pad: bool
    choice: Choice
    measurements: list[Measurement] = field(default_factory=list)
    max_error: float | None = None
    mean_error: float | None = None
    failure: str = ""

    @classmethod
    def of(cls, variant: Variant) -> Outcome:
        """Of a variant that has not run yet."""
        return cls(variant.name, variant.precision, variant.without_pad, Choice({}, []))

    def add(self, run: Run, expected_nlls: Sequence[float]) -> None:
        """Takes a round's run."""
        self.measurements.append(
            Measurement(run.seconds, run.peak_resident_bytes, run.minor_page_faults)
        )
        errors = [abs(a - b) for a, b in zip(run.mean_nlls, expected_nlls, strict=True)]
        self.max_error, self.mean_error = max(errors), fmean(errors)

    @property
    def seconds(self) -> list[float]:
        """Of each round."""
        return [measurement.seconds for measurement in self.measurements]


@dataclass(frozen=True, slots=True)
class Summary:
    """A variant over all rounds.

    Attributes:
        name: of the variant.
        median_seconds, least_seconds, largest_seconds: of the rounds.
        pairs_per_second, target_tokens_per_second: at the median.
        bfloat16_limit_share: the least time that the pairs' matrix products take at the GEMM rate
            of the same round, over the measured time; the median.
        float32_limit_share: the same with the other rate; None for other precisions.
        peak_resident_bytes: the most of all rounds; None where it is not known.
        minor_page_faults: the median; None where it is not known.
    """

    name: str
    median_seconds: float
    least_seconds: float
    largest_seconds: float
    pairs_per_second: float
    target_tokens_per_second: float
    bfloat16_limit_share: float
    float32_limit_share: float | None
    peak_resident_bytes: int | None
    minor_page_faults: int | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as the second variant the first one is: the median over rounds."""

    first: str
    second: str
    value: float
    least: float
    largest: float


@dataclass(frozen=True, slots=True)
class Results:
    """All of a run of the benchmark."""

    started_at: str
    origin: Origin
    machine: Machine
    threads: int
    rounds: int
    workload: WorkloadSummary
    outcomes: list[Outcome]
    gemm_rates: list[GemmRates]
    memory: list[MemoryResult]
    independence: list[IndependenceResult]

    @property
    def measured(self) -> list[Outcome]:
        """The variants that are not left out."""
        return [outcome for outcome in self.outcomes if not outcome.failure]

    def summaries(self) -> list[Summary]:
        """One per variant that was measured."""
        return [self._summary(outcome) for outcome in self.measured]

    def _summary(self, outcome: Outcome) -> Summary:
        middle = median(outcome.seconds)
        peaks = [entry.peak_resident_bytes for entry in outcome.measurements]
        faults = [entry.minor_page_faults for entry in outcome.measurements]
        float32 = outcome.precision == "float32"
        return Summary(
            name=outcome.name,
            median_seconds=middle,
            least_seconds=min(outcome.seconds),
            largest_seconds=max(outcome.seconds),
            pairs_per_second=self.workload.num_pairs / middle,
            target_tokens_per_second=self.workload.target_tokens / middle,
            bfloat16_limit_share=self._limit_share(outcome, "bfloat16"),
            float32_limit_share=self._limit_share(outcome, "float32") if float32 else None,
            peak_resident_bytes=max(filter(None, peaks), default=None),
            minor_page_faults=_median_or_none(faults),
        )

    def _limit_share(self, outcome: Outcome, precision: str) -> float:
        return median(
            self.workload.operations / rates[precision] / seconds
            for rates, seconds in zip(self.gemm_rates, outcome.seconds, strict=True)
        )

    def ratios(self) -> list[Ratio]:
        """Those that people ask for, as far as both sides were measured."""
        pairs = [
            ("seqloss ONNX int8", "CTranslate2 int8"),
            ("seqloss ONNX int8", "seqloss bfloat16"),
            ("seqloss ONNX float32", "CTranslate2 float32"),
            ("seqloss ONNX float32", "seqloss float32"),
            ("seqloss bfloat16", "CTranslate2 int8"),
            ("seqloss bfloat16", "transformers bfloat16, sorted"),
            ("seqloss bfloat16", "seqloss float32"),
            ("seqloss float32", "CTranslate2 float32"),
            ("seqloss float32", "transformers float32, sorted"),
            ("seqloss float32", "transformers float32, given order"),
            ("seqloss HTTP ONNX int8", "seqloss ONNX int8"),
            ("seqloss HTTP bfloat16", "seqloss bfloat16"),
            ("seqloss HTTP float32", "seqloss float32"),
        ]
        measured = {outcome.name: outcome for outcome in self.measured}
        return [
            _ratio(measured[first], measured[second])
            for first, second in pairs
            if first in measured and second in measured
        ]


def _median_or_none(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return int(median(known)) if known else None


def _ratio(first: Outcome, second: Outcome) -> Ratio:
    values = [b / a for a, b in zip(first.seconds, second.seconds, strict=True)]
    return Ratio(first.name, second.name, median(values), min(values), max(values))
