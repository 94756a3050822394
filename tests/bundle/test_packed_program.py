"""Packed programs are read here, and not by Torch: the same calls, and clear words for others."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_hostile_bundles import PROGRAM, Program, change_json, graph_of, packed, unpacked
from torch.fx import GraphModule

from seqloss.bundle.reader import Bundle
from seqloss.engines import torch_engine
from seqloss.engines.layout import BODY_INPUTS
from seqloss.engines.layout import packed as laid_out
from seqloss.engines.packed_program import Weights, module_of
from seqloss.errors import BundleError
from seqloss.records import Batch, Ragged

INPUTS = BODY_INPUTS["packed"]

BATCH = Batch(
    sources=Ragged.from_rows([[1, 2, 3], [4]], np.int32),
    source_row=np.array([0, 1, 0], np.int32),
    decoder_input_ids=Ragged.from_rows([[10, 5], [10], [10, 6, 7]], np.int32),
    labels=np.array([5, 6, 8, 6, 7, 9], np.int32),
    counted=np.array([True, True, False, True, False, True]),
)

# Says which of Torch's modules a process has after it loaded a bundle and scored with it.
LOADED = """
import sys
from pathlib import Path
from seqloss.bundle.reader import open_bundle
from seqloss.engines.loader import KernelOptions, load_engine
from seqloss.settings import USER_CACHE
kernels = KernelOptions(USER_CACHE if sys.argv[2] == "kernels" else None)
load_engine(open_bundle(Path(sys.argv[1])), "cpu", "float32", kernels=kernels)
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


@pytest.fixture
def bundle(bundle_of: Callable[..., Bundle]) -> Bundle:
    return bundle_of("marian")


@pytest.fixture
def archive(bundle: Bundle) -> bytes:
    return bundle.graph_archive(bundle.manifest.graph("torch", "float32"))


@pytest.fixture
def weights(bundle: Bundle) -> Iterator[Weights]:
    graph = bundle.manifest.graph("torch", "float32")
    with torch_engine._Weights(bundle, graph, torch.device("cpu")) as weights:
        yield weights.get


