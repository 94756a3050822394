"""The Torch engine: memory that runs out, and the way to another device, as far as a CPU goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from seqloss.bundle.manifest import WEIGHTS_NAME
from seqloss.bundle.reader import Bundle
from seqloss.engines import cpu_linear, torch_engine
from seqloss.engines.layout import packed, padded
from seqloss.engines.self_test import self_test_errors
from seqloss.engines.torch_engine import TorchEngine
from seqloss.errors import ConfigurationError, EngineDeadError, OutOfMemoryError
from seqloss.records import Batch, Ragged


def small_batch() -> Batch:
    return Batch(
        sources=Ragged.from_rows([[1, 2, 3], [4]], np.int32),
        source_row=np.array([0, 1, 0], np.int32),
        decoder_input_ids=Ragged.from_rows([[100, 5], [100], [100, 6, 7]], np.int32),
        labels=np.array([5, 6, 8, 6, 7, 9], np.int32),
        counted=np.array([True, True, False, True, False, True]),
    )


@pytest.fixture(params=["packed", "padded"])
def bundle(request: pytest.FixtureRequest, bundle_of: Any) -> Bundle:
    """Of each layout: a native graph, and transformers' own."""
    found: Bundle = bundle_of("marian", generic=request.param == "padded")
    assert {graph.layout for graph in found.manifest.graphs} == {request.param}
    return found


@pytest.fixture
def engine(bundle: Bundle) -> TorchEngine:
    return TorchEngine(bundle, bundle.manifest.graphs[0], "cpu")


def test_padding_is_laid_out_and_counted_tokens_are_found() -> None:
    inputs = padded(small_batch())
    assert inputs.source_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert inputs.source_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs.decoder_input_ids.tolist() == [[100, 5, 0], [100, 0, 0], [100, 6, 7]]
    assert inputs.token_index.tolist() == [0, 1, 6, 8]
    assert inputs.labels.tolist() == [5, 6, 6, 9]


def test_sequences_are_packed_and_counted_tokens_are_found() -> None:
    inputs = packed(small_batch())
    assert inputs.source_ids.tolist() == [1, 2, 3, 4]
    assert inputs.source_positions.tolist() == [0, 1, 2, 0]
    assert inputs.source_starts.tolist() == [0, 3]
    assert inputs.source_ends.tolist() == [3, 4]
    assert inputs.source_row.tolist() == [0, 1, 0]
    assert inputs.decoder_input_ids.tolist() == [100, 5, 100, 100, 6, 7]
    assert inputs.target_positions.tolist() == [0, 1, 0, 0, 1, 2]
    assert inputs.target_starts.tolist() == [0, 2, 3]
    assert inputs.target_ends.tolist() == [2, 3, 6]
    assert inputs.token_index.tolist() == [0, 1, 3, 5]
    assert inputs.labels.tolist() == [5, 6, 6, 9]


def test_terms_are_float32_and_in_order(engine: TorchEngine) -> None:
    terms = engine.score(small_batch())
    assert terms.target_logprob.shape == terms.mean_logprob.shape == (4,)
    assert terms.target_logprob.dtype == terms.mean_logprob.dtype == np.float32
    assert terms.rank is None
    assert terms.entropy is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_moves_whole_to_another_device(precision: Any, bundle: Bundle) -> None:
    """The meta device computes shapes alone, and fails on any tensor left behind on the CPU."""
    device = torch.device("meta")
    graph = bundle.manifest.graph("torch", precision)
    archive = bundle.graph_archive(graph)
    with torch_engine._Weights(bundle, graph, torch.device("cpu")) as weights:
        weights.get = lambda name, dtype, get=weights.get: get(name, dtype).to(device)
        module = torch_engine._module(archive, graph.layout, weights, device)
    lay_out = packed if graph.layout == "packed" else padded
    *inputs, _ = (torch.from_numpy(array).to(device) for array in lay_out(small_batch()))
    hidden = module(*inputs)
    assert hidden.device == device
    assert hidden.shape == (4, 32)
    assert hidden.dtype == torch.float32


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (torch.AcceleratorError("device-side assert triggered"), EngineDeadError),
        (RuntimeError("something else"), RuntimeError),
    ],
)
def test_errors_of_the_device_are_told_apart(
    raised: Exception, expected: type[Exception], engine: TorchEngine
) -> None:
    def fail(*_: Any) -> Any:
        raise raised

    engine._body = fail
    with pytest.raises(expected):
        engine.score(small_batch())


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99", "cuda:x"])
def test_devices_that_are_not_there_are_refused(device: str, bundle_of: Any) -> None:
    bundle = bundle_of("marian")
    with pytest.raises(ConfigurationError, match=device.partition(":")[0]):
        TorchEngine(bundle, bundle.manifest.graphs[0], device)


