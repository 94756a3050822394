"""The ONNX engine: what it gives, how it fails, where it runs, and what it does without."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks import resources
from checkpoints import MAIN_FAMILIES, make_model, save_checkpoint
from numeric.reference import reference
from numeric.test_precision import drawn_pairs, mean_losses
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.cli import main
from seqloss.engines import loader, onnx_engine
from seqloss.engines.loader import load_engine
from seqloss.engines.onnx_engine import OnnxEngine
from seqloss.engines.onnx_options import SHARED_INT8
from seqloss.engines.self_test import self_test_errors
from seqloss.errors import (
    BundleError,
    ConfigurationError,
    EngineDeadError,
    OutOfMemoryError,
)
from seqloss.records import Batch, Ragged
from server import Server

# Of errors of a pair's mean nll in int8, in nats: some more than the worst family has.
MEAN_ERROR, LARGEST_ERROR = 0.03, 0.15
# Attention and norms add up in another order in another batch, and a value between two bytes may
# fall to the other side then.
COMPANY_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def bundle(export_once: Any) -> Bundle:
    found: Bundle = export_once("marian", "onnx")
    return found


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> OnnxEngine:
    return OnnxEngine(bundle, bundle.manifest.graph("onnx", "float32"), "cpu", 1)


def small_batch(*, all_terms: bool = False) -> Batch:
    return Batch(
        sources=Ragged.from_rows([[1, 2, 3], [4]], np.int32),
        source_row=np.array([0, 1, 0], np.int32),
        decoder_input_ids=Ragged.from_rows([[100, 5], [100], [100, 6, 7]], np.int32),
        labels=np.array([5, 0, 9, 6, 7, 0], np.int32),
        counted=np.array([True, False, True, True, True, True]),
        with_ranks_and_entropies=all_terms,
    )


def test_terms_are_float32_and_of_the_counted_tokens_alone(engine: OnnxEngine) -> None:
    terms = engine.score(small_batch())
    assert terms.target_logprob.dtype == terms.mean_logprob.dtype == np.float32
    assert terms.target_logprob.shape == (5,)
    assert terms.rank is None
    assert terms.entropy is None
    more = engine.score(small_batch(all_terms=True))
    np.testing.assert_array_equal(more.target_logprob, terms.target_logprob)
    assert more.rank is not None
    assert more.entropy is not None
    assert (more.rank.dtype, more.entropy.dtype) == (np.int32, np.float32)
    assert more.rank.shape == more.entropy.shape == (5,)


def test_threads_that_wait_for_a_batch_sleep(bundle: Bundle) -> None:
    engine = OnnxEngine(bundle, bundle.manifest.graph("onnx", "float32"), "cpu", 4)
    engine.score(small_batch())
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_the_manifest_says_what_the_file_is(bundle: Bundle) -> None:
    graphs = bundle.manifest.graphs
    assert [(graph.engine, graph.precision) for graph in graphs] == [
        ("onnx", "float32"),
        ("onnx", "int8"),
    ]
    for graph in graphs:
        assert (graph.opset, graph.ir_version) == (23, 10)
        assert "torch" in graph.exported_with
        folder = bundle.folder / graph.folder
        assert {path.name for path in folder.iterdir()} == {"loss.onnx", "loss.onnx.data"}
        # All that is large lies outside.
        assert (folder / "loss.onnx").stat().st_size < 2_000_000
    assert not (bundle.folder / "weights.safetensors").exists()
    float32, int8 = (
        (bundle.folder / graph.folder / "loss.onnx.data").stat().st_size for graph in graphs
    )
    assert int8 < float32


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("Failed to allocate memory for requested buffer of size 7"), "memory"),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0"), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("CUDA failure 700: an illegal memory access was encountered"), "dead"),
        (RuntimeError("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED"), "dead"),
        (RuntimeError("Non-zero status code returned while running Gather node"), "other"),
    ],
)
def test_errors_are_told_apart(raised: Exception, expected: str, engine: OnnxEngine) -> None:
    classes = {"memory": OutOfMemoryError, "dead": EngineDeadError, "other": RuntimeError}

    def fail() -> Any:
        raise raised

    broken = OnnxEngine.__new__(OnnxEngine)
    broken._session = SimpleNamespace(io_binding=fail)
    broken._source_multiple = 1
    with pytest.raises(classes[expected]):
        broken.score(small_batch())


def test_bundles_that_earlier_versions_made_of_shared_bytes_say_what_to_do(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs without VNNI ONNX Runtime does not load them."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"graph.cc AddInitializedOrtValue {SHARED_INT8}")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(BundleError, match="export or import it again"):
        load_engine(bundle, "cpu", "int8")


@pytest.mark.parametrize("device", ["cuda:0", "cuda:7", "tpu", "cuda:x"])
def test_devices_that_are_not_there_are_refused(
    device: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_engine, "_num_gpus", lambda: 0)
    with pytest.raises(ConfigurationError, match="device"):
        load_engine(bundle, device, "float32")


def test_a_gpu_without_its_build_of_onnx_runtime_is_refused_by_name(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a GPU, and it is asked for or found: the CPU is no answer."""
    monkeypatch.setattr(onnx_engine, "_num_gpus", lambda: 1)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for device in ("auto", "cuda:0"):
        with pytest.raises(ConfigurationError, match="onnx-gpu"):
            load_engine(bundle, device, "float32")


