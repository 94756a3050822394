"""`seqloss verify`, `seqloss inspect` and the flags of the other commands."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from checkpoints import MAX_POSITIONS, VOCABULARY_SIZE, make_model, save_checkpoint
from conftest import KeptEngine
from numeric.reference import reference
from seqloss.bundle.manifest import MANIFEST_NAME, Graph
from seqloss.bundle.reader import Bundle
from seqloss.cli import main
from seqloss.engines.torch_engine import TorchEngine
from seqloss.export import verify
from seqloss.export.verify import Comparison, Verification

START = 100  # of the marian checkpoint
PAIRS = [
    ([3, 1, 4], [15, 9, 2, 6]),
    ([100], [0]),
    ([5] * MAX_POSITIONS, [35, 89] * (MAX_POSITIONS // 2)),
    ([0, 100, 0], [100, 0, 100]),
]


@dataclass(frozen=True)
class Said:
    """What a command said, and its exit status."""

    status: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: Any) -> Said:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's own
            status = int(end.code or 0)
        return Said(status, *capsys.readouterr())

    return run


@pytest.fixture
def marian(bundle_of: Callable[[str], Bundle]) -> Path:
    """A bundle; its checkpoint lies beside it."""
    return bundle_of("marian").folder


@pytest.fixture(scope="module")
def engines() -> dict[Any, KeptEngine]:
    return {}


@pytest.fixture(autouse=True)
def load_once(engines: dict[Any, KeptEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes seconds: each graph is loaded once for all tests here."""

    def load(bundle: Bundle, graph: Graph, device: str) -> KeptEngine:
        key = (bundle.digest, graph.folder, device)
        if key not in engines:
            engines[key] = KeptEngine(TorchEngine(bundle, graph, device))
        return engines[key]

    monkeypatch.setattr(verify, "open_engine", load)


