"""The command itself, on a Ray of its own, in the midst of which it is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray_cluster import AGENTS, random_pairs, require_none_left

from seqloss.bundle.reader import Bundle

NUM_PARTITIONS, PARTITION_ROWS = 60, 40
NUM_ROWS = NUM_PARTITIONS * PARTITION_ROWS


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[Path]:
    """Where a Ray keeps its files; sockets have short paths.

    At the end of all tests none of its processes is left: agents take a minute for it.
    """
    folder = tempfile.mkdtemp(dir="/tmp")
    yield Path(folder)
    require_none_left(folder)
    shutil.rmtree(folder)


def started(bundle: Bundle, folder: Path, ray_folder: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    arguments = [
        *("ray-score", str(folder / "in.parquet"), str(folder / "out")),
        *("--bundle", str(bundle.folder), "--device", "cpu", "--precision", "float32"),
        *("--workers", "2", "--cpus-per-worker", "1", "--partition-rows", str(PARTITION_ROWS)),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "seqloss.cli", *arguments],
        env=environment | {"RAY_TMPDIR": str(ray_folder)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_goes_on_where_it_was_killed(
    bundle: Bundle, expected: Callable[..., list[float]], tmp_path: Path, ray_folder: Path
) -> None:
    sources, targets = random_pairs(NUM_ROWS, seed=13)
    table = pa.table({"source_ids": sources, "target_ids": targets})
    pq.write_table(table, tmp_path / "in.parquet")
    output = tmp_path / "out"
    first = started(bundle, tmp_path, ray_folder)
    while len(list(output.glob("part-*.parquet"))) < 3:
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.01)
    first.kill()
    first.communicate()
    require_none_left(str(ray_folder), *AGENTS)
    parts = {path: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}
    assert 3 <= len(parts) < NUM_PARTITIONS

    second = started(bundle, tmp_path, ray_folder)
    _, said = second.communicate()
    assert second.returncode == 0, said
    assert f"{NUM_ROWS:,} of {NUM_ROWS:,} pairs" in said
    assert f"{NUM_PARTITIONS} of {NUM_PARTITIONS} partitions, 0 errors" in said
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    scores = pq.read_table(output)
    assert scores.column("row").to_pylist() == [*range(NUM_ROWS)]
    assert scores.column("nll").to_pylist() == expected(sources, targets)
    names = {path.name for path in output.iterdir()}
    assert {"_plan.json", "_summary.json"} < names
    assert len(names) == NUM_PARTITIONS + 2
