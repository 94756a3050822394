"""The example for Hugging Face `datasets`, run as a person runs it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import httpx
import pytest

from seqloss.bundle.reader import Bundle
from seqloss.demo.phrases import pairs
from server import Server

_CLIENT = Path(__file__).parents[2] / "clients" / "python"


def test_map_adds_the_loss_of_every_pair(
    tmp_path: Path, serve: Callable[..., Server], bundle_of: Callable[[str], Bundle]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    rows = [
        {"id": place, "source": phrase.source, "target": phrase.target}
        for place, phrase in enumerate(islice(pairs("held_out", seed=6), 300))
    ]
    rows[7]["target"] = "1 " * 5000
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    server = serve(f"demo={bundle_of('demo').folder}")

    done = subprocess.run(
        [
            *(sys.executable, str(_CLIENT / "examples" / "datasets_map.py")),
            *("pairs.jsonl", "scored.parquet", "--url", server.address),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(_CLIENT), "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    scored = parquet.read_table(tmp_path / "scored.parquet").to_pylist()
    body = {
        "sources": [row["source"] for row in rows],
        "targets": [row["target"] for row in rows],
        "on_error": "partial",
        "reproducible": True,
    }
    reply = httpx.post(f"{server.address}/loss/text", json=body, timeout=60).json()
    for place, (row, found) in enumerate(zip(rows, scored, strict=True)):
        assert {name: found[name] for name in row} == row
        assert found["num_tokens"] == reply["num_tokens"][place]
        if place == 7:
            assert math.isnan(found["nll"])
            assert found["error"] == reply["errors"][0]["detail"]
        else:
            assert found["nll"] == pytest.approx(reply["nlls"][place], rel=1e-9)
            assert found["error"] == ""
