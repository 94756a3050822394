"""What an engine does on a GPU, as far as a CPU can: all but the kernels."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seqloss.engines import cuda_binding, cuda_head, torch_engine
from seqloss.engines.cuda_staging import CudaStaging
from seqloss.engines.layout import HOST_INPUTS, packed, padded
from seqloss.engines.loader import KernelOptions, open_engine
from seqloss.errors import BundleError
from seqloss.loss.head import output_projection
from seqloss.model import flash_attention as flash
from seqloss.model.operators import attention
from seqloss.records import Batch, Ragged

_OPS: Any = torch.ops.seqloss


def batch(rows: list[int], lengths: list[int], *, seed: int = 0) -> Batch:
    """Three sources; targets of the given rows and lengths, whose first token does not count."""
    generator = np.random.default_rng(seed)
    sources = [generator.integers(4, 90, n).tolist() for n in (7, 2, 11)]
    targets = [generator.integers(4, 90, n).tolist() for n in lengths]
    counted = np.ones(sum(lengths), bool)
    counted[np.cumsum([0, *lengths[:-1]])] = False
    return Batch(
        sources=Ragged.from_rows(sources, np.int32),
        source_row=np.array(rows, np.int32),
        decoder_input_ids=Ragged.from_rows(targets, np.int32),
        labels=generator.integers(4, 90, sum(lengths)).astype(np.int32),
        counted=counted,
    )


BATCHES = [
    pytest.param(batch([0, 1, 2], [3, 5, 4]), id="each source once"),
    pytest.param(batch([2, 0, 2, 2], [3, 2, 6, 2]), id="shared sources in another order"),
    pytest.param(batch([1], [2]), id="one target"),
]


class FlashCalls:
    """What the flash kernel computes, sequence by sequence, in float64."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []
        self.offsets: list[int] = []

    def __call__(  # noqa: PLR0917 - as the kernel has them
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        longest_query: int,
        longest_keys: int,
        dropout: float,
        causal: bool,
        with_mask: bool,
        *,
        scale: float,
    ) -> tuple[Tensor, ...]:
        assert query_offsets.dtype == key_offsets.dtype == torch.int32
        assert (dropout, with_mask) == (0.0, False)
        assert int(query_offsets.diff().max()) == longest_query
        assert int(key_offsets.diff().max()) == longest_keys
        self.dtypes.append(queries.dtype)
        self.offsets.append(id(query_offsets))
        result = torch.empty_like(queries)
        for index in range(len(query_offsets) - 1):
            mine = slice(int(query_offsets[index]), int(query_offsets[index + 1]))
            seen = slice(int(key_offsets[index]), int(key_offsets[index + 1]))
            scores = scale * torch.einsum(
                "qhw,khw->hqk", queries[mine].double(), keys[seen].double()
            )
            if causal:  # the last query sees the last key
                later = torch.ones(scores.shape[1:]).triu(1 + scores.shape[2] - scores.shape[1])
                scores = scores.masked_fill(later.bool(), -torch.inf)
            mixed = torch.einsum("hqk,khw->qhw", scores.softmax(-1), values[seen].double())
            result[mine] = mixed.to(queries.dtype)
        return result, *([torch.empty(0)] * 4)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> FlashCalls:
    fake = FlashCalls()
    monkeypatch.setattr(flash, "_FLASH", fake)
    return fake