@pytest.fixture(scope="module")
def other_weights(bundle_of: Callable[[str], Bundle], tmp_path_factory: Any) -> Path:
    """The marian checkpoint, but that another bias is added to its logits."""
    original = bundle_of("marian").folder.with_name("checkpoint")
    folder = shutil.copytree(original, tmp_path_factory.mktemp("other") / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    weights["final_logits_bias"] = -weights["final_logits_bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def pairs_file(folder: Path, *lines: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def line(source: Any = (1, 2), target: Any = (3, 4)) -> str:
    return json.dumps({"source_ids": source, "target_ids": target})


def nlls_by_transformers(checkpoint: Path) -> list[np.ndarray]:
    """Of the pairs, one array each."""
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    return [reference(model, source, [START, *target[:-1]], target).nll for source, target in PAIRS]


# ---------------------------------------------------------------- seqloss verify


def test_a_bundle_of_the_checkpoint_passes(command: Command, marian: Path) -> None:
    against = ("--against", marian.with_name("checkpoint"), "--device", "cpu", "--sources", 3)
    said = command("verify", marian, *against)
    assert said.status == 0, said.err
    rows = [row.split() for row in said.out.splitlines()]
    assert rows[0][:2] == ["on", "cpu,"]
    assert [row[:4] for row in rows[3:]] == [
        ["torch", "float32", "drawn", "12"],
        ["torch", "bfloat16", "drawn", "12"],
    ]
    assert "FAILED" not in said.out
    assert "other weights" not in said.out

    same = command("verify", marian, *against, "--json")
    assert same.status == 0
    content = json.loads(same.out)
    assert content["passed"] is content["same_checkpoint"] is True
    assert content["device"] == "cpu"
    assert len(content["comparisons"]) == 2
    for row, comparison in zip(rows[3:], content["comparisons"], strict=True):
        names = ("engine", "precision", "pairs", "num_pairs", "num_tokens")
        assert row[:5] == [str(comparison[name]) for name in names]
        assert row[5] == f"{comparison['mean_nll']:.3f}"
        assert [float(number) for number in row[6:]] == pytest.approx(
            [
                comparison[f"{kind}_{what}_error"]
                for what in ("token", "pair")
                for kind in ("max", "mean")
            ],
            rel=0.06,  # of two digits
        )
        assert 0 <= comparison["mean_token_error"] <= comparison["max_token_error"]
        assert comparison["max_token_error"] <= comparison["tolerance"]
        assert comparison["least_nll"] >= 0
    exact, coarse = content["comparisons"]
    assert exact["max_token_error"] < 1e-4 < coarse["max_token_error"]
    assert exact["mean_nll"] == coarse["mean_nll"] < 0.8 * math.log(VOCABULARY_SIZE)


def test_a_bundle_of_another_checkpoint_fails_and_says_so(
    command: Command, marian: Path, other_weights: Path
) -> None:
    against = ("--against", other_weights, "--device", "cpu", "--sources", 2)
    said = command("verify", marian, *against)
    assert said.status == 1
    assert said.out.count("FAILED: ") == 2
    assert "exported from a checkpoint with other weights" in said.out
    said = command("verify", marian, *against, "--json")
    assert said.status == 1
    content = json.loads(said.out)
    assert content["passed"] is content["same_checkpoint"] is False


def test_errors_are_the_differences_of_what_transformers_says(
    command: Command, marian: Path, other_weights: Path, tmp_path: Path
) -> None:
    """The bundle is one model and the checkpoint another: both by transformers alone."""
    scored = nlls_by_transformers(marian.with_name("checkpoint"))
    expected = nlls_by_transformers(other_weights)
    token_error = np.abs(np.concatenate(scored) - np.concatenate(expected))
    pair_error = np.array([abs(a.mean() - b.mean()) for a, b in zip(scored, expected, strict=True)])
    assert token_error.max() > 1, "the test needs errors that can be told from rounding"

    path = pairs_file(tmp_path, *(line(*pair) for pair in PAIRS))
    options = ("--sources", 1, "--device", "cpu", "--pairs", path, "--json")
    said = command("verify", marian, "--against", other_weights, *options)

    assert said.status == 1
    comparisons = json.loads(said.out)["comparisons"]
    assert [(row["precision"], row["pairs"], row["num_pairs"]) for row in comparisons] == [
        ("float32", "drawn", 4),
        ("float32", "given", 4),
        ("bfloat16", "drawn", 4),
        ("bfloat16", "given", 4),
    ]
    given = comparisons[1]
    assert given["num_tokens"] == sum(len(target) for _, target in PAIRS)
    numbers = {
        "mean_nll": np.concatenate(expected).mean(),
        "least_nll": np.concatenate(scored).min(),
        "max_token_error": token_error.max(),
        "mean_token_error": token_error.mean(),
        "max_pair_error": pair_error.max(),
        "mean_pair_error": pair_error.mean(),
    }
    assert {name: given[name] for name in numbers} == pytest.approx(numbers, abs=1e-4)
    assert comparisons[3]["mean_nll"] == given["mean_nll"]


@pytest.mark.parametrize(
    ("lines", "faults"),
    [
        ([], []),
        (["not JSON"], ["line 1: "]),
        ([line(), "", line()], ["line 2: "]),
        ([line(), "[1, 2]"], ["line 2: "]),
        (['{"source_ids": [1]}'], ["line 1: ('target_ids',): Field required"]),
        (['{"target_ids": [1]}'], ["line 1: ('source_ids',): Field required"]),
        ([line(source=[])], ["line 1: ('source_ids',): "]),
        ([line(target=[])], ["line 1: ('target_ids',): "]),
        ([line(), line(source=[101])], ["line 2: the source has the id 101, and there are 101"]),
        ([line(target=[5, 10**30])], ["line 1: the target has the id 1000"]),
        ([line(target=[5, -1])], ["line 1: ('target_ids', 1): "]),
        ([line(target=[5, 2.0])], ["line 1: ('target_ids', 1): "]),
        ([line(target=["5"])], ["line 1: ('target_ids', 0): "]),
        ([line(target=[True])], ["line 1: ('target_ids', 0): "]),
        ([line(target=None)], ["line 1: ('target_ids',): "]),
        ([line(source=[1] * 49)], ["line 1: the source has 49 ids, and 48 are possible"]),
        ([line(target=[1] * 49)], ["line 1: the target has 49 ids, and 48 are possible"]),
        (
            [line(source=[1] * 49, target=[101]), line(), "?"],
            ["line 1: the source has 49", "line 1: the target has the id 101", "line 3: "],
        ),
    ],
)
def test_a_file_that_does_not_hold_pairs_is_refused_by_its_lines(
    lines: list[str], faults: list[str], command: Command, marian: Path, tmp_path: Path
) -> None:
    path = pairs_file(tmp_path, *lines)
    checkpoint = marian.with_name("checkpoint")
    options = ("--sources", 1, "--device", "cpu", "--pairs", path)
    said = command("verify", marian, "--against", checkpoint, *options)
    assert said.status == 2
    assert not said.out
    assert f"{path} is not a file of pairs" in said.err
    assert said.err.count("- line ") == len(faults)
    for fault in faults:
        assert fault in said.err


@pytest.mark.parametrize("name", ["nothing", "."])
def test_a_file_that_cannot_be_read_is_refused(
    name: str, command: Command, marian: Path, tmp_path: Path
) -> None:
    checkpoint = marian.with_name("checkpoint")
    options = ("--sources", 1, "--pairs", tmp_path / name)
    said = command("verify", marian, "--against", checkpoint, *options)
    assert said.status == 2
    assert "cannot be read" in said.err


def comparison(**changes: Any) -> Comparison:
    fields: dict[str, Any] = {
        "engine": "torch",
        "precision": "float32",
        "pairs": "drawn",
        "num_pairs": 1,
        "num_tokens": 1,
        "mean_nll": 1.0,
        "least_nll": 0.0,
        "max_token_error": 0.5,
        "mean_token_error": 0.5,
        "max_pair_error": 0.5,
        "mean_pair_error": 0.5,
        "tolerance": 0.5,
    }
    return Comparison(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"max_token_error": 0.51}, False),
        ({"max_token_error": math.nan}, False),
        ({"max_token_error": math.inf}, False),
        ({"least_nll": -1e-9}, False),
        ({"least_nll": math.nan}, False),
    ],
)
def test_only_numbers_within_the_tolerance_pass(changes: Any, passed: bool) -> None:
    one = comparison(**changes)
    assert one.passed is passed
    verification = Verification(True, "cpu", (comparison(), one))
    assert verification.passed is verification.as_json()["passed"] is passed
    assert ("FAILED" in verification.as_text()) is not passed


