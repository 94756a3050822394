"""How much a pair's loss depends on the pairs that share its batch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.memory import batch_of
from benchmarks.pairs import Pairs
from benchmarks.scoring import ENGINE_WORDS
from benchmarks.workload import Workload
from seqloss.bundle.manifest import EngineName, Precision
from seqloss.bundle.reader import open_bundle
from seqloss.engines.loader import KernelOptions, load_engine

_COMPOSITIONS = 200
_PAIRS = 32
_MOST_IN_A_BATCH = 24
_SEED = 20261123


@dataclass(frozen=True, slots=True)
class IndependenceResult:
    """One graph on random compositions of batches.

    Attributes:
        name: of the engine and the precision.
        has_kernels: whether kernels that were compiled for the CPU computed.
        compositions: how many batches.
        largest_difference: of a token's nll, between any two batches, in nats.
        seconds: of all of the batches.
    """

    name: str
    has_kernels: bool
    compositions: int
    largest_difference: float
    seconds: float


def measure_independence(
    bundle: Path, engine: EngineName, precision: Precision, kernels: bool, workload: Path
) -> IndependenceResult:
    """Scores some pairs in many batches, each time with other ones and in another order."""
    options = KernelOptions() if kernels else KernelOptions(cache=None)
    opened = open_bundle(bundle)
    loaded = load_engine(opened, "cpu", precision, None, engine, options)
    start = opened.manifest.special_ids.decoder_start
    pairs = Workload.load(workload).pairs.part(0, _PAIRS)
    least = [np.full(length, np.inf) for length in pairs.target_lengths]
    largest = [np.full(length, -np.inf) for length in pairs.target_lengths]
    generator = np.random.default_rng(_SEED)
    seconds = 0.0
    for _ in range(_COMPOSITIONS):
        size = int(generator.integers(1, min(_MOST_IN_A_BATCH, len(pairs)) + 1))
        rows = generator.permutation(len(pairs))[:size].tolist()
        chosen = Pairs([pairs.source_ids[i] for i in rows], [pairs.target_ids[i] for i in rows])
        batch = batch_of(chosen, start)
        started = time.perf_counter()
        nlls = -loaded.score(batch).target_logprob
        seconds += time.perf_counter() - started
        ends = np.cumsum(chosen.target_lengths)[:-1]
        for row, own in zip(rows, np.split(nlls, ends), strict=True):
            least[row], largest[row] = np.minimum(least[row], own), np.maximum(largest[row], own)
    seen = [np.isfinite(low).all() for low in least]
    return IndependenceResult(
        name=f"seqloss{ENGINE_WORDS[engine]} {precision}",
        has_kernels=loaded.info.has_kernels,
        compositions=_COMPOSITIONS,
        largest_difference=max(
            float((high - low).max())
            for low, high, one in zip(least, largest, seen, strict=True)
            if one
        ),
        seconds=seconds,
    )
