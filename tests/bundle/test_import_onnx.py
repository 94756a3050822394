"""ONNX files of other exporters: served like any bundle, or refused with every fault named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import DeduplicateInitializersPass
from onnxruntime import GraphOptimizationLevel, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

from checkpoints import MAX_POSITIONS, VOCABULARY_SIZE, make_model
from numeric.reference import Reference, random_pairs, reference
from onnx_exports import save_onnx
from seqloss.bundle.manifest import Manifest
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.cli import main
from seqloss.engines.onnx_options import session_options
from seqloss.export.importer import ImportOptions, import_onnx
from seqloss.export.onnx_files import OnnxSessions, read_onnx_files

TOLERANCE = 2e-5
FAMILIES = ("marian", "t5")
TERMS = {"return": ["token_nlls", "token_ranks", "token_entropies"]}


@pytest.fixture(scope="session")
def files_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's files; each exported once per run, and not to be changed."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_onnx(family, tmp_path_factory.mktemp(family) / "files")
        return made[family]

    return make


@pytest.fixture
def files(files_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """Marian's, to be changed."""
    return Path(shutil.copytree(files_of("marian"), tmp_path / "files"))


@pytest.fixture
def t5_files(files_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """T5's, whose configuration need not say where to start."""
    return Path(shutil.copytree(files_of("t5"), tmp_path / "files"))


def imported(files: Path, output: Path, **options: Any) -> Bundle:
    import_onnx(files, output, ImportOptions(**options))
    return open_bundle(output)


def random_request(family: str) -> tuple[dict[str, Any], list[Reference]]:
    """A request, and what transformers says of each of its targets."""
    model = make_model(family)
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    request = random_pairs(5, VOCABULARY_SIZE, MAX_POSITIONS, start=start, pad=pad)
    pairs = zip(request["source_index"], request["target_ids"], strict=True)
    return request, [
        reference(model, request["source_ids"][index], [start, *target[:-1]], target)
        for index, target in pairs
    ]


def scored(client: Any, request: dict[str, Any], **changes: Any) -> dict[str, Any]:
    response = client.post("/loss", json=request | changes)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def largest_difference(rows: list[list[float]], expected: list[Any]) -> float:
    return max(
        float(np.abs(np.array(row) - want).max()) for row, want in zip(rows, expected, strict=True)
    )


def change_model(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def change_config(files: Path, **changes: Any) -> None:
    path = files / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(files: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What `seqloss import-onnx` says; it must refuse and write nothing."""
    output = files.parent / "bundle"
    before = sorted(files.parent.iterdir())
    assert main(["import-onnx", str(files), "--output", str(output), *more]) == 2
    assert sorted(files.parent.iterdir()) == before
    return capsys.readouterr().err


# ---------------------------------------------------------------- what is served


@pytest.mark.parametrize("family", FAMILIES)
def test_all_terms_match_transformers(
    family: str, files_of: Callable[[str], Path], tmp_path: Path, make_client: Any
) -> None:
    client = make_client({family: imported(files_of(family), tmp_path / "bundle")}, device="cpu")
    request, expected = random_request(family)
    reply = scored(client, request, **TERMS)
    assert largest_difference(reply["token_nlls"], [one.nll for one in expected]) <= TOLERANCE
    assert min(map(min, reply["token_nlls"])) >= 0
    entropies = [one.entropy for one in expected]
    assert largest_difference(reply["token_entropies"], entropies) <= TOLERANCE
    for ranks, one in zip(reply["token_ranks"], expected, strict=True):
        assert (ranks >= one.least_rank).all()
        assert (ranks <= one.largest_rank).all()
    # With all the probability spread, the loss is the mean over the classes.
    reply = scored(client, request, label_smoothing=1.0, **{"return": ["token_losses"]})
    means = [one.negative_mean_logprob for one in expected]
    assert largest_difference(reply["token_losses"], means) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_lose_the_same_in_any_company(
    family: str, files_of: Callable[[str], Path], tmp_path: Path, make_client: Any
) -> None:
    client = make_client({family: imported(files_of(family), tmp_path / "bundle")}, device="cpu")
    request, expected = random_request(family)
    for index in range(0, len(request["target_ids"]), 5):
        alone = {
            "source_ids": [request["source_ids"][request["source_index"][index]]],
            "target_ids": [request["target_ids"][index]],
        }
        reply = scored(client, alone, **TERMS)
        assert largest_difference(reply["token_nlls"], [expected[index].nll]) <= TOLERANCE
    twice = {key: value * 2 for key, value in request.items() if key != "source_ids"}
    reply = scored(client, request | twice, **TERMS)
    assert largest_difference(reply["token_nlls"], [one.nll for one in expected * 2]) <= TOLERANCE


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """A few random inputs of a part."""

    def __init__(self, part: str) -> None:
        random = np.random.default_rng(3)
        ids = random.integers(4, VOCABULARY_SIZE, (8, 1, 9))
        mask = np.ones((1, 9), np.int64)
        hidden = random.normal(size=(8, 1, 9, 32)).astype(np.float32)
        self._inputs = iter(
            [
                {"input_ids": row, "attention_mask": mask}
                if part.startswith("encoder")
                else {
                    "input_ids": row,
                    "encoder_attention_mask": mask,
                    "encoder_hidden_states": one,
                }
                for row, one in zip(ids, hidden, strict=True)
            ]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._inputs, None)


@pytest.mark.parametrize("shared", [False, True], ids=["own-constants", "shared-constants"])
def test_products_in_bytes_are_those_of_the_files(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, shared: bool
) -> None:
    """CPUs without VNNI compute them in another way, for which each needs its own constants."""
    for part in ("encoder_model.onnx", "decoder_model.onnx"):
        quantize_static(
            files / part,
            files / part,
            Calibration(part),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        if shared:
            model = onnx_ir.load(files / part)
            DeduplicateInitializersPass()(model)
            onnx_ir.save(model, files / part)
    manifest = imported(files, tmp_path / "bundle").manifest
    (graph,) = manifest.graphs
    assert graph.precision == "int8"
    assert graph.max_error <= TOLERANCE

    def plainly(severity: int) -> SessionOptions:
        """Bytes are made floats again, and these are multiplied."""
        options = session_options(severity)
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
        return options

    read = read_onnx_files(files, None)
    pair = [5, 80, 33, 7, 0], [[100, 9, 61, 44]]
    found = OnnxSessions(read).logits(*pair)
    monkeypatch.setattr("seqloss.export.onnx_files.session_options", plainly)
    exact = OnnxSessions(read).logits(*pair)
    # Sums that overflow are off by 2.
    assert (found - exact).abs().max() <= 0.1


def test_the_manifest_says_what_the_files_are(
    files_of: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = imported(files_of("marian"), tmp_path / "bundle").manifest
    (graph,) = manifest.graphs
    assert graph.makes_logits
    assert (graph.engine, graph.precision, graph.folder) == (
        "onnx",
        "float32",
        "graphs/onnx-float32",
    )
    assert graph.max_error <= TOLERANCE
    assert "pytorch" in graph.exported_with
    written = onnx.load(tmp_path / "bundle" / graph.path, load_external_data=False)
    opsets = {one.domain: one.version for one in written.opset_import}
    assert (opsets, written.ir_version) == ({"": graph.opset}, graph.ir_version)
    assert not any("present" in name for node in written.graph.node for name in node.output)
    assert manifest.self_test.reference == "imported"
    sizes = manifest.vocabulary
    assert (sizes.source, sizes.target, sizes.classes) == (VOCABULARY_SIZE,) * 3
    assert (manifest.family, manifest.checkpoint.name) == ("marian", "files")
    assert (manifest.max_source_tokens, manifest.max_target_tokens) == (MAX_POSITIONS,) * 2
    ids = manifest.special_ids
    assert (ids.decoder_start, ids.pad, ids.eos) == (100, 100, 0)


def test_the_self_test_has_what_the_files_compute(
    files_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Which here is what transformers computes, for they were made of its model."""
    test = imported(files_of("t5"), tmp_path / "bundle").manifest.self_test
    model = make_model("t5")
    start = model.config.decoder_start_token_id
    for index, target, nlls in zip(
        test.source_index, test.target_ids, test.token_nlls, strict=True
    ):
        expected = reference(model, test.source_ids[index], [start, *target[:-1]], target).nll
        assert np.abs(np.array(nlls) - expected).max() <= TOLERANCE


def test_excluded_classes_leave_the_softmax_and_its_mean(
    files_of: Callable[[str], Path], tmp_path: Path, make_client: Any
) -> None:
    pad = VOCABULARY_SIZE - 1
    bundle = imported(files_of("marian"), tmp_path / "bundle", excluded_classes=((pad, pad),))
    client = make_client({"without_pad": bundle}, device="cpu")
    source, target = [3, 4, 5], [6, 7, 8, 0]
    with torch.inference_mode():
        fed = torch.tensor([[pad, *target[:-1]]])
        logits = make_model("marian")(torch.tensor([source]), decoder_input_ids=fed).logits[0]
    logprobs = logits.double()[:, :pad].log_softmax(-1)
    request = {"source_ids": [source], "target_ids": [target]}
    reply = scored(client, request, **TERMS)
    assert largest_difference(reply["token_nlls"], [-logprobs[range(4), target].numpy()]) <= (
        TOLERANCE
    )
    entropy = -(logprobs.exp() * logprobs).sum(-1).numpy()
    assert largest_difference(reply["token_entropies"], [entropy]) <= TOLERANCE
    reply = scored(client, request, label_smoothing=1.0, **{"return": ["token_losses"]})
    assert largest_difference(reply["token_losses"], [-logprobs.mean(-1).numpy()]) <= TOLERANCE
    refused = client.post("/loss", json={"source_ids": [source], "target_ids": [[6, pad]]})
    assert refused.status_code == 422


def test_a_given_start_id_is_the_bundle_s(t5_files: Path, tmp_path: Path) -> None:
    change_config(t5_files, decoder_start_token_id=None)
    (t5_files / "generation_config.json").unlink()
    bundle = imported(t5_files, tmp_path / "bundle", decoder_start=11)
    assert bundle.manifest.special_ids.decoder_start == 11


def test_weights_that_both_parts_have_are_stored_once(
    files_of: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = imported(files_of("marian"), tmp_path / "bundle")
    (graph,) = bundle.manifest.graphs
    model = onnx.load(bundle.folder / graph.path)
    tables = [one for one in model.graph.initializer if one.dims == [VOCABULARY_SIZE, 32]]
    values = {numpy_helper.to_array(one).tobytes() for one in tables}
    assert len(tables) == len(values)


def test_ids_of_32_bits_are_given_as_such(files: Path, tmp_path: Path) -> None:
    """Some exporters have them so; the graph casts."""

    def narrow(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            if value.name == "input_ids":
                value.type.tensor_type.elem_type = TensorProto.INT32
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == "input_ids":
                    node.input[place] = "wide_ids"
        widened = helper.make_node("Cast", ["input_ids"], ["wide_ids"], to=TensorProto.INT64)
        model.graph.node.insert(0, widened)

    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        change_model(files / name, narrow)
    manifest = imported(files, tmp_path / "bundle").manifest
    assert manifest.graphs[0].max_error <= TOLERANCE


def test_an_old_opset_is_brought_to_a_newer_one(files: Path, tmp_path: Path) -> None:
    """Encoder and decoder need not have the same."""
    change_model(files / "encoder_model.onnx", _to_an_older_opset)
    (graph,) = imported(files, tmp_path / "bundle").manifest.graphs
    decoder = onnx.load(files / "decoder_model.onnx", load_external_data=False)
    assert graph.opset == decoder.opset_import[0].version
    assert graph.max_error <= TOLERANCE


def _to_an_older_opset(model: onnx.ModelProto) -> None:
    """None of the encoder's operators changed between the two."""
    model.opset_import[0].version -= 1


def test_16_bit_files_are_called_what_they_are(
    files: Path, tmp_path: Path, make_client: Any
) -> None:
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        onnx.save(convert_float_to_float16(onnx.load(files / name)), files / name)
    bundle = imported(files, tmp_path / "bundle")
    (graph,) = bundle.manifest.graphs
    assert graph.precision == "float16"
    client = make_client({"marian": bundle}, device="cpu", precision="float16")
    request, expected = random_request("marian")
    reply = scored(client, request, **TERMS)
    mean = np.mean([np.mean(row) for row in reply["token_nlls"]])
    assert mean == pytest.approx(np.mean([one.nll.mean() for one in expected]), abs=0.02)


# ---------------------------------------------------------------- what is refused


def test_missing_files_and_ids_are_all_named(
    t5_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (t5_files / "encoder_model.onnx").unlink()
    (t5_files / "decoder_model.onnx").unlink()
    (t5_files / "generation_config.json").unlink()
    change_config(t5_files, decoder_start_token_id=None)
    said = refusal(t5_files, capsys)
    assert "no encoder_model.onnx" in said
    assert "no decoder_model.onnx" in said
    assert "no decoder_start_token_id" in said


def test_a_folder_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a folder" in refusal(tmp_path / "nowhere", capsys)


def test_a_folder_without_a_configuration_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "config.json").unlink()
    assert "no configuration" in refusal(files, capsys)


def test_a_merged_decoder_alone_is_refused_with_the_cure(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "decoder_model.onnx").rename(files / "decoder_model_merged.onnx")
    said = refusal(files, capsys)
    assert "no decoder_model.onnx" in said
    assert "--task text2text-generation" in said


def test_a_decoder_without_the_encoder_s_states_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            if value.name == "encoder_hidden_states":
                value.name = "past_key_values"
        model.graph.output[0].name = "scores"

    change_model(files / "decoder_model.onnx", rename)
    said = refusal(files, capsys)
    assert "decoder_model.onnx has no input 'encoder_hidden_states'" in said
    assert "inputs that nobody gives: past_key_values" in said
    assert "decoder_model.onnx has no output 'logits'; it has scores, present" in said


def test_a_file_that_is_no_model_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "encoder_model.onnx").write_bytes(b"\xff" * 100)
    assert "encoder_model.onnx cannot be read" in refusal(files, capsys)


def test_weights_that_are_missing_or_cut_off_are_named(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = files / "decoder_model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert "'decoder_model.onnx.data', and that file is cut off" in refusal(files, capsys)
    weights.unlink()
    assert "'decoder_model.onnx.data', and that file is missing" in refusal(files, capsys)


@pytest.mark.parametrize("location", ["../stolen", "/etc/hostname"])
def test_weights_outside_the_folder_are_not_read(
    location: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def move(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    (files.parent / "stolen").write_bytes(bytes(10**6))
    path = files / "decoder_model.onnx"
    model = onnx.load(path, load_external_data=False)
    move(model)
    path.write_bytes(model.SerializeToString())
    assert f"{location!r}, which is not inside the folder" in refusal(files, capsys)


def test_a_link_out_of_the_folder_is_not_followed(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = files / "decoder_model.onnx.data"
    weights.rename(files.parent / "elsewhere")
    weights.symlink_to(files.parent / "elsewhere")
    assert "which is not inside the folder" in refusal(files, capsys)


def test_a_configuration_that_promises_more_ids_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(files, vocab_size=VOCABULARY_SIZE + 1)
    assert "do not compute" in refusal(files, capsys)
    change_config(files, vocab_size=VOCABULARY_SIZE, decoder_vocab_size=VOCABULARY_SIZE + 1)
    said = refusal(files, capsys)
    assert f"promises {VOCABULARY_SIZE + 1} target ids" in said


def test_a_configuration_that_promises_more_positions_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(files, max_position_embeddings=MAX_POSITIONS + 1)
    assert "do not compute" in refusal(files, capsys)


def test_what_is_rounded_by_a_scale_of_the_whole_batch_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pair's loss would depend on its batch, which no tolerance makes good."""

    def quantise(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if "logits" in node.output)
        node.output[0] = "exact"
        model.graph.node.extend(
            [
                helper.make_node("DynamicQuantizeLinear", ["exact"], ["bytes", "scale", "zero"]),
                helper.make_node("DequantizeLinear", ["bytes", "scale", "zero"], ["logits"]),
            ]
        )

    change_model(files / "decoder_model.onnx", quantise)
    assert "one scale for all tokens of a batch" in refusal(files, capsys)


def test_weights_of_a_kind_that_bundles_have_not_are_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def widen(model: onnx.ModelProto) -> None:
        nodes = model.graph.node
        node = next(node for node in nodes if "logits" in node.output)
        node.output[0] = "narrow"
        zeros = np.zeros((1, VOCABULARY_SIZE))
        model.graph.initializer.append(numpy_helper.from_array(zeros, "wide_zeros"))
        nodes.extend(
            [
                helper.make_node("Cast", ["narrow"], ["wide"], to=TensorProto.DOUBLE),
                helper.make_node("Add", ["wide", "wide_zeros"], ["sum"]),
                helper.make_node("Cast", ["sum"], ["logits"], to=TensorProto.FLOAT),
            ]
        )

    change_model(files / "decoder_model.onnx", widen)
    assert "its weights are of DOUBLE" in refusal(files, capsys)


@pytest.mark.parametrize("classes", ["90-120", "5-3", "0-100"])
def test_classes_that_cannot_be_excluded_are_refused(
    classes: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exclude" in refusal(files, capsys, "--exclude-classes", classes)


def test_no_bundle_is_replaced_unless_it_is_asked_for(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(files, tmp_path / "bundle")
    assert "exists" in refusal(files, capsys)
    command = ["import-onnx", str(files), "--output", str(tmp_path / "bundle"), "--force"]
    assert main(command) == 0


# ---------------------------------------------------------------- the commands


def test_the_command_says_how_far_the_graph_is_from_the_files(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    assert main(["import-onnx", str(files), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "marian; nats per token from the imported files:" in said
    assert f"serve it: seqloss serve {output}" in said
    assert main(["inspect", str(output)]) == 0
    assert "nats per token from the imported files" in capsys.readouterr().out


def test_imports_are_told_from_exports(bundle_of: Any) -> None:
    manifest: Manifest = bundle_of("marian").manifest
    assert manifest.self_test.reference == "transformers"
    assert not any(graph.makes_logits for graph in manifest.graphs)
