"""A really trained checkpoint with published scores, exported and served."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import ORACLE, on_every_engine

pytestmark = on_every_engine


@pytest.fixture(scope="module")
def entries() -> list[dict[str, Any]]:
    if not ORACLE.is_dir():
        pytest.skip(f"{ORACLE} is absent: it does not belong to the project")
    loaded: list[dict[str, Any]] = json.loads((ORACLE / "expected.json").read_text())
    return loaded


@pytest.fixture
def reply(entries: list[dict[str, Any]], bundle_of: Any, make_client: Any) -> dict[str, Any]:
    client = make_client({"oracle": bundle_of("oracle")})
    response = client.post(
        "/loss",
        json={
            "source_ids": [entry["source_ids"] for entry in entries],
            "target_ids": [entry["target_ids"] for entry in entries],
            "return": ["token_nlls"],
        },
    )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_every_entry_matches_float64(entries: list[dict[str, Any]], reply: dict[str, Any]) -> None:
    assert len(entries) == 69
    for entry, nlls in zip(entries, reply["token_nlls"], strict=True):
        assert [-nll for nll in nlls] == pytest.approx(
            entry["token_logprobs_f64"], abs=2e-5, rel=0
        ), entry["tags"]


def test_published_scores_match_as_printed(
    entries: list[dict[str, Any]], reply: dict[str, Any]
) -> None:
    published = [
        (entry["published_logprobs"], nlls)
        for entry, nlls in zip(entries, reply["token_nlls"], strict=True)
        if entry["origin"] == "published"
    ]
    assert len(published) == 4
    for printed, nlls in published:
        assert [-nll for nll in nlls] == pytest.approx(printed, abs=1e-5, rel=0)


def test_aggregates_match_what_its_readme_states(reply: dict[str, Any]) -> None:
    aggregate = reply["aggregate"]
    assert aggregate["num_tokens"] == 1460
    assert aggregate["mean_loss"] == pytest.approx(6.0267144, abs=2e-5)
    assert aggregate["mean_pair_loss"] == pytest.approx(3.3374338, abs=2e-5)


def test_an_empty_source_is_an_error_and_no_score(bundle_of: Any, make_client: Any) -> None:
    """The engine that the scores come from reports 0 for it, which looks like a perfect loss."""
    client = make_client({"oracle": bundle_of("oracle")})
    body = {"source_ids": [[]], "target_ids": [[3, 11, 2]], "on_error": "partial"}
    answer = client.post("/loss", json=body).json()
    assert answer["losses"] == [None]
    assert [error["code"] for error in answer["errors"]] == ["empty_source"]
