"""Datasets on Ray Data, with workers that are killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from ray import cloudpickle
from ray_cluster import actor_processes, random_pairs

from seqloss.bundle.reader import Bundle
from seqloss.distributed import ray_data, workers
from seqloss.distributed.pool import Pool
from seqloss.distributed.ray_data import score_dataset
from seqloss.distributed.workers import PartitionScorer, Work
from seqloss.errors import ConfigurationError

# The workers of a run that failed may be there for a while, and need not be waited for.
HALF = Pool(partition_rows=100, workers=1, cpus_per_worker=1)

# Workers do not find this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


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


def test_no_row_is_lost_or_doubled_when_workers_are_killed(
    bundle: Bundle,
    tmp_path: Path,
    expected: Callable[..., list[float]],
    pytestconfig: pytest.Config,
) -> None:
    """And their losses are those of a plain service."""
    sources, targets = dataset(tmp_path / "in", 2000)
    output = tmp_path / "out"
    kills, wanted = 0, pytestconfig.getoption("--kills")
    pool = Pool(partition_rows=100, workers=2)
    asked = work(bundle, tmp_path / "in", output, kept=("name",), with_tokens=True)
    for progress in score_dataset(asked, pool):
        running = actor_processes("MapWorker")
        if progress.partitions and kills < wanted and running:
            os.kill(running[0], signal.SIGKILL)
            kills += 1
    assert kills == wanted
    assert (progress.pairs, progress.errors, progress.partitions) == (2000, 0, 20)
    table = pq.read_table(output)
    assert table.column("row").to_pylist() == [*range(1000), *range(1000)]
    assert table.column("nll").to_pylist() == expected(sources, targets)
    assert table.column("name").to_pylist() == [f"p{row}" for row in range(2000)]
    sums = [sum(row) for row in table.column("token_nlls").to_pylist()]
    assert sums == pytest.approx(table.column("nll").to_pylist())
    assert not [path.name for path in output.iterdir() if path.name.startswith("_unfinished")]


def test_what_is_wrong_in_a_worker_is_said_in_a_sentence(bundle: Bundle, tmp_path: Path) -> None:
    dataset(tmp_path / "in", 1000)
    settings = {"device": "cpu", "precision": "int8"}
    asked = work(bundle, tmp_path / "in", tmp_path / "out", settings=settings)
    with pytest.raises(ConfigurationError, match="holds float32 for torch, and not int8") as error:
        list(score_dataset(asked, HALF))
    assert len(str(error.value).splitlines()) == 1


class EndsWhatItScores(PartitionScorer):
    """And nothing else: the process that scores the rows from 500 on is gone."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        workers._MOST_ATTEMPTS = 2

    def _loaded(self) -> Any:
        return None

    def _scored(self, partition: Any, scorer: Any) -> pa.Table:
        if partition.first_row == 500:
            os._exit(1)
        return pa.table({"error": pa.nulls(partition.num_rows, pa.string())})


class LoadsOnce(PartitionScorer):
    """The first process of a worker ends while it scores, and the others while they load."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        workers._MOST_LOADS = 1

    def _loaded(self) -> Any:
        loaded = Path(self._work.output) / "_loaded"
        if not loaded.exists():
            loaded.touch()
            return None

        def end(*_: object, **__: object) -> None:
            os._exit(1)

        workers.PairScorer = end  # type: ignore[assignment, misc]
        return super()._loaded()

    def _scored(self, partition: Any, scorer: Any) -> pa.Table:
        os._exit(1)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (EndsWhatItScores, r"a\.parquet, rows 500 to 599: 2 workers ended, one after the other"),
        (LoadsOnce, "ended 1 times while it loaded the model"),
    ],
)
def test_what_ends_every_process_ends_the_run(
    scorer: type, message: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_data, "PartitionScorer", scorer)
    before = ray.data.DataContext.get_current().copy()
    dataset(tmp_path / "in", 1200)
    with pytest.raises(ConfigurationError, match=message):
        list(score_dataset(work(bundle, tmp_path / "in", tmp_path / "out"), HALF))
    # A program of one's own has other datasets.
    after = ray.data.DataContext.get_current()
    for name in ("max_errored_blocks", "max_consecutive_actor_init_deaths", "enable_progress_bars"):
        assert getattr(after, name) == getattr(before, name)
