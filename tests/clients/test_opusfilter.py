"""The filters of `seqloss_client.opusfilter`, run by OpusFilter itself from a configuration."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import httpx
import pytest

from clients_environment import python_with
from seqloss.bundle.reader import Bundle
from seqloss.demo.phrases import pairs
from server import Server

_ROOT = Path(__file__).parents[2]
_REQUIREMENTS = Path(__file__).parent / "opusfilter-requirements.txt"
_NUM_PAIRS = 40


@pytest.fixture(scope="module")
def url(bundle_of: Callable[[str], Bundle]) -> Iterator[str]:
    """The demo model behind a service."""
    server = Server(f"demo={bundle_of('demo').folder}")
    yield server.address
    server.process.kill()
    server.process.communicate()


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    """Good pairs and wrong ones in turn, and one that is too long to be scored."""
    drawn = list(islice(pairs("held_out", seed=5), _NUM_PAIRS + 1))
    found = [
        (phrase.source, phrase.target if place % 2 else drawn[place + 1].target)
        for place, phrase in enumerate(drawn[:_NUM_PAIRS])
    ]
    return [*found, (">>de<< too long", " ".join(["1"] * 5000))]


def run_opusfilter(folder: Path, steps: list[object]) -> None:
    """As the command `opusfilter` does; JSON is YAML."""
    config = {"common": {"output_directory": str(folder)}, "steps": steps}
    (folder / "config.yml").write_text(json.dumps(config))
    python = Path(python_with(_REQUIREMENTS, _ROOT / "build" / "opusfilter-venv"))
    done = subprocess.run(
        [str(python), str(python.with_name("opusfilter")), str(folder / "config.yml")],
        env=os.environ | {"PYTHONPATH": str(_ROOT / "clients" / "python")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 41 pairs cannot be scored and are rejected" in done.stderr


def mean_losses(url: str, texts: list[tuple[str, str]]) -> list[float]:
    """What the service says, pair by pair; NaN where it says no."""
    sources, targets = zip(*texts, strict=True)
    body = {"sources": sources, "targets": targets, "on_error": "partial", "reproducible": True}
    reply = httpx.post(f"{url}/loss/text", json=body, timeout=60).json()
    return [math.nan if mean is None else mean for mean in reply["mean_losses"]]


def filtered(folder: Path, name: str) -> list[tuple[str, ...]]:
    sides = [(folder / f"{name}.{side}").read_text().splitlines() for side in ("source", "target")]
    return list(zip(*sides, strict=True))


def between(values: list[float]) -> float:
    """A threshold that half of them are above, and none near."""
    ordered = sorted(value for value in values if not math.isnan(value))
    middle = max(range(10, 30), key=lambda place: ordered[place] / ordered[place - 1])
    return (ordered[middle - 1] + ordered[middle]) / 2


def test_opusfilter_filters_and_scores_with_both(
    tmp_path: Path, url: str, texts: list[tuple[str, str]]
) -> None:
    forward = mean_losses(url, texts)
    # One model for both directions: it is about the way, not about what it finds there.
    backward = mean_losses(url, [(target, source) for source, target in texts])
    adequacy = [
        math.exp(-abs(one - other) - (one + other) / 2)
        for one, other in zip(forward, backward, strict=True)
    ]
    most, least = between(forward), between(adequacy)

    for side, lines in zip(("source", "target"), zip(*texts, strict=True), strict=True):
        (tmp_path / f"all.{side}").write_text("".join(f"{line}\n" for line in lines))
    module = {"module": "seqloss_client.opusfilter"}
    service = {"url": url, "model": "demo"}
    one = {"LossFilter": {"threshold": most, "pairs_per_request": 1000, **service}} | module
    dual = {
        "DualLossFilter": {"threshold": least, "forward": service, "backward": service}
    } | module
    files = ["all.source", "all.target"]

    def step(name: str, chosen: object, **more: object) -> object:
        outputs = [f"{name}.source", f"{name}.target"]
        parameters = {"inputs": files, "outputs": outputs, "filters": [chosen], **more}
        return {"type": "filter", "parameters": parameters}

    scores = {"inputs": files, "output": "scores.jsonl", "filters": [one, dual]}
    run_opusfilter(
        tmp_path,
        [
            step("one", one),
            step("others", one, filterfalse=True),
            step("dual", dual),
            {"type": "score", "parameters": scores},
        ],
    )

    good = [pair for pair, loss in zip(texts, forward, strict=True) if loss < most]
    assert filtered(tmp_path, "one") == good
    assert filtered(tmp_path, "others") == [pair for pair in texts if pair not in good]
    alike = [pair for pair, score in zip(texts, adequacy, strict=True) if score >= least]
    assert filtered(tmp_path, "dual") == alike
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["LossFilter"] for row in rows] == pytest.approx([*forward[:-1], math.inf])
    found = [row["DualLossFilter"] for row in rows]
    assert found == pytest.approx([*adequacy[:-1], -math.inf], rel=1e-3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": 1, "modle": "demo"}, "unexpected keyword argument 'modle'"),
        ({"url": "http://localhost:8000"}, "missing 1 required positional argument: 'threshold'"),
    ],
)
def test_misspelt_and_missing_parameters_are_named(
    tmp_path: Path, parameters: dict[str, object], message: str
) -> None:
    for side in ("source", "target"):
        (tmp_path / f"all.{side}").write_text("one line\n")
    chosen = {"LossFilter": parameters, "module": "seqloss_client.opusfilter"}
    files = {"inputs": ["all.source", "all.target"], "outputs": ["out.source", "out.target"]}
    step = {"type": "filter", "parameters": files | {"filters": [chosen]}}
    with pytest.raises(AssertionError, match=message):
        run_opusfilter(tmp_path, [step])