def by_torch(archive: bytes, weights: Weights) -> GraphModule:
    """The module that Torch's own reader makes."""
    module = torch.export.load(io.BytesIO(archive)).module()
    state = {name: weights(name, one.dtype) for name, one in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module


@torch.inference_mode()
@pytest.mark.parametrize("family", ["marian", "m2m_100", "t5"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_program_computes_the_bits_that_torchs_reader_has_it_compute(
    family: str, precision: Any, bundle_of: Callable[..., Bundle]
) -> None:
    bundle = bundle_of(family)
    graph = bundle.manifest.graph("torch", precision)
    archive = bundle.graph_archive(graph)
    *inputs, _ = (torch.from_numpy(array) for array in laid_out(BATCH))
    with torch_engine._Weights(bundle, graph, torch.device("cpu")) as weights:
        read, expected = module_of(archive, weights.get, INPUTS), by_torch(archive, weights.get)
        assert torch.equal(read(*inputs), expected(*inputs))


@pytest.mark.parametrize("how", ["kernels", "torch"])
def test_what_torch_compiles_with_is_not_imported(
    how: str, bundle_of: Callable[..., Bundle], kernel_library: Any
) -> None:
    """It would take a third of a start."""
    command = [sys.executable, "-W", "ignore", "-c", LOADED, bundle_of("wide-marian").folder, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def changed(archive: bytes, change: Callable[[Program], None]) -> bytes:
    members = unpacked(archive)
    change_json(members, PROGRAM, change)
    return packed(members)


def in_another_version(program: Program) -> None:
    program["schema_version"]["major"] = 9


def with_a_larger_weight(program: Program) -> None:
    graph_of(program)["tensor_values"]["p_decoder_embeddings"]["sizes"][0] = {"as_int": 102}


def with_a_weight_of_any_size(program: Program) -> None:
    sizes = graph_of(program)["tensor_values"]["p_decoder_embeddings"]["sizes"]
    sizes[0] = {"as_expr": {"expr_str": "Symbol('s0')", "hint": {"as_int": 3}}}


def with_inputs_in_another_order(program: Program) -> None:
    specs = program["graph_module"]["signature"]["input_specs"]
    specs[-1], specs[-2] = specs[-2], specs[-1]


def with_a_buffer(program: Program) -> None:
    specs = program["graph_module"]["signature"]["input_specs"]
    specs.append({"buffer": {"arg": {"name": "b"}, "buffer_name": "b", "persistent": True}})


def with_a_name_twice(program: Program) -> None:
    graph_of(program)["nodes"][1]["outputs"][0]["as_tensor"]["name"] = "embedding"


def with_two_results(program: Program) -> None:
    graph_of(program)["outputs"].append({"as_tensor": {"name": "embedding"}})


def with_an_argument_too_many(program: Program) -> None:
    node = graph_of(program)["nodes"][0]
    node["inputs"].append({"name": "out", "arg": {"as_int": 1}, "kind": 2})


def with_a_symbolic_argument(program: Program) -> None:
    node = graph_of(program)["nodes"][1]
    node["inputs"][1]["arg"] = {"as_sym_int": {"as_name": "s0"}}


def with_results_that_are_not_made(program: Program) -> None:
    node = graph_of(program)["nodes"][0]
    node["outputs"].append({"as_tensor": {"name": "another"}})


def with_an_unknown_dtype(program: Program) -> None:
    graph_of(program)["tensor_values"]["p_decoder_embeddings"]["dtype"] = 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_another_version, "version 9 of Torch's form, and this seqloss reads 8: export"),
        (
            with_a_larger_weight,
            r"'decoder.embeddings' has the sizes \[101, 32\], and .* \[102, 32\]",
        ),
        (with_a_weight_of_any_size, r"takes \[None, 32\]"),
        (with_inputs_in_another_order, "a graph takes .*, not "),
        (with_a_buffer, "a packed graph takes .*buffer"),
        (with_a_name_twice, "makes 'embedding' twice"),
        (with_two_results, "a packed graph returns"),
        (with_an_argument_too_many, r"the unknown \['out'\]"),
        (with_a_symbolic_argument, "an argument of the kind 'as_sym_int'"),
        (with_results_that_are_not_made, "aten.embedding.default makes"),
        (with_an_unknown_dtype, "dtype number 10"),
    ],
)
def test_what_no_packed_graph_says_is_refused_in_words(
    change: Callable[[Program], None], words: str, archive: bytes, weights: Weights
) -> None:
    with pytest.raises(BundleError, match=words):
        module_of(changed(archive, change), weights, INPUTS)


def test_infinity_is_a_text_in_json(archive: bytes, weights: Weights) -> None:
    def scale_by_infinity(program: Program) -> None:
        node = next(one for one in graph_of(program)["nodes"] if "mul" in one["target"])
        node["inputs"][1]["arg"] = {"as_float": "-Infinity"}

    module = module_of(changed(archive, scale_by_infinity), weights, INPUTS)
    assert any(-float("inf") in node.args for node in module.graph.nodes)


def test_a_weights_name_is_no_way_to_anything(archive: bytes, weights: Weights) -> None:
    """It is a key: as a path of attributes it could lead to what all modules share."""
    named, path = "decoder.embeddings", "__class__.__base__.__base__._compiled_call_impl.x"

    def rename(program: Program) -> None:
        specs = program["graph_module"]["signature"]["input_specs"]
        (spec,) = [one for one in specs if one.get("parameter", {}).get("parameter_name") == named]
        spec["parameter"]["parameter_name"] = path

    def by_name(name: str, dtype: torch.dtype) -> torch.Tensor:
        return weights(named if name == path else name, dtype)

    module = module_of(changed(archive, rename), by_name, INPUTS)
    assert torch.nn.Module._compiled_call_impl is None
    *inputs, _ = (torch.from_numpy(array) for array in laid_out(BATCH))
    assert torch.equal(module(*inputs), module_of(archive, weights, INPUTS)(*inputs))
