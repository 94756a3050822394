"""One Ray for all that runs on it; `make test` runs this folder by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ray_cluster import ray_cluster

from seqloss.bundle.reader import Bundle
from seqloss.http.app import create_app
from seqloss.settings import Settings

MARKS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Ray's own warnings are not the tests' business."""
    for mark in MARKS:
        item.add_marker(mark)


@pytest.fixture(scope="session", autouse=True)
def _cluster() -> Iterator[None]:
    with ray_cluster():
        yield


@pytest.fixture(scope="session")
def bundle(export_once: Callable[..., Bundle]) -> Bundle:
    return export_once("demo", "torch")


@pytest.fixture(scope="session")
def expected(bundle: Bundle) -> Callable[..., Any]:
    """What one plain service says."""

    def nlls(sources: list[list[int]], targets: list[list[int]]) -> list[float]:
        settings = Settings(device="cpu", precision="float32", warm_up=False)
        with TestClient(create_app({"demo": bundle}, settings)) as client:
            while client.get("/health/ready").status_code != 200:
                time.sleep(0.05)
            reply = client.post(
                "/loss",
                json={"source_ids": sources, "target_ids": targets, "reproducible": True},
            )
        return list(reply.json()["nlls"])

    return nlls
