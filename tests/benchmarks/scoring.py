"""What all variants have in common: they score the same pairs, and are measured the same way.

Timed is the whole way from lists of ids to one nll per pair.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks import resources
from benchmarks.pairs import Pairs
from benchmarks.workload import Workload
from seqloss.bundle.manifest import EngineName

Setting = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Setup:
    """What was prepared for the scorers, and how they shall run.

    Attributes:
        checkpoint: the model for transformers.
        bundles: the model for seqloss, by engine.
        ctranslate2: where the model for CTranslate2 is, or shall be made.
        workload: a file of pairs.
        threads: for matrix products.
        sweep_pairs: how many pairs a setting is tried on.
    """

    checkpoint: Path
    bundles: Mapping[EngineName, Path]
    ctranslate2: Path
    workload: Path
    threads: int
    sweep_pairs: int


class Scorer(Protocol):
    """One way to score pairs."""

    @property
    def pid(self) -> int:
        """The process that computes: another one where it is a server."""
        ...

    @property
    def candidates(self) -> Sequence[Setting]:
        """Settings to choose the fastest of; one where there is no choice."""
        ...

    def use(self, setting: Setting) -> None:
        """Adopts one of the candidates."""
        ...

    def score(self, pairs: Pairs) -> list[float]:
        """The mean nll of each pair's tokens."""
        ...

    def close(self) -> None:
        """Ends what it started."""
        ...


@dataclass(frozen=True, slots=True)
class Variant:
    """A scorer by name.

    Attributes:
        name: what it is called in tables.
        precision: of its arithmetic.
        module: where its `make` is, in `benchmarks.scorers`.
        options: the arguments of `make` beside the setup.
        without_pad: whether its softmax lacks the pad class.
    """

    name: str
    precision: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    without_pad: bool = False


# In a table Torch's is just seqloss.
ENGINE_WORDS: dict[EngineName, str] = {"torch": "", "onnx": " ONNX"}


def catalogue(
    precisions: Mapping[EngineName, Sequence[str]], ctranslate2_drops_pad: bool
) -> list[Variant]:
    """All variants, given the precisions of seqloss's engines."""
    seqloss = [
        Variant(
            f"{name}{ENGINE_WORDS[engine]} {precision}",
            precision,
            module,
            {"engine": engine, "precision": precision},
        )
        for name, module in (("seqloss", "in_process"), ("seqloss HTTP", "over_http"))
        for engine in precisions
        for precision in precisions[engine]
    ]
    transformers = [
        Variant(
            f"transformers {precision}, {'sorted' if by_length else 'given order'}",
            precision,
            "with_transformers",
            {"precision": precision, "by_length": by_length},
        )
        for precision, by_length in (("float32", False), ("float32", True), ("bfloat16", True))
    ]
    ctranslate2 = [
        Variant(
            f"CTranslate2 {precision}",
            precision,
            "with_ctranslate2",
            {"precision": precision},
            without_pad=ctranslate2_drops_pad,
        )
        for precision in ("float32", "int8")
    ]
    return [*seqloss, *transformers, *ctranslate2]


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting that was tried in the warm-up, on some of the pairs."""

    setting: Setting
    seconds: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The setting that is measured, and what it was chosen from; empty where nothing was."""

    setting: Setting
    trials: list[Trial]


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement.

    Attributes:
        seconds: for all pairs.
        peak_resident_bytes: the most memory that the computing process had meanwhile.
        minor_page_faults: of that process, meanwhile.
        mean_nlls: of each pair.
    """

    seconds: float
    peak_resident_bytes: int | None
    minor_page_faults: int | None
    mean_nlls: list[float]


class ScoringTask:
    """A variant in its worker process."""

    def __init__(self, variant: Variant, setup: Setup) -> None:
        # A library that only one variant needs is imported only in that one's process.
        module = importlib.import_module(f"benchmarks.scorers.{variant.module}")
        self._pairs = Workload.load(setup.workload).pairs
        self._sweep_pairs = self._pairs.part(0, setup.sweep_pairs)
        self._scorer: Scorer = module.make(setup, **variant.options)

    def warm_up(self) -> Choice:
        """Chooses the fastest setting, and scores everything once with it."""
        candidates = self._scorer.candidates
        trials = [self._tried(setting) for setting in candidates] if len(candidates) > 1 else []
        best = min(trials, key=lambda trial: trial.seconds).setting if trials else candidates[0]
        self._scorer.use(best)
        self._scorer.score(self._pairs)
        return Choice(best, trials)

    def _tried(self, setting: Setting) -> Trial:
        self._scorer.use(setting)
        self._scorer.score(self._sweep_pairs.part(0, len(self._sweep_pairs) // 4 + 1))
        started = time.perf_counter()
        self._scorer.score(self._sweep_pairs)
        return Trial(setting, time.perf_counter() - started)

    def run(self) -> Run:
        """Scores all pairs."""
        pid = self._scorer.pid
        resources.reset_peak(pid)
        faults_before = resources.minor_page_faults(pid)
        started = time.perf_counter()
        mean_nlls = self._scorer.score(self._pairs)
        seconds = time.perf_counter() - started
        faults = resources.minor_page_faults(pid)
        return Run(
            seconds=seconds,
            peak_resident_bytes=resources.peak_resident_bytes(pid),
            minor_page_faults=(
                None if faults is None or faults_before is None else faults - faults_before
            ),
            mean_nlls=mean_nlls,
        )

    def close(self) -> None:
        """Ends what the scorer started."""
        self._scorer.close()


def own_pid() -> int:
    """Of a scorer that computes in its own process."""
    return os.getpid()