def bounds(lengths: list[int]) -> tuple[Tensor, Tensor]:
    ends = torch.tensor(lengths).cumsum(0)
    return ends - torch.tensor(lengths), ends


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_is_attention_of_the_definition(causal: bool, calls: FlashCalls) -> None:
    """Self-attention, and keys that targets share in any order, of rows that lie apart."""
    torch.manual_seed(0)
    starts, ends = bounds([3, 1, 6])
    queries, keys, values = torch.randn(10, 3 * 32).half().chunk(3, dim=1)
    own = (starts, ends, starts, ends)
    order = torch.tensor([2, 0, 2])
    for sequences in (own,) if causal else (own, (starts, ends, starts[order], ends[order])):
        layout = flash.laid_out(*sequences, queries, keys)
        assert (layout.key_rows is None) == (sequences is own)
        got = flash.flash_attention(queries, keys, values, layout, 4, 0.3, causal)
        wide = [rows.float() for rows in (queries, keys, values)]
        expected = attention(*wide, *sequences, None, 4, 0.3, causal, torch.float32)
        torch.testing.assert_close(got, expected.half(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"query_starts": [0, 3, 5], "query_ends": [3, 4, 10]},  # a row of nobody
        {"query_ends": [3, 4, 9]},
        {"query_ends": [3, 3, 10], "query_starts": [0, 3, 3]},  # a sequence of none
        {"key_starts": [-1, 3, 4]},
        {"key_ends": [3, 4, 11]},
        {"key_ends": [3, 4, 2**62]},
        {"key_starts": [3, 3, 4]},
        {"key_ends": [3, 4]},
        {"key_ends": 3},
    ],
    ids=str,
)
def test_sequences_of_rows_that_are_not_there_never_reach_the_kernel(
    wrong: dict[str, Any],
) -> None:
    rows = torch.zeros(10, 32, dtype=torch.bfloat16)
    good = {"starts": [0, 3, 4], "ends": [3, 4, 10]}
    given = {f"{side}_{end}": good[end] for side in ("query", "key") for end in good} | wrong
    tensors = {name: torch.tensor(values) for name, values in given.items()}
    with pytest.raises(BundleError, match="rows that are not there"):
        flash.laid_out(**tensors, queries=rows, keys=rows)


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"queries": (9, 32)}, 4),
        ({"keys": (9, 32)}, 4),
        ({"values": (9, 32)}, 4),
        ({"values": (10, 16)}, 4),
        ({"queries": (10, 16)}, 4),
        ({}, 3),
        ({}, 0),
        ({}, -4),
    ],
)
def test_rows_of_another_size_never_reach_the_kernel(
    changes: dict[str, tuple[int, int]], heads: int, calls: FlashCalls
) -> None:
    layout = flash.laid_out(*bounds([3, 1, 6]) * 2, *[torch.zeros(10, 32)] * 2)
    shapes = dict.fromkeys(("queries", "keys", "values"), (10, 32)) | changes
    rows = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with pytest.raises(BundleError, match="of other sizes"):
        flash.flash_attention(**rows, layout=layout, heads=heads, scale=1.0, causal=False)
    assert calls.dtypes == []


def test_torch_has_the_kernel_with_these_arguments() -> None:
    schema = str(flash._FLASH._schema)
    assert schema.startswith(
        "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, "
        "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, "
        "bool return_debug_mask, *, float? scale=None"
    )
    assert "-> (Tensor output," in schema


@pytest.mark.parametrize(
    ("dtype", "width", "expected"),
    [
        (torch.bfloat16, 64, True),
        (torch.float16, 256, True),
        (torch.bfloat16, 264, False),
        (torch.bfloat16, 20, False),
        (torch.float32, 64, False),
    ],
)
def test_flash_takes_what_its_kernel_has(dtype: torch.dtype, width: int, expected: bool) -> None:
    assert flash.takes(dtype, width) == expected


def test_attention_takes_bounds_from_the_cpu() -> None:
    """The meta device computes shapes alone, and fails where it meets a tensor of the CPU."""
    starts, ends = bounds([3, 1, 6])
    rows = torch.empty(10, 32, device="meta")
    bias = torch.empty(4, 9, device="meta")
    got = attention(rows, rows, rows, starts, ends, starts, ends, bias, 4, 1.0, True, torch.float32)
    assert got.shape == (10, 32)


def body_of(bundle: Any, precision: str) -> Any:
    graph = bundle.manifest.graph("torch", precision)
    with torch_engine._Weights(bundle, graph, torch.device("cpu")) as weights:
        archive = bundle.graph_archive(graph)
        return torch_engine._module(archive, graph.layout, weights, torch.device("cpu"))


