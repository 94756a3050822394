"""The benchmark for GPUs: all of its program, on a CPU and with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_TESTS = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        env=os.environ | {"PYTHONPATH": str(_TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "there is no NVIDIA GPU" in done.stderr


# Processes of it start others.
def test_a_try_on_the_cpu_measures_everything(tmp_path: Path) -> None:
    arguments = ("--results", str(tmp_path / "results"), "--folder", str(tmp_path), "--threads=1")
    done = run("--dry-run-cpu", *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "gpu-dry-run.json").read_bytes())
    (model,) = results["models"]
    assert [run["failure"] for run in model["bulk"]] == [""] * 3
    assert all(seconds > 0 for run in model["bulk"] for seconds in run["seconds"])
    assert [run["name"] for run in model["head"]] == [
        "logits alone, written to memory",
        "logits and cross_entropy",
        "seqloss chunked",
        "seqloss chunked, ranks and entropies",
    ]
    assert 0 < model["latency"]["p50_seconds"] <= model["latency"]["p95_seconds"]
    page = (tmp_path / "results" / "gpu-dry-run.md").read_text()
    for title in ("## tiny", "### Bulk", "### The head", "### Products", "Latency of 3"):
        assert title in page
