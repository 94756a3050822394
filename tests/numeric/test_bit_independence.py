"""With kernels a pair's terms are the same bits, whoever it shares a batch with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import MAX_POSITIONS
from seqloss.bundle.manifest import Precision
from seqloss.engines.base import Engine
from seqloss.engines.loader import KernelOptions, load_engine
from seqloss.kernels.functions import KernelLibrary
from seqloss.model.families import NATIVE
from seqloss.records import Batch, Ragged

NUM_PAIRS, NUM_SOURCES = 40, 15
# Every family has its own operators, and what composes batches is the same for all.
NUM_COMPOSITIONS = {"wide-marian": 200, "demo": 60}
CASES = [
    *((f"wide-{family}", precision) for family in NATIVE for precision in ("float32", "bfloat16")),
    ("demo", "float32"),
]


class Pairs:
    """Random pairs, some of which share their sources."""

    def __init__(self, source_ids: int, target_ids: int, longest: int) -> None:
        generator = np.random.default_rng(23)

        def rows(number: int, ids: int) -> list[list[int]]:
            lengths = np.minimum(generator.geometric(0.1, number), longest)
            return [generator.integers(0, ids, length).tolist() for length in lengths]

        self.sources = rows(NUM_SOURCES, source_ids)
        self.targets = rows(NUM_PAIRS, target_ids)
        self.inputs = [[int(generator.integers(0, target_ids)), *row[:-1]] for row in self.targets]
        self.source_of = generator.integers(0, NUM_SOURCES, NUM_PAIRS)

    def batch(self, chosen: list[int]) -> Batch:
        """Of these pairs in this order, with each source once."""
        rows = list(dict.fromkeys(self.source_of[chosen].tolist()))
        labels = Ragged.from_rows([self.targets[index] for index in chosen], np.int32)
        return Batch(
            sources=Ragged.from_rows([self.sources[row] for row in rows], np.int32),
            source_row=np.array([rows.index(self.source_of[index]) for index in chosen], np.int32),
            decoder_input_ids=Ragged.from_rows([self.inputs[index] for index in chosen], np.int32),
            labels=labels.values,
            counted=np.ones(len(labels.values), np.bool_),
            with_ranks_and_entropies=True,
        )

    def terms(self, engine: Engine, chosen: list[int]) -> list[np.ndarray]:
        """Of each pair. Shapes: (4, tokens), float32 and exact."""
        found = engine.score(self.batch(chosen))
        whole = np.stack(
            [found.target_logprob, found.mean_logprob, found.rank, found.entropy]
        ).astype(np.float32)
        ends = np.cumsum([len(self.targets[index]) for index in chosen])
        return np.split(whole, ends[:-1], axis=1)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_pair_has_the_same_bits_in_any_batch(
    name: str, precision: Precision, bundle_of: Any, kernel_library: KernelLibrary
) -> None:
    bundle = bundle_of(name)
    if precision == "bfloat16" and not kernel_library.multiplies(torch.bfloat16):
        pytest.skip("this CPU does not multiply in bfloat16: it has no AVX512_BF16")
    engine = load_engine(bundle, "cpu", precision, kernels=KernelOptions(required=True))
    vocabulary = bundle.manifest.vocabulary
    pairs = Pairs(vocabulary.source, vocabulary.target, MAX_POSITIONS)
    alone = [pairs.terms(engine, [index])[0] for index in range(NUM_PAIRS)]
    generator = np.random.default_rng(29)
    for _ in range(NUM_COMPOSITIONS.get(name, 12)):
        number = int(generator.choice([2, 3, generator.integers(1, NUM_PAIRS + 1)]))
        # Now and then a pair is in the batch twice.
        chosen = generator.choice(
            NUM_PAIRS, number, replace=bool(generator.integers(0, 2))
        ).tolist()
        for index, found in zip(chosen, pairs.terms(engine, chosen), strict=True):
            assert found.tobytes() == alone[index].tobytes()
    engine.close()
