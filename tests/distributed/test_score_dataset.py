"""A whole dataset, by one worker in this process: what is there, what is missing, what is noted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from seqloss.bundle.reader import Bundle
from seqloss.distributed import ray_data
from seqloss.distributed.attempts import Attempts
from seqloss.distributed.pool import Placement, Pool
from seqloss.distributed.ray_data import Progress, score_dataset
from seqloss.distributed.workers import Errand, PairScorer, PartitionScorer, Work
from seqloss.errors import BundleError, ConfigurationError

POOL = Pool(partition_rows=10)

pytestmark = pytest.mark.usefixtures("closed_models")


@pytest.fixture(scope="module")
def bundle(export_once: Callable[..., Bundle]) -> Bundle:
    return export_once("demo", "torch")


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """One partition after the other is scored here."""

    def counts(
        work: Work, todo: Sequence[Errand], placement: Placement
    ) -> Iterator[Mapping[str, int]]:
        scorer = PartitionScorer(work, Attempts())
        for errand in todo:
            counted = scorer({"errand": [errand.as_json()]})
            yield {name: number for name, (number,) in counted.items()}

    machine = {"Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(ray_data, "_counts", counts)
    monkeypatch.setattr(ray_data.ray, "nodes", lambda: [machine, {"Alive": False}])


@pytest.fixture
def work(bundle: Bundle, tmp_path: Path) -> Work:
    """Four partitions of two files."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        ids = [[3 + row] for row in range(20)]
        table = pa.table({"source_ids": ids, "target_ids": ids})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    return work_of(bundle, tmp_path / "in", tmp_path / "out")


def work_of(bundle: Bundle, source: Path, output: Path, **settings: Any) -> Work:
    given = {"device": "cpu", "precision": "float32", "warm_up": False} | settings
    return Work(str(source), str(output), str(bundle.folder), given)


def run(work: Work, pool: Pool = POOL) -> Progress:
    *_, last = score_dataset(work, pool)
    return last


def parts_of(work: Work) -> list[Path]:
    return sorted(Path(work.output).glob("part-*.parquet"))


def test_a_run_says_how_far_it_is(work: Work) -> None:
    progress = [(each.partitions, each.pairs, each.errors) for each in score_dataset(work, POOL)]
    assert progress == [(0, 0, 0), (1, 10, 0), (2, 20, 0), (3, 30, 0), (4, 40, 0)]
    assert pq.read_table(work.output).column("row").to_pylist() == [*range(20), *range(20)]


def test_what_is_wrong_with_a_row_stands_beside_it(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"source_ids": [5], "target_ids": [6]}\n'
        "oops\n"
        '{"source_ids": [5], "target_ids": []}\n'
        '{"source_ids": [5], "target_ids": [1000000]}\n'
    )
    output = tmp_path / "out"
    assert run(work_of(bundle, path, output), Pool(partition_rows=2)).errors == 3
    rows = pq.read_table(output).to_pylist()
    assert [row["nll"] is None for row in rows] == [False, True, True, True]
    codes = [row["error"] and row["error"].split(":")[0] for row in rows]
    assert codes == [None, "malformed_line", "empty_target", "token_out_of_range"]
    assert "target of row 3 has the id 1000000" in rows[3]["error"]


def test_a_run_goes_on_with_what_is_not_there_yet(work: Work) -> None:
    run(work)
    whole = pq.read_table(work.output)
    kept, _, lost, _ = parts_of(work)
    written = kept.stat().st_mtime_ns
    lost.unlink()
    progress = score_dataset(work)
    assert next(progress).pairs == 30
    summary = Path(work.output) / "_summary.json"
    # While something is missing nothing says that it is not.
    assert [summary.exists() for _ in progress] == [False]
    assert summary.exists()
    assert kept.stat().st_mtime_ns == written
    assert pq.read_table(work.output).equals(whole)


def test_nothing_is_scored_twice(work: Work) -> None:
    run(work)
    assert [progress.pairs for progress in score_dataset(work)] == [40]


def test_a_run_that_another_one_has_replaced_is_not_called_done(work: Work) -> None:
    """Its rows are not the other one's."""
    first = score_dataset(work, POOL)
    next(first)
    next(first)
    (Path(work.output) / "_plan.json").unlink()
    for part in parts_of(work):
        part.unlink()
    second = score_dataset(work, Pool(partition_rows=7))
    next(second)
    with pytest.raises(ConfigurationError, match="another run has begun in"):
        list(first)
    with pytest.raises(ConfigurationError, match="which another run has written"):
        list(second)
    assert not (Path(work.output) / "_summary.json").exists()


