"""The Torch engine: memory that runs out, and the way to another device, as far as a CPU goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from seqloss.bundle.manifest import WEIGHTS_NAME
from seqloss.engines import cpu_linear, torch_engine
from seqloss.engines.layout import padded
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


@pytest.fixture
def engine(bundle_of: Any) -> TorchEngine:
    bundle = bundle_of("marian")
    return TorchEngine(bundle, bundle.manifest.graphs[0], "cpu")


def test_padding_is_laid_out_and_counted_tokens_are_found() -> None:
    inputs = padded(small_batch())
    assert inputs.source_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert inputs.source_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs.decoder_input_ids.tolist() == [[100, 5, 0], [100, 0, 0], [100, 6, 7]]
    assert inputs.token_index.tolist() == [0, 1, 6, 8]
    assert inputs.labels.tolist() == [5, 6, 6, 9]


def test_terms_are_float32_and_in_order(engine: TorchEngine) -> None:
    terms = engine.score(small_batch())
    assert terms.target_logprob.shape == terms.mean_logprob.shape == (4,)
    assert terms.target_logprob.dtype == terms.mean_logprob.dtype == np.float32
    assert terms.rank is None
    assert terms.entropy is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_moves_whole_to_another_device(precision: Any, bundle_of: Any) -> None:
    """The meta device computes shapes alone, and fails on any tensor left behind on the CPU."""
    bundle = bundle_of("marian")
    device = torch.device("meta")
    archive = bundle.graph_archive(bundle.manifest.graph("torch", precision))
    with torch_engine._Weights(bundle, bundle.manifest.graphs[0], torch.device("cpu")) as weights:
        weights.get = lambda name, dtype, get=weights.get: get(name, dtype).to(device)
        module = torch_engine._module(archive, weights, device)
    *inputs, _ = (torch.from_numpy(array).to(device) for array in padded(small_batch()))
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


def test_tied_weights_are_stored_and_loaded_once(bundle_of: Any, engine: TorchEngine) -> None:
    manifest = bundle_of("marian").manifest
    assert manifest.weight_aliases
    stored = load_file(bundle_of("marian").folder / WEIGHTS_NAME)
    assert not set(manifest.weight_aliases) & set(stored)
    state = engine._body.state_dict() | {"output.weight": engine._head._projection.weight}
    tied = [name for name in manifest.weight_aliases if name in state]
    assert tied
    for name in tied:
        assert state[name].data_ptr() == state[manifest.weight_aliases[name]].data_ptr()


def test_linear_layers_are_laid_out_once_on_a_cpu(
    bundle_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses but for rounding, on weights that are not held twice."""
    if not cpu_linear.is_available(torch.bfloat16):
        pytest.skip("this CPU does not multiply in bfloat16")
    bundle = bundle_of("marian")
    graph = bundle.manifest.graph("torch", "bfloat16")
    packed = TorchEngine(bundle, graph, "cpu")
    monkeypatch.setattr(cpu_linear, "is_available", lambda _: False)
    plain = TorchEngine(bundle, graph, "cpu")
    errors = [self_test_errors(engine, bundle.manifest) for engine in (packed, plain)]
    assert errors[0].mean() <= 1.5 * errors[1].mean()

    def targets(engine: TorchEngine) -> list[Any]:
        return [node.target for node in engine._body.graph.nodes]

    linear, silu, cast = (
        torch.ops.aten.linear.default,
        torch.ops.aten.silu.default,
        torch.ops.aten.to.dtype,
    )
    assert targets(plain).count(linear) == 32  # 2 layers of 6 and 2 of 10
    assert not {linear, silu} & set(targets(packed))
    assert targets(packed).count(cast) < targets(plain).count(cast)
    lowered = [tensor for tensor in plain._body.state_dict().values() if tensor.dim() == 2]
    left = [tensor for tensor in packed._body.state_dict().values() if tensor.dim() == 2]
    assert len(left) == len(lowered) - 32