def test_onnx_runtime_may_not_take_the_cpu_without_a_word(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where CUDA or cuDNN are missing: the session says so, if it is asked."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnx_engine, "_num_gpus", lambda: 1)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(ConfigurationError, match="could not use cuda:0"),
    ):
        load_engine(bundle, "cuda:0", "float32")


def test_int8_is_refused_on_a_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_engine, "device_named", lambda name: name)
    with pytest.raises(ConfigurationError, match="int8 graphs on CPUs only"):
        load_engine(bundle, "cuda:0", "int8")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gpu_computes_what_the_bundle_states(precision: Any, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    checkpoint = save_checkpoint("marian", tmp_path / "checkpoint")
    arguments = ["--engine", "onnx", "--precision", precision]
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "b"), *arguments]) == 0
    loaded = load_engine(open_bundle(tmp_path / "b"), "cuda:0", precision)
    assert loaded.info.device == "cuda:0"


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_pair_in_int8_is_near_transformers_alone_and_in_company(
    family: str, export_once: Any, make_client: Any
) -> None:
    client = make_client({family: export_once(family, "onnx")}, device="cpu", precision="int8")
    sources, targets = drawn_pairs(family)
    model = make_model(family)
    start = model.config.decoder_start_token_id
    expected = [
        reference(model, source, [start, *target[:-1]], target).nll.mean()
        for source, target in zip(sources, targets, strict=True)
    ]
    together = mean_losses(client, sources, targets)
    errors = np.abs(together - expected)
    print(f"{family}: {errors.mean():.4f} on average, {errors.max():.3f} at most")
    assert errors.mean() <= MEAN_ERROR
    assert errors.max() <= LARGEST_ERROR
    assert errors.max() > 1e-4, "so exact is float32 only"
    alone = [
        mean_losses(client, [source], [target])[0]
        for source, target in zip(sources[:12], targets[:12], strict=True)
    ]
    assert np.abs(together[:12] - alone).max() <= COMPANY_TOLERANCE


def test_auto_takes_int8_only_where_there_is_nothing_else(bundle: Bundle, tmp_path: Path) -> None:
    assert load_engine(bundle, "cpu").info.precision == "float32"
    manifest = bundle.manifest
    only = manifest.model_copy(update={"graphs": [manifest.graph("onnx", "int8")]})
    engine = load_engine(Bundle(bundle.folder, only, bundle.digest), "cpu")
    assert engine.info.precision == "int8"


