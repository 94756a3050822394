"""KServe's client, as it is published, against `seqloss serve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from test_triton_client import BAD, PAIRS, assert_expected, expected_of

from clients_environment import heard_by
from server import Server


def test_kserves_client_finds_all_that_it_asks_for(
    serve: Callable[..., Server], bundle_of: Any
) -> None:
    server = serve(f"demo={bundle_of('demo').folder}", "--device", "cpu")
    with server.client() as client:
        said = heard_by("kserve_rest.py", server.address, pairs=PAIRS, bad=BAD)
        expected, partial = expected_of(client, PAIRS), expected_of(client, BAD)
    assert [said[name] for name in ("live", "ready", "model ready")] == [True] * 3
    assert not said["other ready"]
    assert set(said["infer"]) == {"JSON", "binary", "options"}
    for values in said["infer"].values():
        assert_expected(values, expected)
    assert said["id"] == "mine"
    assert_expected(said["partial"], partial)
    bad = said["refused"]["bad pair"]
    assert bad["status"] == 422
    assert "1 of 3 pairs cannot be scored" in bad["error"]
    assert said["refused"]["unknown model"]["status"] == 404
