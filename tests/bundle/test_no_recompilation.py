"""A loaded engine compiles nothing, whatever the shapes of its batches are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from checkpoints import MAX_POSITIONS, VOCABULARY_SIZE
from seqloss.engines.loader import KernelOptions, load_engine
from seqloss.kernels import build
from seqloss.records import Batch, Ragged

NUM_SHAPES = 500


def random_batch(generator: np.random.Generator) -> Batch:
    """Of any shape; sizes of 1, which compilers like to take for constants, are frequent."""

    def size(largest: int) -> int:
        return int(generator.choice([1, 2, generator.integers(1, largest + 1)]))

    def rows(number: int, longest: int) -> list[list[int]]:
        return [
            generator.integers(0, VOCABULARY_SIZE, generator.integers(1, longest + 1)).tolist()
            for _ in range(number)
        ]

    sources = rows(size(9), size(MAX_POSITIONS))
    targets = Ragged.from_rows(rows(size(12), size(MAX_POSITIONS)), np.int32)
    counted = generator.random(len(targets.values)) < 0.8
    counted[0] = True
    return Batch(
        sources=Ragged.from_rows(sources, np.int32),
        source_row=generator.integers(0, len(sources), len(targets)).astype(np.int32),
        decoder_input_ids=targets,
        labels=generator.integers(0, VOCABULARY_SIZE, len(targets.values)).astype(np.int32),
        counted=counted,
        with_ranks_and_entropies=bool(generator.integers(0, 2)),
    )


@pytest.mark.parametrize("has_kernels", [True, False])
def test_five_hundred_shapes_compile_nothing(
    has_kernels: bool, bundle_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    if has_kernels:
        request.getfixturevalue("kernel_library")
    kernels = KernelOptions() if has_kernels else KernelOptions(cache=None)
    engine = load_engine(bundle_of("wide-marian"), "cpu", "float32", kernels=kernels)
    assert engine.info.has_kernels == has_kernels

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("something was compiled or traced")

    log, compiler = tmp_path / "compiler.log", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "_run", refuse)
    monkeypatch.setattr(torch.fx.GraphModule, "recompile", refuse)
    monkeypatch.setattr(torch.fx.Tracer, "trace", refuse)
    monkeypatch.setattr(torch.export, "export", refuse)
    counters.clear()

    generator = np.random.default_rng(7)
    shapes = set()
    while len(shapes) < NUM_SHAPES:
        batch = random_batch(generator)
        terms = engine.score(batch)
        assert len(terms.target_logprob) == batch.counted.sum()
        assert np.isfinite(terms.target_logprob).all()
        shapes.add((*batch.sources.offsets.tolist(), -1, *batch.decoder_input_ids.offsets.tolist()))

    assert not log.exists()
    assert not counters, "Torch's compiler has been at work"