def test_a_bundle_may_have_graphs_for_both_engines(tmp_path: Path) -> None:
    checkpoint = save_checkpoint("marian", tmp_path / "checkpoint")
    output = tmp_path / "both"
    arguments = ["export", str(checkpoint), "--output", str(output), "--precision", "float32"]
    assert main([*arguments, "--engine", "onnx", "torch"]) == 0
    both = open_bundle(output)
    assert [graph.engine for graph in both.manifest.graphs] == ["onnx", "torch"]
    assert load_engine(both, "cpu").info.engine == "onnx"
    by_name = load_engine(both, "cpu", "float32", None, "torch")
    assert by_name.info.engine == "torch"
    assert self_test_errors(by_name, both.manifest).max() < 2e-5


def test_what_cannot_be_is_refused_in_words(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigurationError, match="none for torch; export it again"):
        load_engine(bundle, "cpu", "float32", None, "torch")
    with pytest.raises(ConfigurationError, match="float32, int8 for onnx, and not bfloat16"):
        load_engine(bundle, "cpu", "bfloat16")
    with monkeypatch.context() as patched:
        patched.setattr(loader, "find_spec", lambda _: None)
        with pytest.raises(ConfigurationError, match=r"needs onnxruntime.*seqloss\[onnx\]"):
            load_engine(bundle, "cpu")
    checkpoint = save_checkpoint("marian", tmp_path / "checkpoint")
    arguments = ["export", str(checkpoint), "--output", str(tmp_path / "b")]
    assert main([*arguments, "--precision", "int8"]) == 2
    assert "--engine onnx" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*arguments, "--engine", "onnx", "--precision", "bfloat16"]) == 2
        assert "no bfloat16 on CPUs" in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


def test_a_file_that_onnx_runtime_does_not_take_is_the_bundles_fault(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "graph_archive", lambda *_: b"no model")
    with pytest.raises(BundleError, match="does not load"):
        load_engine(bundle, "cpu", "float32")


NUM_REQUESTS = 5000


def test_memory_plateaus_whatever_the_shapes(bundle: Bundle) -> None:
    """Of 5,000 requests of random shapes the last third needs no more memory than the one before.

    A runtime's arena could grow with every new shape.
    """
    generator = np.random.default_rng(31)
    sizes: list[int | None] = []
    server = Server(f"model={bundle.folder}", "--device", "cpu")
    try:
        with server.client() as client:
            for _ in range(NUM_REQUESTS):
                shape = generator.integers(1, 49, (2, generator.integers(1, 9)))
                sources, targets = (
                    [generator.integers(100, size=length).tolist() for length in lengths]
                    for lengths in shape
                )
                body = {"source_ids": sources, "target_ids": targets}
                reply = client.post("/loss", json=body)
                assert reply.status_code == 200, reply.text
                sizes.append(resources.resident_bytes(server.process.pid))
    finally:
        server.process.terminate()
        server.exit_status()
    if None in sizes:
        pytest.skip("this system does not count memory")
    third = NUM_REQUESTS // 3
    middle, last = np.median(sizes[third : 2 * third]), np.median(sizes[2 * third :])
    print(f"resident: {middle / 1e6:.1f} MB, {last / 1e6:.1f} MB")
    assert last <= 1.03 * middle


BLOCKED = ("torch", "transformers", "safetensors", "tokenizers", "onnx", "onnxscript", "onnx_ir")
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_an_onnx_bundle_is_served_where_torch_cannot_be_imported(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in BLOCKED:
        tried = subprocess.run(
            [sys.executable, "-c", f"import {name}"], check=False, capture_output=True
        )
        assert b"ModuleNotFoundError" in tried.stderr
    server = Server(f"model={bundle.folder}", "--device", "cpu")
    try:
        with server.client() as client:
            shown = client.get("/models").json()["models"][0]
            assert (shown["engine"], shown["precision"]) == ("onnx", "float32")
            assert [graph["precision"] for graph in shown["graphs"]] == ["float32", "int8"]
            reply = client.post("/loss", json={"source_ids": [[1, 2]], "target_ids": [[3, 4]]})
            assert reply.status_code == 200, reply.text
            assert reply.json()["losses"][0] > 0
    finally:
        server.process.terminate()
    assert server.exit_status() in (0, -15)
