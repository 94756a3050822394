"""Checkpoints that cannot be exported: every fault named, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from checkpoints import save_checkpoint
from seqloss.bundle import graph_policy
from seqloss.cli import main
from seqloss.export import huggingface
from seqloss.export.huggingface import load_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint("bart", tmp_path / "checkpoint")


def refusal(checkpoint: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What `seqloss export` says; it must refuse and write nothing."""
    output = checkpoint.parent / "bundle"
    before = sorted(checkpoint.parent.iterdir())
    status = main(["export", str(checkpoint), "--output", str(output), *more])
    assert status == 2
    assert sorted(checkpoint.parent.iterdir()) == before
    return capsys.readouterr().err


def change_weights(checkpoint: Path, change: Any) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def change_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_weights_are_all_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("model.encoder.layers.0.fc1.weight", "model.decoder.layers.1.fc2.bias")

    def remove(weights: dict[str, torch.Tensor]) -> None:
        for name in names:
            del weights[name]

    change_weights(checkpoint, remove)
    said = refusal(checkpoint, capsys)
    assert all(name in said for name in names)


def test_faults_of_configuration_and_weights_are_listed_together(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.encoder.layers.0.fc1.weight"]
        weights["model.decoder.layers.0.fc1.weight"] = torch.zeros(3, 3)
        weights["model.decoder.layers.0.fc2.bias"][0] = torch.nan
        weights["stray"] = torch.zeros(1)

    change_weights(checkpoint, spoil)
    change_config(checkpoint, decoder_start_token_id=None)
    (checkpoint / "generation_config.json").unlink()
    said = refusal(checkpoint, capsys)
    for fault in (
        "no decoder_start_token_id",
        "lack model.encoder.layers.0.fc1.weight",
        "another shape than its configuration: model.decoder.layers.0.fc1.weight",
        "NaN or infinity",
        "stray",
    ):
        assert fault in said, said


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: BertModel(
                BertConfig(
                    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
                )
            ),
            "'bert', is no encoder-decoder",
        ),
        (
            lambda: SwitchTransformersForConditionalGeneration(
                SwitchTransformersConfig(
                    d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
                )
            ),
            "'switch_transformers', is not supported: its experts",
        ),
    ],
)
def test_other_models_are_refused_by_the_name_of_their_family(
    model: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model().save_pretrained(tmp_path / "checkpoint")
    assert words in refusal(tmp_path / "checkpoint", capsys)


def test_a_truncated_weight_file_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "weights do not load" in refusal(checkpoint, capsys)


def test_a_folder_without_weights_or_configuration_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "it has no weights" in refusal(checkpoint, capsys)
    (checkpoint / "config.json").unlink()
    assert "no configuration" in refusal(checkpoint, capsys)


def test_a_configuration_that_transformers_refuses_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(checkpoint, d_model="wide")
    assert "no configuration that transformers reads" in refusal(checkpoint, capsys)


def test_a_name_that_is_nowhere_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(tmp_path / "no-such-checkpoint", capsys)
    assert "neither a folder nor a checkpoint" in said


def test_a_hub_that_cannot_be_reached_is_said_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoNetworkError(Exception):
        """Not one of the hub's own."""

    def fail(*_: Any) -> Any:
        raise NoNetworkError("name or service not known")

    monkeypatch.setattr(huggingface.HfApi, "list_repo_files", fail)
    assert "name or service not known" in refusal(tmp_path / "something", capsys)


def test_what_lies_at_the_output_is_not_destroyed(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = checkpoint.parent / "bundle"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert "exists" in refusal(checkpoint, capsys)
    assert "replaces bundles only" in refusal(checkpoint, capsys, "--force")
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_an_operator_that_bundles_may_not_use_is_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_policy, "_ATEN", graph_policy._ATEN - {"embedding"})
    said = refusal(checkpoint, capsys)
    assert "graph_policy.py" in said
    assert "torch.ops.aten.embedding.default" in said


@pytest.mark.parametrize("classes", ["90-120", "5-3", "0-100"])
def test_classes_that_cannot_be_excluded_are_refused(
    classes: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exclude" in refusal(checkpoint, capsys, "--exclude-classes", classes)


def test_a_pickled_checkpoint_is_read_without_running_it(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    assert load_checkpoint(str(checkpoint)).model_type == "bart"

    class Hostile:
        def __reduce__(self) -> Any:
            return (checkpoint.parent.joinpath("ran").touch, ())

    torch.save(weights | {"stray": Hostile()}, checkpoint / "pytorch_model.bin")
    assert "weights do not load" in refusal(checkpoint, capsys)
    assert not checkpoint.parent.joinpath("ran").exists()


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_name_downloads_configuration_and_one_kind_of_weights(
    weights: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(checkpoint)

    files = ["config.json", "README.md", "tf_model.h5", weights]
    monkeypatch.setattr(huggingface.HfApi, "list_repo_files", lambda _, name: files)
    monkeypatch.setattr(huggingface, "snapshot_download", download)
    loaded = load_checkpoint("someone/something")
    assert loaded.name == "someone/something"
    pattern = "*.safetensors" if weights == "model.safetensors" else "pytorch_model*.bin"
    vocabularies = ["*.model", "*.spm", "merges.txt", "vocab.txt"]
    assert asked == [("someone/something", ["*.json", *vocabularies, pattern])]
