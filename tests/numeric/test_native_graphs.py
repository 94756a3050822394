"""The native transformer against transformers' own graph, family by family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from checkpoints import FAMILIES, MAX_POSITIONS, VOCABULARY_SIZE
from numeric.reference import random_pairs
from seqloss.engines.self_test import token_nlls
from seqloss.engines.torch_engine import TorchEngine
from seqloss.model.families import NATIVE

TOLERANCE = 2e-5


def test_every_native_family_has_a_recipe() -> None:
    assert set(NATIVE) <= set(FAMILIES)


@pytest.mark.parametrize("family", NATIVE)
def test_a_native_graph_has_the_losses_of_the_generic_one(family: str, bundle_of: Any) -> None:
    """By Torch's own operators both times, on the pairs that the graphs share."""
    bundles = [bundle_of(family, generic=generic) for generic in (False, True)]
    graphs = [bundle.manifest.graph("torch", "float32") for bundle in bundles]
    assert [graph.layout for graph in graphs] == ["packed", "padded"]
    native, generic = (
        TorchEngine(bundle, graph, "cpu") for bundle, graph in zip(bundles, graphs, strict=True)
    )
    assert native.info.is_packed
    assert not generic.info.is_packed
    special_ids = bundles[0].manifest.special_ids
    pairs = random_pairs(13, VOCABULARY_SIZE, MAX_POSITIONS, pad=special_ids.pad)
    sources = [pairs["source_ids"][index] for index in pairs["source_index"]]
    found, expected = (
        token_nlls(engine, sources, pairs["target_ids"], special_ids.decoder_start)
        for engine in (native, generic)
    )
    assert len(found) == sum(map(len, pairs["target_ids"]))
    assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NATIVE][:1])
def test_a_family_without_a_map_keeps_transformers_graph(family: str, bundle_of: Any) -> None:
    assert {graph.layout for graph in bundle_of(family).manifest.graphs} == {"padded"}