def test_a_graph_that_says_nan_fails(
    command: Command, marian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = verify.token_nlls

    def one_is_nan(*arguments: Any) -> Any:
        nlls = right(*arguments)
        nlls[-1] = math.nan
        return nlls

    monkeypatch.setattr(verify, "token_nlls", one_is_nan)
    checkpoint = marian.with_name("checkpoint")
    said = command("verify", marian, "--against", checkpoint, "--sources", 1, "--device", "cpu")
    assert said.status == 1
    assert said.out.count("FAILED") == 2


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many"])
def test_a_number_of_sources_that_is_none_is_refused(
    number: str, command: Command, marian: Path
) -> None:
    said = command("verify", marian, "--against", "nothing", "--sources", number)
    assert said.status == 2
    assert f"{number!r} is not a number above 0" in said.err


def test_a_checkpoint_or_a_bundle_that_is_none_is_refused(
    command: Command, marian: Path, tmp_path: Path
) -> None:
    assert command("verify", marian, "--against", tmp_path).status == 2
    said = command("verify", tmp_path, "--against", marian.with_name("checkpoint"))
    assert said.status == 2
    assert f"{tmp_path} has no {MANIFEST_NAME}" in said.err


# ---------------------------------------------------------------- seqloss inspect


def test_inspect_says_what_is_in_a_bundle(command: Command, marian: Path) -> None:
    said = command("inspect", marian)
    assert said.status == 0
    rows = dict(row.lstrip().split("  ", 1) for row in said.out.splitlines())
    rows = {name: text.strip() for name, text in rows.items()}
    manifest = json.loads((marian / MANIFEST_NAME).read_text())
    assert rows["bundle"] == str(marian)
    assert rows["family"] == "marian"
    assert rows["checkpoint"].startswith(f"checkpoint ({manifest['checkpoint']['digest'][:12]}")
    assert rows["source ids"] == rows["target ids"] == "0 to 100"
    assert rows["classes"] == "101"
    for part in ("decoder_start 100", "pad 100", "eos 0", "forced_eos 0"):
        assert part in rows["special ids"].split(", ")
    assert rows["sources"] == rows["targets"] == "at most 48 tokens"
    for graph in manifest["graphs"]:
        text = rows[f"torch {graph['precision']}"]
        for name in ("max_error", "mean_error", "tolerance"):
            assert f"{graph[name]:.1e}" in text
    assert {"torch float32", "torch bfloat16"} <= rows.keys()
    on_disk = {
        str(path.relative_to(marian)): f"{path.stat().st_size:,} bytes"
        for path in marian.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }
    assert len(on_disk) >= 3
    assert {name: rows[name] for name in on_disk} == on_disk


def test_inspect_needs_neither_torch_nor_transformers(marian: Path) -> None:
    program = f"""
import sys
from seqloss.cli import main
assert main(["inspect", {str(marian)!r}]) == 0
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "torch bfloat16" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "seqloss" in loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "safetensors", "fastapi"}


def test_inspect_refuses_what_is_no_bundle(command: Command, marian: Path, tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "nothing", "is not a folder"),
        (marian / MANIFEST_NAME, "is not a folder"),
        (tmp_path, f"has no {MANIFEST_NAME}"),
        (marian.with_name("checkpoint"), "if it is a checkpoint, run `seqloss export"),
    ):
        said = command("inspect", path)
        assert said.status == 2
        assert not said.out
        assert said.err.startswith("seqloss inspect: ")
        assert str(path) in said.err
        assert words in said.err


def test_inspect_refuses_a_bundle_that_was_changed(
    command: Command, marian: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(marian, tmp_path / "bundle")
    (folder / "stray").write_text("unlisted")
    said = command("inspect", folder)
    assert said.status == 2
    assert "'stray' is not listed" in said.err


# ---------------------------------------------------------------- flags


def test_export_writes_the_precisions_and_the_start_that_were_asked_for(
    command: Command, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint("bart", tmp_path / "checkpoint")
    start = 13
    assert json.loads((checkpoint / "config.json").read_text())["decoder_start_token_id"] != start
    bundle = tmp_path / "bundle"
    said = command(
        *("export", checkpoint, "--output", bundle, "--precision", "float32", "bfloat16"),
        *("--decoder-start-token-id", start),
    )
    assert said.status == 0, said.err
    assert sorted(path.name for path in (bundle / "graphs").iterdir()) == [
        "torch-bfloat16",
        "torch-float32",
    ]
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    assert [graph["precision"] for graph in manifest["graphs"]] == ["float32", "bfloat16"]
    for graph in manifest["graphs"]:
        assert f"torch in {graph['precision']}: at most {graph['max_error']:.1e}" in said.out
    assert manifest["special_ids"]["decoder_start"] == start
    test, model = manifest["self_test"], make_model("bart")
    target = test["target_ids"][-1]
    source = test["source_ids"][test["source_index"][-1]]
    expected = reference(model, source, [start, *target[:-1]], target).nll
    assert test["token_nlls"][-1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--precision", "float64"], "invalid choice: 'float64'"),
        (["--precision"], "expected at least one argument"),
        (["--decoder-start-token-id", "x"], "invalid int value"),
    ],
)
def test_export_refuses_flags_that_say_nothing(
    flags: list[str], words: str, command: Command, tmp_path: Path
) -> None:
    said = command("export", tmp_path, "--output", tmp_path / "bundle", *flags)
    assert said.status == 2
    assert words in said.err


@pytest.mark.parametrize("start", [-1, VOCABULARY_SIZE])
def test_a_start_that_is_no_id_is_refused(start: int, command: Command, marian: Path) -> None:
    output = marian.with_name("refused")
    said = command(
        *("export", marian.with_name("checkpoint"), "--output", output),
        *("--decoder-start-token-id", start),
    )
    assert said.status == 2
    assert str(start) in said.err
    assert not output.exists()


def test_serve_refuses_a_precision_that_is_none(command: Command, marian: Path) -> None:
    said = command("serve", marian, "--precision", "nonsense")
    assert said.status == 2
    assert "precision" in said.err
    for known in ("auto", "float32", "bfloat16", "float16"):
        assert known in said.err
