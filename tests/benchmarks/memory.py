"""How much memory scoring takes beside the model, where the vocabulary is large."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM

from benchmarks import resources
from benchmarks.models import Model, marian
from benchmarks.pairs import Pairs
from benchmarks.scoring import ENGINE_WORDS
from benchmarks.workload import teacher_forced
from seqloss.bundle.manifest import Precision
from seqloss.bundle.reader import open_bundle
from seqloss.engines.loader import load_engine
from seqloss.records import Batch, Ragged, shift_right

_SEED = 20260305
_SOURCE_TOKENS = 8
_TARGET_TOKENS = 128
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemorySize:
    """One batch of so many target tokens over so many classes."""

    vocabulary: int = 256_206
    target_tokens: int = 8192

    def part(self, divisor: int) -> MemorySize:
        """A batch of fewer tokens."""
        return MemorySize(self.vocabulary, self.target_tokens // divisor)

    @property
    def logits_bytes(self) -> int:
        """What all logits would take in float32."""
        return self.vocabulary * self.target_tokens * _FLOAT32_BYTES

    def model(self) -> Model:
        """So narrow and shallow that only the vocabulary matters."""
        return marian(self.vocabulary, width=64, layers=1, heads=4, ffn_width=128)

    def pairs(self) -> Pairs:
        """Random ids; the last ones pad and start, and are left out."""
        generator = np.random.default_rng(_SEED)
        count = max(1, self.target_tokens // _TARGET_TOKENS)
        return Pairs(
            generator.integers(self.vocabulary - 1, size=(count, _SOURCE_TOKENS)).tolist(),
            generator.integers(self.vocabulary - 1, size=(count, _TARGET_TOKENS)).tolist(),
        )


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """What one batch took.

    Attributes:
        name: who scored it.
        vocabulary: classes of the softmax.
        target_tokens: of the batch.
        resident_before_bytes: the process's memory, its model included.
        growth_bytes: how far its peak was above that.
        logits_bytes: what all logits of the batch would take in float32.
    """

    name: str
    vocabulary: int
    target_tokens: int
    resident_before_bytes: int
    growth_bytes: int
    logits_bytes: int


def measure_seqloss(
    bundle: Path, precision: Precision, size: MemorySize, threads: int
) -> MemoryResult | None:
    """One batch through the engine; None where the system does not count memory."""
    engine = load_engine(open_bundle(bundle), "cpu", precision=precision, threads=threads)
    start = size.vocabulary - 1

    def score(pairs: Pairs) -> None:
        engine.score(batch_of(pairs, start))

    name = f"seqloss{ENGINE_WORDS[engine.info.engine]} {precision}"
    return _measured(name, size, score)


def measure_transformers(checkpoint: Path, size: MemorySize, threads: int) -> MemoryResult | None:
    """One batch with all its logits; None where the system does not count memory."""
    torch.set_num_threads(threads)
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(pairs: Pairs) -> None:
        logits, labels, _ = teacher_forced(model, pairs)
        cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")

    return _measured("transformers float32", size, score)


def _measured(name: str, size: MemorySize, score: Callable[[Pairs], None]) -> MemoryResult | None:
    pairs = size.pairs()
    score(pairs.part(0, 1))  # what is made once is no growth
    pid = os.getpid()
    resources.reset_peak(pid)
    before = resources.resident_bytes(pid)
    score(pairs)
    peak = resources.peak_resident_bytes(pid)
    if before is None or peak is None:
        return None
    return MemoryResult(
        name=name,
        vocabulary=size.vocabulary,
        target_tokens=size.target_tokens,
        resident_before_bytes=before,
        growth_bytes=peak - before,
        logits_bytes=size.logits_bytes,
    )


def batch_of(pairs: Pairs, start: int) -> Batch:
    """All pairs in one; a decoder begins with the start id."""
    targets = Ragged.from_rows(pairs.target_ids, np.int32)
    return Batch(
        sources=Ragged.from_rows(pairs.source_ids, np.int32),
        source_row=np.arange(len(pairs), dtype=np.int32),
        decoder_input_ids=shift_right(targets, np.full(len(pairs), start)),
        labels=targets.values,
        counted=np.ones(len(targets.values), np.bool_),
    )
