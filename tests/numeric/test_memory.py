"""Memory that scoring takes beside the model does not grow with tokens times vocabulary."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks import resources
from benchmarks.memory import MemorySize
from benchmarks.models import save_checkpoint
from benchmarks.processes import in_own_process
from seqloss.bundle.manifest import EngineName
from seqloss.bundle.reader import open_bundle
from seqloss.engines.loader import load_engine
from seqloss.engines.self_test import token_nlls
from seqloss.export.exporter import ExportOptions, export_checkpoint

MOST_GROWTH = 400e6


def make_bundle(size: MemorySize, engine_name: EngineName, folder: Path) -> None:
    """A model whose logits vary by about 1, which is enough where only memory matters."""
    torch.set_num_threads(os.cpu_count() or 1)
    save_checkpoint(size.model(), 1.0, folder / "checkpoint")
    options = ExportOptions(engines=(engine_name,))
    export_checkpoint(str(folder / "checkpoint"), folder / "bundle", options)


def growth(bundle_folder: Path, size: MemorySize) -> list[int] | None:
    """Bytes that one batch takes, without and with ranks and entropies.

    None where the system does not count memory.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    bundle, pid = open_bundle(bundle_folder), os.getpid()
    engine = load_engine(bundle, "cpu", "float32")
    start = bundle.manifest.special_ids.decoder_start

    def score(sources: list[list[int]], targets: list[list[int]], *, all_terms: bool) -> None:
        token_nlls(engine, sources, targets, start, all_terms=all_terms)

    pairs = size.pairs()
    for all_terms in (False, True):  # what is made once is no growth
        score([[1]], [[2]], all_terms=all_terms)
    before = resources.resident_bytes(pid)
    found = []
    for all_terms in (False, True):
        resources.reset_peak(pid)
        score(pairs.source_ids, pairs.target_ids, all_terms=all_terms)
        peak = resources.peak_resident_bytes(pid)
        if before is None or peak is None:
            return None
        found.append(peak - before)
    return found


@pytest.mark.parametrize(("engine_name", "vocabulary"), [("torch", 256_206), ("onnx", 33_000)])
def test_memory_does_not_hold_the_logits_of_a_large_vocabulary(
    engine_name: EngineName, vocabulary: int, tmp_path: Path
) -> None:
    """In processes of their own: no other test's memory is measured, and none is kept."""
    size = MemorySize(vocabulary=vocabulary, target_tokens=8192)
    assert size.logits_bytes > 2.5 * MOST_GROWTH
    in_own_process(make_bundle, size, engine_name, tmp_path)
    found = in_own_process(growth, tmp_path / "bundle", size)
    if found is None:
        pytest.skip("the system does not count memory")
    assert max(found) < MOST_GROWTH, found
