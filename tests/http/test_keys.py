"""API keys over HTTP: each refusal has its status, and nothing tells what it must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fakes import FakeEngine, fake_bundle

NEWS, BULK, SMALL = "news-key-0123456789", "bulk-key-0123456789", "small-key-0123456789"
FILE = f"""
[tenants.news]
keys = ["{NEWS}"]
models = ["one"]

[tenants.bulk]
keys = ["{BULK}"]
priorities = ["bulk"]

[tenants.small]
keys = ["{SMALL}"]
tokens_per_minute = 10
"""
GOOD = {"source_ids": [[3, 4]], "target_ids": [[5, 2]]}
ONE = GOOD | {"model": "one"}


@pytest.fixture
def service(make_client: Any, tmp_path: Path) -> Any:
    """Two models and three tenants."""
    (tmp_path / "keys.toml").write_text(FILE)
    return make_client(
        {"one": fake_bundle(), "two": fake_bundle()},
        load=lambda *_: FakeEngine(),
        api_keys_file=tmp_path / "keys.toml",
    )


def post(service: Any, key: str, body: dict[str, Any] = ONE) -> Any:
    return service.post("/loss", json=body, headers={"X-API-Key": key})


def code_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["code"])


def test_a_key_opens_the_door_in_both_headers(service: Any) -> None:
    assert post(service, NEWS).status_code == 200
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {NEWS}"}
        assert service.post("/loss", json=ONE, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": "wrong"},
        {"X-API-Key": NEWS + "x"},
        {"Authorization": f"Basic {NEWS}"},
        {"Authorization": "Bearer"},
        {"Authorization": NEWS},
        {"Authorization": "Bearer wrong", "X-API-Key": NEWS},
    ],
)
def test_no_key_and_a_wrong_key_are_401(service: Any, headers: dict[str, str]) -> None:
    response = service.post("/loss", json=ONE, headers=headers)
    assert code_of(response, 401) == "unauthenticated"
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "X-Request-ID" in response.headers


def test_a_key_is_asked_for_before_the_body_is_read(service: Any) -> None:
    assert service.post("/loss", content=b"{", headers={}).status_code == 401


@pytest.mark.parametrize(
    ("path", "is_open"),
    [
        ("/health/live", True),
        ("/health/ready", True),
        ("/v2/health/live", True),
        ("/v2/health/ready", True),
        ("/health/live/", False),
        ("/metrics", False),
        ("/models", False),
        ("/models/one", False),
        ("/docs", False),
        ("/openapi.json", False),
        ("/v2", False),
        ("/v2/models/one", False),
        ("/v2/models/one/ready", False),
        ("/v2/models/stats", False),
        ("/nothing", False),
    ],
)
def test_everything_but_health_needs_a_key(service: Any, path: str, is_open: bool) -> None:
    assert (service.get(path).status_code != 401) is is_open


def test_a_model_that_is_not_the_keys_is_403(service: Any) -> None:
    headers = {"X-API-Key": NEWS}
    two = GOOD | {"model": "two"}
    assert code_of(post(service, NEWS, two), 403) == "forbidden"
    assert code_of(post(service, NEWS, GOOD | {"model": "three"}), 404) == "unknown_model"
    for path in ("/models/two", "/v2/models/two", "/v2/models/two/ready", "/v2/models/two/stats"):
        assert code_of(service.get(path, headers=headers), 403) == "forbidden"
    infer = service.post("/v2/models/two/infer", json={"inputs": []}, headers=headers)
    assert code_of(infer, 403) == "forbidden"
    text = {"model": "two", "sources": ["a"], "targets": ["b"]}
    assert service.post("/loss/text", json=text, headers=headers).status_code == 403


def test_a_key_sees_its_own_models_alone(service: Any) -> None:
    headers = {"X-API-Key": NEWS}
    listed = service.get("/models", headers=headers).json()["models"]
    assert [model["name"] for model in listed] == ["one"]
    stats = service.get("/v2/models/stats", headers=headers).json()["model_stats"]
    assert [model["name"] for model in stats] == ["one"]
    index = service.post("/v2/repository/index", json={}, headers=headers).json()
    assert [model["name"] for model in index] == ["one"]
    # Its only one need not be named.
    assert post(service, NEWS, GOOD).status_code == 200
    assert code_of(post(service, BULK, GOOD | {"priority": "bulk"}), 422) == "invalid_request"


def test_a_priority_that_is_not_the_keys_is_403(service: Any) -> None:
    assert post(service, BULK, ONE | {"priority": "bulk"}).status_code == 200
    response = post(service, BULK)
    assert code_of(response, 403) == "forbidden"
    assert "bulk" in response.json()["detail"]


def test_over_quota_is_429_until_time_has_paid(service: Any) -> None:
    large = ONE | {"source_ids": [[3] * 6], "target_ids": [[5] * 6]}
    assert post(service, SMALL, large).status_code == 200
    response = post(service, SMALL)
    assert code_of(response, 429) == "over_quota"
    # Ten a minute, and two of them are owed.
    assert 1000 * 12 < response.json()["retry_after_ms"] <= 1000 * 18
    assert int(response.headers["Retry-After"]) >= 12
    assert post(service, NEWS).status_code == 200, "another tenant's quota is its own"


def test_what_cannot_be_scored_costs_nothing(service: Any) -> None:
    for _ in range(20):
        assert post(service, SMALL, ONE | {"target_ids": [[99]]}).status_code == 422
    assert post(service, SMALL).status_code == 200


def test_what_was_given_up_before_it_was_computed_costs_nothing(service: Any) -> None:
    for _ in range(20):
        response = post(service, SMALL, ONE | {"timeout_ms": 0.001})
        assert code_of(response, 504) == "deadline_exceeded"
    assert post(service, SMALL).status_code == 200


def test_tokens_are_counted_by_tenant(service: Any) -> None:
    num_tokens = sum(len(row) for side in ("source_ids", "target_ids") for row in GOOD[side])
    for _ in range(3):
        assert post(service, NEWS).status_code == 200
    scraped = service.get("/metrics", headers={"X-API-Key": NEWS}).text
    assert f'seqloss_tenant_tokens_total{{tenant="news"}} {3 * num_tokens:.1f}' in scraped


def test_a_file_read_again_lets_new_keys_in_and_old_ones_out(service: Any, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(FILE.replace(NEWS, NEWS + "-new"))
    service.portal.call(service.app.state.reload)
    assert post(service, NEWS).status_code == 401
    assert post(service, NEWS + "-new").status_code == 200


def test_a_file_that_became_wrong_changes_nothing(service: Any, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text("[tenants]")
    with pytest.raises(Exception, match="all goes on as it was"):
        service.portal.call(service.app.state.reload)
    assert post(service, NEWS).status_code == 200