def test_a_dataset_that_is_changed_meanwhile_is_not_called_scored(work: Work) -> None:
    running = score_dataset(work, POOL)
    next(running)
    next(running)
    os.utime(Path(work.source) / "b.parquet", ns=(1, 1))
    with pytest.raises(ConfigurationError, match=r"b\.parquet is not what it was"):
        list(running)
    assert not (Path(work.output) / "_summary.json").exists()


def test_a_file_that_was_scored_and_then_changed_is_noticed(work: Work) -> None:
    running = score_dataset(work, POOL)
    for _ in range(3):
        next(running)
    os.utime(Path(work.source) / "a.parquet", ns=(1, 1))
    with pytest.raises(ConfigurationError, match=r"a\.parquet was changed, added or removed while"):
        list(running)
    assert not (Path(work.output) / "_summary.json").exists()


def test_workers_are_told_what_is_decided_here(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their own environment says."""
    told: list[Work] = []

    def counts(work: Work, *_: object) -> Iterator[Mapping[str, int]]:
        told.append(work)
        yield from ()

    monkeypatch.setattr(ray_data, "_counts", counts)
    monkeypatch.setenv("SEQLOSS_MAX_BATCH_TOKENS", "99")
    with pytest.raises(ConfigurationError, match="were removed meanwhile"):
        run(work)
    (asked,) = told
    assert asked.settings["max_batch_tokens"] == 99
    assert (asked.settings["precision"], asked.settings["kernels"]) == ("float32", True)
    assert asked.bundle_digest is not None
    assert "max_queue_tokens" not in asked.settings


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_batch_tokens": "many"}, ConfigurationError, "max_batch_tokens"),
        ({"device": "cuda"}, ConfigurationError, "no machine of the cluster has 1 .* and a GPU"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    settings: dict[str, Any], error: type[Exception], message: str, bundle: Bundle, work: Work
) -> None:
    with pytest.raises(error, match=message):
        run(work_of(bundle, Path(work.source), Path(work.output), **settings))
    assert not Path(work.output).exists()


def test_a_folder_without_a_bundle_is_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        run(Work(work.source, work.output, str(tmp_path)))


def test_a_worker_serves_pipelines_of_one_s_own(bundle: Bundle, work: Work) -> None:
    scorer = PairScorer(str(bundle.folder), {"device": "cpu", "precision": "float32"})
    run(work)
    pairs = pq.read_table(work.source)
    table = scorer(pairs.add_column(0, "name", [["x"] * 40]))
    assert table.column("nll").to_pylist() == pq.read_table(work.output).column("nll").to_pylist()
    assert table.column_names[:3] == ["name", "source_ids", "target_ids"]
    with pytest.raises(ConfigurationError, match="columns error, loss"):
        scorer(table)


@pytest.mark.parametrize(
    ("cause", "error", "message"),
    [
        (ConfigurationError("no such device"), ConfigurationError, "^no such device$"),
        (BundleError("no bundle", ["a file"]), BundleError, "^no bundle\n  - a file$"),
        (OSError(5, "Input/output error"), ConfigurationError, "failed: Input/output error$"),
        (OSError("AWS Error NETWORK"), ConfigurationError, "a worker failed: AWS Error NETWORK$"),
        (KeyError("a bug"), RayTaskError, "the traceback"),
    ],
)
def test_what_went_wrong_in_a_worker_is_said_in_a_sentence(
    cause: Exception, error: type[Exception], message: str
) -> None:
    """If it is what a person can correct."""
    if cause.args and isinstance(cause.args[0], str):
        cause.args = (f"{cause.args[0]}\nTo change retry attempts, ...",)  # as Ray Data does
    raised = RayTaskError("submit", "the traceback", cause).as_instanceof_cause()
    found = ray_data._of_worker(raised)
    assert isinstance(found, error)
    assert re.search(message, str(found))


def test_a_worker_that_does_not_start_says_why() -> None:
    text = "the traceback\nModuleNotFoundError: No module named 'seqloss'"
    cause = RayTaskError("__init__", text, ModuleNotFoundError(), actor_id="00" * 16)
    assert str(ray_data._of_worker(ActorDiedError(cause))) == (
        "a worker did not start: ModuleNotFoundError: No module named 'seqloss'"
    )
