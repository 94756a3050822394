"""A worker without a Ray: what it loads, what it reads and writes, and when it gives up."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqloss.bundle.reader import Bundle
from seqloss.distributed import storage, workers
from seqloss.distributed.attempts import Attempts
from seqloss.distributed.partitions import cut, input_files, survey
from seqloss.distributed.storage import Location
from seqloss.distributed.workers import Errand, PartitionScorer, Work
from seqloss.errors import ConfigurationError, EngineDeadError

pytestmark = pytest.mark.usefixtures("closed_models")


@pytest.fixture(scope="module")
def bundle(export_once: Callable[..., Bundle]) -> Bundle:
    return export_once("demo", "torch")


@pytest.fixture
def work(bundle: Bundle, tmp_path: Path) -> Work:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    table = pa.table({"source_ids": [[5]] * 6, "target_ids": [[6]] * 5 + [[10**6]]})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    settings = {"device": "cpu", "precision": "float32", "warm_up": False}
    places = (str(tmp_path / name) for name in ("in", "out"))
    return Work(*places, str(bundle.folder), settings, bundle_digest=bundle.digest)


def errands(work: Work) -> list[Errand]:
    source = Location.of(work.source)
    partitions = cut(survey(source, input_files(source), work.columns.names()), 3)
    return [Errand(one, f"part-{one.index}.parquet") for one in partitions]


def batch_of(*errands: Errand) -> dict[str, Any]:
    return {"errand": [errand.as_json() for errand in errands]}


def test_partitions_are_scored_and_written(work: Work) -> None:
    counts = PartitionScorer(work, Attempts())(batch_of(*errands(work)))
    assert counts == {"pairs": [3, 3], "errors": [0, 1]}
    table = pq.read_table(work.output)
    assert table.column("row").to_pylist() == [*range(6)]
    assert [error is None for error in table.column("error").to_pylist()] == [True] * 5 + [False]
    assert "target of row 5 has" in table.column("error")[5].as_py()


def test_another_bundle_is_refused_by_whoever_finds_it(work: Work, bundle: Bundle) -> None:
    scorer = PartitionScorer(replace(work, bundle_digest="0" * 64), Attempts())
    with pytest.raises(ConfigurationError) as refusal:
        scorer(batch_of(*errands(work)))
    for named in (platform.node(), str(bundle.folder), bundle.digest, "0" * 64):
        assert named in str(refusal.value)


def test_a_partition_that_ends_its_workers_is_given_up_by_name(work: Work) -> None:
    attempts = Attempts()
    first, second = errands(work)
    for _ in range(5):
        attempts.begin(second.output_name)  # and the process ended
    scorer = PartitionScorer(work, attempts)
    assert scorer(batch_of(first)) == {"pairs": [3], "errors": [0]}
    message = r"in/a\.parquet, rows 3 to 5: 5 workers ended, one after the other"
    with pytest.raises(ConfigurationError, match=message):
        scorer(batch_of(second))


def test_a_partition_that_is_written_ended_nobody(work: Work) -> None:
    """Ray asks for it again where it has lost what was said of it."""
    attempts = Attempts()
    scorer = PartitionScorer(work, attempts)
    for _ in range(7):
        assert scorer(batch_of(errands(work)[0])) == {"pairs": [3], "errors": [0]}


def test_a_worker_that_ends_while_it_loads_is_given_up(work: Work) -> None:
    attempts = Attempts()
    for _ in range(3):
        attempts.begin("worker here")
    with pytest.raises(ConfigurationError, match="ended 3 times while it loaded the model"):
        PartitionScorer(work, attempts)(batch_of(*errands(work)))


def test_a_worker_that_loads_begins_anew(work: Work) -> None:
    attempts = Attempts()
    attempts.begin("worker here")
    PartitionScorer(work, attempts)(batch_of(*errands(work)))
    assert attempts.begin("worker here") == 1


class EndedError(Exception):
    """A process ended."""


def end(status: int) -> None:
    raise EndedError(status)


def test_a_device_that_fails_is_tried_by_new_processes(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: busy")

    monkeypatch.setattr(workers, "PairScorer", fail)
    monkeypatch.setattr(workers.os, "_exit", end)
    attempts = Attempts()
    for _ in range(2):
        with pytest.raises(EndedError):
            PartitionScorer(work, attempts)(batch_of(*errands(work)))
    message = f"cannot be loaded on {platform.node()}: CUDA error: busy"
    with pytest.raises(ConfigurationError, match=message):
        PartitionScorer(work, attempts)(batch_of(*errands(work)))


def test_a_worker_whose_device_is_gone_ends(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise EngineDeadError("a sticky error")

    scorer = PartitionScorer(work, Attempts())
    scorer(batch_of(errands(work)[0]))
    monkeypatch.setattr(workers.OfflineModel, "score", die)
    monkeypatch.setattr(workers.os, "_exit", end)
    with pytest.raises(EndedError):
        scorer(batch_of(errands(work)[1]))


def test_an_output_that_cannot_be_written_is_named(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PAUSES_SECONDS", (0.0,))
    scorer = PartitionScorer(replace(work, output=f"{work.output}/not/there"), Attempts())
    with pytest.raises(ConfigurationError, match=r"part-0\.parquet cannot be written: "):
        scorer(batch_of(*errands(work)))
