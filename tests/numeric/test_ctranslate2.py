"""The service against CTranslate2, which has its own implementation of every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest
import torch

from benchmarks.scorers.with_ctranslate2 import convert, tokens_of
from checkpoints import MAX_POSITIONS, VOCABULARY_SIZE, make_model
from numeric.reference import random_pairs
from seqloss.bundle.reader import open_bundle
from seqloss.export.exporter import ExportOptions, export_checkpoint

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """What CTranslate2 takes for granted of a family.

    Attributes:
        changes: of the configuration.
        drops_pad: whether the pad class is left out, and its embedding taken for zeros.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    drops_pad: bool = False


CASES = {
    # Its loader asks for an attribute that transformers no longer has.
    "bart": Case({"normalize_before": False}),
    # Its loader has sinusoids begin where they do with this pad id.
    "m2m_100": Case({"pad_token_id": 1}),
    "marian": Case(drops_pad=True),
}


def nlls_by_ctranslate2(
    checkpoint: Path, config: Any, sources: list[list[int]], targets: list[list[int]]
) -> list[np.ndarray]:
    """Token nlls of targets that end with the end of sentence."""
    converted = checkpoint.parent / "converted"
    convert(checkpoint, converted)
    translator = ctranslate2.Translator(
        str(converted), device="cpu", compute_type="float32", intra_threads=1
    )
    tokens = tokens_of(config)
    results = translator.score_batch(
        [[tokens[value] for value in row] for row in sources],
        # It adds the end of sentence to targets, and to targets only.
        [[tokens[value] for value in row[:-1]] for row in targets],
    )
    for result, row in zip(results, targets, strict=True):
        assert result.tokens == [tokens[value] for value in row]
    return [-np.array(result.log_probs) for result in results]


@pytest.mark.parametrize("family", CASES)
def test_token_nlls_match_ctranslate2(family: str, tmp_path: Path, make_client: Any) -> None:
    case = CASES[family]
    model = make_model(family, **case.changes)
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    if case.drops_pad:
        with torch.no_grad():
            model.get_input_embeddings().weight[pad] = 0
    model.save_pretrained(tmp_path / "checkpoint")
    request = random_pairs(
        21,
        VOCABULARY_SIZE,
        MAX_POSITIONS,
        absent=pad if case.drops_pad else None,
        pad=pad,
        eos=eos,
        unknown=0,
    )
    targets = [[*row[:-1], eos] for row in request["target_ids"]]
    sources = [request["source_ids"][index] for index in request["source_index"]]
    expected = nlls_by_ctranslate2(tmp_path / "checkpoint", model.config, sources, targets)

    options = ExportOptions(excluded_classes=((pad, pad),) if case.drops_pad else ())
    export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    client = make_client({family: open_bundle(tmp_path / "bundle")})
    response = client.post(
        "/loss", json=request | {"target_ids": targets, "return": ["token_nlls"]}
    )
    assert response.status_code == 200, response.text
    for row, want in zip(response.json()["token_nlls"], expected, strict=True):
        np.testing.assert_allclose(row, want, rtol=0, atol=TOLERANCE)
