"""Filtering finds errors that were planted in a good corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from seqloss.bundle.reader import Bundle
from seqloss.demo import BACKWARD_CHECKPOINT
from seqloss.demo.corpus import Line, corpus
from seqloss.demo.phrases import TARGET_LANGUAGES
from seqloss_client.cli import main
from server import Server

pytest.importorskip("duckdb", reason="the extra `filter` is not installed")
pytestmark = pytest.mark.skipif(
    not BACKWARD_CHECKPOINT.is_dir(), reason="there is no backward checkpoint"
)

_PAIRS_PER_LANGUAGE = 1000
_WRONG_SHARE = 0.3


@pytest.fixture(scope="module")
def url(bundle_of: Callable[[str], Bundle]) -> Iterator[str]:
    """A service with the demo models of both directions."""
    bundles = {"forward": bundle_of("demo"), "backward": bundle_of("demo-backward")}
    server = Server(*(f"{name}={bundle.folder}" for name, bundle in bundles.items()))
    yield server.address
    server.process.kill()
    server.process.communicate()


def run(*arguments: object) -> None:
    assert main(list(map(str, arguments))) == 0


def write_corpus(folder: Path, language: str) -> tuple[list[Line], tuple[str, ...]]:
    """Held-out pairs, three in ten of them wrong, and the arguments that name them."""
    lines = list(islice(corpus(language, _WRONG_SHARE, seed=7), _PAIRS_PER_LANGUAGE))
    sides = {"source": folder / f"all.{language}.en", "target": folder / f"all.{language}"}
    for side, path in sides.items():
        path.write_text("".join(f"{getattr(line, side)}\n" for line in lines))
    return lines, ("--source", str(sides["source"]), "--target", str(sides["target"]))


def services(url: str, language: str) -> tuple[str, ...]:
    """Where both directions' losses come from."""
    return (
        *("--forward-url", url, "--forward-model", "forward"),
        *("--forward-target-language", language),
        *("--backward-url", url, "--backward-model", "backward"),
    )


def adequacies(folder: Path, url: str, language: str, files: tuple[str, ...]) -> np.ndarray:
    """The score of every pair, as `filter` writes them."""
    outputs = ("--output", folder / "x", folder / "y", "--scores", folder / "scores.tsv")
    run("filter", *files, *services(url, language), *outputs, "--threshold", "0")
    scores = np.loadtxt(folder / "scores.tsv", skiprows=1, usecols=2)
    assert not np.isnan(scores).any()
    return scores


def best_threshold(scores: np.ndarray, is_right: np.ndarray) -> float:
    """Where the smaller of (right kept, wrong dropped) is largest, halfway between two scores."""
    order = np.argsort(scores)
    dropped_wrong = np.cumsum(~is_right[order]) / (~is_right).sum()
    kept_right = 1 - np.cumsum(is_right[order]) / is_right.sum()
    place = int(np.argmax(np.minimum(dropped_wrong, kept_right)))
    upper = scores[order[min(place + 1, len(scores) - 1)]]
    return float((scores[order[place]] + upper) / 2)


def test_the_filter_keeps_right_pairs_and_drops_planted_errors(tmp_path: Path, url: str) -> None:
    lines, scores = [], []
    for language in TARGET_LANGUAGES:
        some, files = write_corpus(tmp_path, language)
        lines += some
        scores.append(adequacies(tmp_path, url, language, files))
    is_right = np.array([line.is_right for line in lines])
    assert abs((~is_right).mean() - _WRONG_SHARE) < 0.03
    all_scores = np.concatenate(scores)

    threshold = best_threshold(all_scores, is_right)
    is_kept = all_scores >= threshold
    right_kept, wrong_dropped = is_kept[is_right].mean(), (~is_kept)[~is_right].mean()
    print(f"\n{len(lines)} pairs, {(~is_right).mean():.1%} wrong; threshold {threshold:.4f}")
    print(f"kept of the right: {right_kept:.2%}, dropped of the wrong: {wrong_dropped:.2%}")
    assert right_kept >= 0.98
    assert wrong_dropped >= 0.98

    # One language with this threshold, by the command, from services.
    some, files = write_corpus(tmp_path, "de")
    kept = (tmp_path / "kept.en", tmp_path / "kept.de")
    outputs = ("--output", *kept, "--threshold", repr(threshold))
    run("filter", *files, *services(url, "de"), *outputs)
    expected = [line for line, score in zip(some, scores[0], strict=True) if score >= threshold]
    assert kept[0].read_text().splitlines() == [line.source for line in expected]
    assert kept[1].read_text().splitlines() == [line.target for line in expected]


def test_scores_in_files_and_from_services_keep_the_same_pairs(tmp_path: Path, url: str) -> None:
    _, files = write_corpus(tmp_path, "fr")
    run("filter", *files, *services(url, "fr"), "--best", 500, "--output", *outputs_of(tmp_path, 1))
    turned = ("--source", files[3], "--target", files[1])
    for name, given, more in (
        ("forward", files, ("--target-language", "fr")),
        ("backward", turned, ()),
    ):
        output = ("--output", tmp_path / f"{name}.jsonl", "--quiet")
        run("score", "--url", url, "--model", name, *given, *more, *output)
    scores = ("--forward-scores", tmp_path / "forward.jsonl")
    scores += ("--backward-scores", tmp_path / "backward.jsonl")
    run("filter", *files, *scores, "--best", 500, "--output", *outputs_of(tmp_path, 2))
    for first, second in zip(outputs_of(tmp_path, 1), outputs_of(tmp_path, 2), strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert first.read_bytes().count(b"\n") == 500


def outputs_of(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"kept{number}.en", folder / f"kept{number}.fr"