def inputs_of(some: Batch) -> list[Tensor]:
    return [torch.from_numpy(array) for array in packed(some)][:-1]


@torch.inference_mode()
@pytest.mark.parametrize("some", BATCHES)
@pytest.mark.parametrize("family", ["marian", "m2m_100", "t5"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_bound_graph_computes_what_its_operators_do(
    family: str, precision: str, some: Batch, bundle_of: Any, calls: FlashCalls
) -> None:
    body = body_of(bundle_of(family), precision)
    expected = body(*inputs_of(some))
    cuda_binding.bind(body, with_flash=False)
    own = [node for node in body.graph.nodes if str(node.target).startswith("seqloss.")]
    assert own == []
    got = body(*inputs_of(some))
    # An RMS norm's sum may be in another order; the rest is the same to the bit.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2 if precision != "float32" else 1e-5)
    if family != "t5":
        assert torch.equal(got, expected)
    assert calls.dtypes == []


@torch.inference_mode()
@pytest.mark.parametrize("some", BATCHES)
@pytest.mark.parametrize("family", ["marian", "m2m_100"])
def test_flash_gets_16_bits_and_one_layout_for_all_layers(
    family: str, some: Batch, bundle_of: Any, calls: FlashCalls
) -> None:
    body = body_of(bundle_of(family), "bfloat16")
    exact = body_of(bundle_of(family), "float32")(*inputs_of(some))
    plain = body(*inputs_of(some))
    num_attentions = len(body.graph.find_nodes(op="call_function", target=_OPS.attention.default))
    cuda_binding.bind(body, with_flash=True)
    got = body(*inputs_of(some))
    assert len(calls.dtypes) == num_attentions
    assert set(calls.dtypes) == {torch.bfloat16}
    layouts = body.graph.find_nodes(op="call_function", target=flash.laid_out)
    assert len(layouts) == 3  # the encoder's, the decoder's, and across
    # Rounding queries, keys and values once more is no worse than all the rest of the rounding.
    assert (got - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()


@torch.inference_mode()
def test_attention_with_a_bias_stays_in_float32(bundle_of: Any, calls: FlashCalls) -> None:
    """T5's self-attention has one, its cross-attention has none."""
    body = body_of(bundle_of("t5"), "bfloat16")
    cuda_binding.bind(body, with_flash=True)
    kept = body.graph.find_nodes(op="call_function", target=attention)
    assert len(kept) > 0
    assert all(node.args[7] is not None for node in kept)
    body(*inputs_of(batch([0, 1, 2], [3, 5, 4])))
    wide = {node.args[0].args[0].args[0] for node in kept}
    assert {node.args[-1] for node in wide} == {torch.float32}
    assert len(calls.dtypes) == len(
        body.graph.find_nodes(op="call_function", target=flash.flash_attention)
    )


@pytest.mark.parametrize("lay_out", [packed, padded])
def test_staging_brings_inputs_over_as_they_are(lay_out: Any) -> None:
    inputs = lay_out(batch([2, 0, 2, 2], [3, 2, 6, 2]))
    tensors = CudaStaging(torch.device("cpu")).inputs(inputs)
    for array, tensor in zip(inputs, tensors, strict=True):
        assert tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_staging_leaves_on_the_host_what_the_host_wants_to_know() -> None:
    inputs = packed(batch([2, 0, 2, 2], [3, 2, 6, 2]))
    tensors = CudaStaging(torch.device("meta")).inputs(inputs)
    on_host = {
        name
        for name, tensor in zip(inputs.__slots__, tensors, strict=True)
        if tensor.device.type == "cpu"
    }
    assert on_host == HOST_INPUTS
    assert set(torch_engine.BODY_INPUTS["packed"]) > HOST_INPUTS
    rows = padded(batch([2, 0, 2, 2], [3, 2, 6, 2]))
    assert all(one.device.type == "meta" for one in CudaStaging(torch.device("meta")).inputs(rows))


def test_batches_that_follow_each_other_do_not_share_a_buffer() -> None:
    staging = CudaStaging(torch.device("cpu"))
    first = staging.inputs(packed(batch([0, 1, 2], [3, 5, 4])))
    kept = copy.deepcopy(first)
    staging.inputs(packed(batch([0, 1, 2], [3, 5, 4], seed=1)))
    assert all(map(torch.equal, first, kept))


def test_staging_brings_terms_back_to_the_bit() -> None:
    terms = [
        torch.tensor([-0.0, -1.5, torch.nan, -torch.inf]),
        torch.tensor([2**24 + 1, 0, -1, 7], dtype=torch.int32),
    ]
    floats, ints = CudaStaging(torch.device("cpu")).terms(terms)
    assert (floats.dtype, ints.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(floats.view(np.int32), terms[0].view(torch.int32).numpy())
    assert ints.tolist() == terms[1].tolist()


@pytest.mark.parametrize("with_all", [False, True])
def test_an_engine_that_stages_gives_the_same_terms(with_all: bool, bundle_of: Any) -> None:
    bundle = bundle_of("marian")
    engine: Any = open_engine(
        bundle, bundle.manifest.graphs[0], "cpu", kernels=KernelOptions(cache=None)
    )
    some = batch([2, 0, 2, 2], [3, 2, 6, 2])
    some = Batch(
        **{name: getattr(some, name) for name in some.__slots__}
        | {"with_ranks_and_entropies": with_all}
    )
    expected = engine.score(some)
    engine._staging = CudaStaging(torch.device("cpu"))
    got = engine.score(some)
    for name in expected.__slots__:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_a_triton_that_does_not_work_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            raise RuntimeError("Failed to find C compiler")

    projection = output_projection(torch.ones(5, 8), None, [])
    monkeypatch.setattr(cuda_head, "find_spec", lambda name: None)
    assert cuda_head.triton_head(projection, torch.float32) is None
    assert caplog.records == []
    monkeypatch.setattr(cuda_head, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "seqloss.loss.triton_head", SimpleNamespace(TritonHead=Broken))
    capped = projection._replace(softcap=30.0)
    assert cuda_head.triton_head(capped, torch.float32) is None
    assert caplog.records == []
    assert cuda_head.triton_head(projection, torch.float32) is None
    assert "Failed to find C compiler" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["marian", "m2m_100", "t5"])
def test_a_gpu_gives_the_terms_of_a_cpu(
    family: str, precision: str, bundle_of: Any, gpu: str
) -> None:
    bundle = bundle_of(family)
    exact = open_engine(bundle, bundle.manifest.graph("torch", "float32"), "cpu")
    engine = open_engine(bundle, bundle.manifest.graph("torch", precision), gpu)
    tolerance = 1e-3 if precision == "float32" else 0.3
    for some in (batch([0, 1, 2], [3, 5, 4]), batch([2, 0, 2, 2], [3, 2, 6, 2])):
        expected, got = exact.score(some), engine.score(some)
        np.testing.assert_allclose(got.target_logprob, expected.target_logprob, atol=tolerance)
        np.testing.assert_allclose(got.mean_logprob, expected.mean_logprob, atol=tolerance)
    engine.close()


@pytest.mark.gpu
@torch.inference_mode()
def test_nothing_waits_for_the_gpu_before_the_terms(bundle_of: Any, gpu: str) -> None:
    """Torch raises where the host is made to wait."""
    bundle = bundle_of("marian")
    engine: Any = open_engine(bundle, bundle.manifest.graph("torch", "bfloat16"), gpu)
    some = batch([2, 0, 2, 2], [3, 2, 6, 2])
    engine.score(some)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        *inputs, labels = engine._inputs(some)
        engine._head.terms(engine._body(*inputs), labels, with_ranks_and_entropies=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.close()


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    return "cuda:0"
