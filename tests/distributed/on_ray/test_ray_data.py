"""Datasets on Ray Data, with workers that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray_cluster import actor_processes, random_pairs

from seqloss.bundle.reader import Bundle
from seqloss.distributed.ray_data import Pool, Progress, score_dataset
from seqloss.distributed.workers import PairScorer, Work
from seqloss.errors import ConfigurationError

POOL = Pool(partition_rows=250, workers=2, cpus_per_worker=1)


def dataset(folder: Path, number: int) -> tuple[list[list[int]], list[list[int]]]:
    sources, targets = random_pairs(number, seed=7)
    table = pa.table(
        {"source_ids": sources, "target_ids": targets, "name": [f"p{row}" for row in range(number)]}
    )
    folder.mkdir()
    half = number // 2
    pq.write_table(table.slice(0, half), folder / "a.parquet", row_group_size=300)
    pq.write_table(table.slice(half), folder / "b.parquet")
    return sources, targets


def work(bundle: Bundle, source: Path, output: Path, **changes: Any) -> Work:
    given: dict[str, Any] = {"settings": {"device": "cpu", "precision": "float32"}}
    return Work(str(source), str(output), str(bundle.folder), **(given | changes))


def scores_in(output: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(output.glob("part-*.parquet")))


def run(work: Work, pool: Pool = POOL) -> Progress:
    *_, last = score_dataset(work, pool)
    return last


def test_a_dataset_has_the_losses_of_a_plain_service(
    bundle: Bundle, tmp_path: Path, expected: Callable[..., list[float]]
) -> None:
    sources, targets = dataset(tmp_path / "in", 1200)
    output = tmp_path / "out"
    last = run(work(bundle, tmp_path / "in", output, kept=("name",), with_tokens=True))
    assert (last.pairs, last.errors, last.partitions) == (1200, 0, 6)
    table = scores_in(output)
    assert table.column("name").to_pylist() == [f"p{row}" for row in range(1200)]
    assert table.column("row").to_pylist() == [*range(600), *range(600)]
    assert table.column("nll").to_pylist() == expected(sources, targets)
    sums = [sum(row) for row in table.column("token_nlls").to_pylist()]
    assert sums == pytest.approx(table.column("nll").to_pylist())
    assert table.column("error").null_count == 1200


def test_what_is_wrong_with_a_row_stands_beside_it(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"source_ids": [5], "target_ids": [6]}\n'
        "oops\n"
        '{"source_ids": [5], "target_ids": []}\n'
        '{"source_ids": [5], "target_ids": [1000000]}\n'
    )
    output = tmp_path / "out"
    assert run(work(bundle, path, output)).errors == 3
    rows = scores_in(output).to_pylist()
    assert [row["nll"] is None for row in rows] == [False, True, True, True]
    codes = [row["error"] and row["error"].split(":")[0] for row in rows]
    assert codes == [None, "malformed_line", "empty_target", "token_out_of_range"]


def test_a_run_goes_on_with_what_is_not_there_yet(bundle: Bundle, tmp_path: Path) -> None:
    dataset(tmp_path / "in", 1000)
    output = tmp_path / "out"
    run(work(bundle, tmp_path / "in", output))
    whole = scores_in(output)
    kept = output / "part-000000.parquet"
    (output / "part-000002.parquet").unlink()
    written = kept.stat().st_mtime_ns
    (output / "part-000002.parquet.0f.tmp").write_bytes(b"what a killed worker had begun to write")
    first, *_, last = score_dataset(work(bundle, tmp_path / "in", output), Pool(workers=1))
    assert (first.pairs, last.pairs) == (750, 1000)
    assert kept.stat().st_mtime_ns == written
    assert scores_in(output).equals(whole)
    assert not list(output.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "pool", "message"),
    [
        ({"with_tokens": True}, POOL, "with other with_tokens;"),
        ({"settings": {"precision": "bfloat16"}}, POOL, "with other settings;"),
        ({}, Pool(partition_rows=100), "with other rows of a partition;"),
    ],
)
def test_an_output_of_another_run_is_not_mixed_with_this_one(
    change: dict[str, Any], pool: Pool, message: str, bundle: Bundle, tmp_path: Path
) -> None:
    dataset(tmp_path / "in", 1000)
    plan(work(bundle, tmp_path / "in", tmp_path / "out"), POOL)
    with pytest.raises(ConfigurationError, match=message):
        run(work(bundle, tmp_path / "in", tmp_path / "out", **change), pool)


def plan(work: Work, pool: Pool) -> Progress:
    """Begins a run that ends before anything is scored."""
    begun = score_dataset(work, pool)
    first = next(begun)
    begun.close()
    return first


def test_the_same_command_goes_on_where_files_are_smaller_than_partitions(
    bundle: Bundle, tmp_path: Path
) -> None:
    dataset(tmp_path / "in", 1000)
    for _ in range(2):
        first = plan(work(bundle, tmp_path / "in", tmp_path / "out"), Pool(partition_rows=800))
        assert (first.of_partitions, first.of_pairs) == (2, 1000)


def test_a_dataset_that_was_changed_is_another_one(bundle: Bundle, tmp_path: Path) -> None:
    dataset(tmp_path / "in", 1000)
    plan(work(bundle, tmp_path / "in", tmp_path / "out"), POOL)
    os.utime(tmp_path / "in" / "a.parquet", ns=(1, 1))
    with pytest.raises(ConfigurationError, match="with other files of the dataset;"):
        run(work(bundle, tmp_path / "in", tmp_path / "out"))


@pytest.mark.parametrize("where", ["in", "in/scores"])
def test_an_output_in_the_dataset_is_refused(where: str, bundle: Bundle, tmp_path: Path) -> None:
    dataset(tmp_path / "in", 1000)
    with pytest.raises(ConfigurationError, match="lies in the dataset"):
        run(work(bundle, tmp_path / "in", tmp_path / where))


def test_an_output_that_holds_something_else_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    dataset(tmp_path / "in", 1000)
    dataset(tmp_path / "out", 10)
    with pytest.raises(ConfigurationError, match="no plan says how they were made"):
        run(work(bundle, tmp_path / "in", tmp_path / "out"))


def test_a_plan_that_another_run_replaced_is_not_called_done(
    bundle: Bundle, tmp_path: Path
) -> None:
    dataset(tmp_path / "in", 1000)
    running = score_dataset(work(bundle, tmp_path / "in", tmp_path / "out"), POOL)
    next(running)
    (tmp_path / "out" / "_plan.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="another run has begun"):
        list(running)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch_tokens": "many"}, "max_batch_tokens"),
        ({"device": "cpu", "precision": "int8"}, "a worker did not start: .*int8"),
    ],
)
def test_a_setting_that_is_wrong_is_said_in_a_sentence(
    settings: dict[str, Any], message: str, bundle: Bundle, tmp_path: Path
) -> None:
    dataset(tmp_path / "in", 1000)
    with pytest.raises(ConfigurationError, match=message):
        run(work(bundle, tmp_path / "in", tmp_path / "out", settings=settings))


def test_a_worker_serves_pipelines_of_one_s_own(
    bundle: Bundle, expected: Callable[..., list[float]]
) -> None:
    sources, targets = random_pairs(50, seed=11)
    scorer = PairScorer(str(bundle.folder), {"device": "cpu", "precision": "float32"})
    table = scorer(pa.table({"name": ["x"] * 50, "source_ids": sources, "target_ids": targets}))
    assert table.column("nll").to_pylist() == expected(sources, targets)
    assert table.column_names[:3] == ["name", "source_ids", "target_ids"]
    with pytest.raises(ConfigurationError, match="columns error, loss"):
        scorer(table)


def test_no_row_is_lost_or_doubled_when_workers_are_killed(
    bundle: Bundle,
    tmp_path: Path,
    expected: Callable[..., list[float]],
    pytestconfig: pytest.Config,
) -> None:
    sources, targets = dataset(tmp_path / "in", 3000)
    output = tmp_path / "out"
    pool = Pool(partition_rows=100, workers=2, cpus_per_worker=1)
    kills, wanted = 0, pytestconfig.getoption("--kills")
    for progress in score_dataset(work(bundle, tmp_path / "in", output), pool):
        workers = actor_processes("MapWorker")
        if progress.partitions and kills < wanted and workers:
            os.kill(workers[0], signal.SIGKILL)
            kills += 1
    assert kills == wanted
    table = scores_in(output)
    assert table.column("row").to_pylist() == [*range(1500), *range(1500)]
    assert table.column("nll").to_pylist() == expected(sources, targets)
