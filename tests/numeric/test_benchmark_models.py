"""The models of the benchmark: as sure of themselves as they should be, and what their work is."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import MODELS, Model, random_model, save_checkpoint, shape_of
from benchmarks.operations import useful_operations
from benchmarks.scorers import with_ctranslate2
from benchmarks.scoring import Setup
from benchmarks.serving.workbench import Bundled
from benchmarks.sweeps.catalogue import Point
from benchmarks.sweeps.task import SweepTask
from benchmarks.workload import make_workload
from seqloss.export.exporter import ExportOptions, export_checkpoint

NUM_PAIRS = 12
# With few layers and a small vocabulary, and as wide as is needed for many different states.
SMALL: dict[str, dict[str, Any]] = {
    "marian-base": {"vocab_size": 3000, "d_model": 128, "encoder_layers": 1, "decoder_layers": 2},
    "nllb-600m": {"vocab_size": 3000, "d_model": 128, "encoder_layers": 1, "decoder_layers": 2},
    "t5-base": {"vocab_size": 3000, "d_model": 128, "num_layers": 1, "num_decoder_layers": 2},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "marian-base": {"pad_token_id": 2999, "decoder_start_token_id": 2999}
}


def small(name: str, **changes: Any) -> Model:
    """A model of the family whose logits are as peaked as those of a vocabulary of that size."""
    settings = MODELS[name].settings | SMALL[name] | SPECIAL.get(name, {}) | changes
    return replace(MODELS[name], settings=settings, scale=3.5)


@pytest.mark.parametrize("name", SMALL)
def test_drawn_targets_cost_a_few_nats_and_ctranslate2_agrees(name: str, tmp_path: Path) -> None:
    model = small(name)
    save_checkpoint(model, model.default_scale(), tmp_path / "checkpoint")
    workload = make_workload(tmp_path / "checkpoint", NUM_PAIRS)
    pairs = workload.pairs
    # Of three thousand classes a model that knows nothing would cost 8 nats.
    assert 2 < np.average(workload.mean_nlls, weights=pairs.target_lengths) < 4.5
    followers = [pair for row in pairs.target_ids for pair in pairwise(row)]
    assert np.mean([first == second for first, second in followers]) < 0.5

    converted = tmp_path / "converted"
    with_ctranslate2.convert(tmp_path / "checkpoint", converted)
    setup = Setup(tmp_path / "checkpoint", {}, converted, tmp_path, threads=1, sweep_pairs=1)
    found = with_ctranslate2.make(setup, "float32").score(pairs)
    expected = workload.expected_nlls(without_pad=model.ctranslate2_drops_pad)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("marian-base", {}),
        ("nllb-600m", {}),
        ("t5-base", {}),
        ("t5-base", {"feed_forward_proj": "gated-gelu", "d_kv": 24, "num_heads": 3}),
    ],
)
def test_operations_are_those_that_torch_counts(name: str, changes: dict[str, Any]) -> None:
    """For a target of one token: Torch computes what a causal mask hides, and counts it."""
    config = small(name, **changes).config()
    model = random_model(config, 1.0)
    model.set_attn_implementation("eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(
            input_ids=torch.full((1, 7), 5),
            decoder_input_ids=torch.full((1, 1), 5),
            use_cache=False,
        )
    assert useful_operations(shape_of(config), [7], [1]) == counter.get_total_flops()


def test_a_sweep_scores_every_point_and_says_what_its_pairs_are(tmp_path: Path) -> None:
    model = MODELS["tiny"]
    save_checkpoint(model, model.default_scale(), tmp_path / "checkpoint")
    options = ExportOptions(precisions=("float32",))
    export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    bundled = Bundled("tiny", tmp_path / "bundle", "float32", "cpu", threads=1)
    shape = shape_of(model.config())
    points = [
        Point(4, "tiny", 24, length=9, num_candidates=4, max_batch_tokens=tokens)
        for tokens in (None, 64)
    ]
    with closing(SweepTask(bundled, shape)) as task:
        for work in map(task.warm_up, points):
            assert (work.source_tokens, work.target_tokens) == (6 * 9, 24 * 9)
            # As if every target had its own source, without the 18 encodings that are saved.
            encoding = useful_operations(replace(shape, decoder_layers=0, vocabulary=0), [9], [9])
            assert work.operations == useful_operations(shape, [9] * 24, [9] * 24) - 18 * encoding
            if work.memory.held_bytes and work.memory.peak_bytes:
                assert work.memory.peak_bytes >= work.memory.held_bytes
        assert all(0 < task.run(point) < 60 for point in points)
