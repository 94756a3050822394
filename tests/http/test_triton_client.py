"""NVIDIA's client for Triton, as it is published, against `seqloss serve`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest

from clients_environment import heard_by
from seqloss import __version__
from seqloss.errors import PAIR_CODES
from server import Server

# So many that replies are large enough to be compressed.
PAIRS = {
    "source_ids": [[3, 335, 8, 229, 93, 17 + index % 100, 1] for index in range(600)],
    "target_ids": [[522, 8, 93, 17 + index // 100, 1][index % 3 :] for index in range(600)],
}
BAD = {"source_ids": [[3, 4, 1], [5, 1], [6, 1]], "target_ids": [[7, 1], [8, 99999, 1], [9, 1]]}


def expected_of(client: Any, pairs: dict[str, Any]) -> dict[str, list[Any]]:
    """What POST /loss says."""
    body = pairs | {"on_error": "partial", "return": ["token_losses"]}
    reply = client.post("/loss", json=body, timeout=60).json()
    codes = {error["index"]: 1 + PAIR_CODES.index(error["code"]) for error in reply["errors"]}
    nan = float("nan")
    rows = zip(reply["token_losses"], pairs["target_ids"], strict=True)
    return {
        "loss": [nan if loss is None else loss for loss in reply["losses"]],
        "nll": [nan if nll is None else nll for nll in reply["nlls"]],
        "num_tokens": reply["num_tokens"],
        "error_code": [codes.get(index, 0) for index in range(len(reply["losses"]))],
        "token_losses": list(chain.from_iterable(row or [nan] * len(ids) for row, ids in rows)),
    }


def assert_expected(heard: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    """To a float32's precision: requests that are not reproducible share batches as they come."""
    for name, values in heard.items():
        assert values == pytest.approx(expected[name], rel=1e-4, abs=2e-5, nan_ok=True), name
    for name in ("num_tokens", "error_code"):
        assert heard[name] == expected[name]


@pytest.fixture
def heard(serve: Callable[..., Server], bundle_of: Any) -> tuple[dict[str, Any], Any, Any]:
    server = serve(f"demo={bundle_of('demo').folder}", "--device", "cpu")
    with server.client() as client:
        said = heard_by("triton.py", server.address, pairs=PAIRS, bad=BAD)
        return said, expected_of(client, PAIRS), expected_of(client, BAD)


def test_tritons_client_finds_all_that_it_asks_for(heard: Any) -> None:
    said, expected, partial = heard
    ready = ("live", "ready", "model ready", "version ready")
    assert [said[name] for name in ready] == [True] * 4
    assert not said["other ready"]
    assert said["server"]["version"] == __version__
    assert said["metadata"]["platform"] == "seqloss_torch"
    assert said["config"]["name"] == "demo"
    assert said["index"] == [{"name": "demo", "version": "1", "state": "READY", "reason": ""}]

    assert len(said["infer"]) == 12
    for values in said["infer"].values():
        assert_expected(values, expected)
    assert set(said["aio"]) == {"plain", "gzip", "deflate"}
    for values in said["aio"].values():
        assert_expected(values, expected)
    assert_expected(said["default"], expected)
    assert said["id"] == "mine"
    assert_expected(said["partial"], partial)
    assert said["partial"]["error_code"] == [0, 1, 0]
    assert "99999" in said["partial parameters"]["errors"]

    (stats,) = said["statistics"]["model_stats"]
    num_requests = len(said["infer"]) + 3  # and those for defaults, an id and bad pairs
    assert stats["inference_stats"]["success"]["count"] == num_requests
    assert stats["inference_count"] == 600 * (num_requests - 1) + 2

    words = {
        "bad pair": ("422", "1 of 3 pairs cannot be scored"),
        "no lengths": ("422", "inputs are missing"),
        "unknown parameter": ("422", "fields of the body are unknown"),
        "unknown model": ("404", "there is no model 'other'"),
        "unknown metadata": ("404", "there is no model 'other'"),
    }
    assert said["refused"].keys() == words.keys()
    for name, (status, message) in words.items():
        assert said["refused"][name]["status"] == status
        assert message in said["refused"][name]["message"]
