"""What a process loads: each in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

HEAVY = ("torch", "transformers", "onnxruntime")


def modules_after(program: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after running a program."""
    program += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module",
    [
        "seqloss.http.app",
        "seqloss.cli",
        "seqloss.batching.loop",
        "seqloss.loss.reduce",
        "seqloss.bundle.reader",
    ],
)
def test_the_service_loads_no_engine_before_it_needs_one(module: str) -> None:
    assert not modules_after(f"import {module}") & set(HEAVY)


def test_serving_a_torch_bundle_needs_no_transformers(bundle_of: Any) -> None:
    program = f"""
from pathlib import Path
from prometheus_client import CollectorRegistry
from fastapi.testclient import TestClient
from seqloss.bundle.reader import open_bundle
from seqloss.http.app import create_app
from seqloss.settings import Settings

bundles = {{"marian": open_bundle(Path({str(bundle_of("marian").folder)!r}))}}
app = create_app(bundles, Settings(), registry=CollectorRegistry())
with TestClient(app) as client:
    while client.get("/health/ready").status_code != 200:
        pass
    reply = client.post("/loss", json={{"source_ids": [[1, 2]], "target_ids": [[3, 4]]}})
    assert reply.status_code == 200, reply.text
"""
    loaded = modules_after(program)
    assert "torch" in loaded
    assert not loaded & {"transformers", "tokenizers", "huggingface_hub", "babel", "keras"}