def test_tied_weights_are_stored_and_loaded_once(bundle: Bundle, engine: TorchEngine) -> None:
    manifest = bundle.manifest
    assert manifest.weight_aliases
    stored = load_file(bundle.folder / WEIGHTS_NAME)
    assert not set(manifest.weight_aliases) & set(stored)
    table = engine._head._projection.weight
    looked_up = [
        weight for weight in engine._body.state_dict().values() if weight.shape == table.shape
    ]
    assert looked_up
    assert {weight.data_ptr() for weight in looked_up} == {table.data_ptr()}


def test_linear_layers_are_laid_out_once_on_a_cpu(
    bundle_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses but for rounding, on weights that are not held twice."""
    if not cpu_linear.is_available(torch.bfloat16):
        pytest.skip("this CPU does not multiply in bfloat16")
    bundle = bundle_of("marian", generic=True)
    graph = bundle.manifest.graph("torch", "bfloat16")
    laid_out = TorchEngine(bundle, graph, "cpu")
    monkeypatch.setattr(cpu_linear, "is_available", lambda _: False)
    plain = TorchEngine(bundle, graph, "cpu")
    errors = [self_test_errors(engine, bundle.manifest) for engine in (laid_out, plain)]
    assert errors[0].mean() <= 1.5 * errors[1].mean()

    def targets(engine: TorchEngine) -> list[Any]:
        return [node.target for node in engine._body.graph.nodes]

    linear, silu, cast = (
        torch.ops.aten.linear.default,
        torch.ops.aten.silu.default,
        torch.ops.aten.to.dtype,
    )
    assert targets(plain).count(linear) == 32  # 2 layers of 6 and 2 of 10
    assert not {linear, silu} & set(targets(laid_out))
    assert targets(laid_out).count(cast) < targets(plain).count(cast)
    lowered = [tensor for tensor in plain._body.state_dict().values() if tensor.dim() == 2]
    left = [tensor for tensor in laid_out._body.state_dict().values() if tensor.dim() == 2]
    assert len(left) == len(lowered) - 32


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_packed_graph_holds_no_weight_twice(
    precision: Any, has_kernels: bool, bundle_of: Any, request: pytest.FixtureRequest
) -> None:
    """Of its matrices the tables of ids and positions are left, which it looks up."""
    library = request.getfixturevalue("kernel_library") if has_kernels else None
    bundle = bundle_of("marian")
    engine = TorchEngine(bundle, bundle.manifest.graph("torch", precision), "cpu", library)
    left = {name for name, tensor in engine._body.state_dict().items() if tensor.dim() == 2}
    reads = [node for node in engine._body.graph.nodes if node.target in left]
    assert {node.target for node in reads} == left
    lookup = torch.ops.aten.embedding.default
    assert {user.target for node in reads for user in node.users} == {lookup}
    assert self_test_errors(engine, bundle.manifest).mean() <= (
        bundle.manifest.graph("torch", precision).mean_tolerance
    )
