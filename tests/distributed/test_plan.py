"""What is noted in an output keeps the scores of two runs apart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes import fake_bundle
from seqloss.distributed import plan as plans
from seqloss.distributed.partitions import FileState, Partition
from seqloss.distributed.plan import Plan, finish, made_with, plan_in_output
from seqloss.distributed.storage import Location
from seqloss.distributed.tables import PairColumns
from seqloss.distributed.workers import Work
from seqloss.errors import ConfigurationError


def write_rows(path: Path, number: int, **columns: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    ids = [[row] for row in range(number)]
    pq.write_table(pa.table({"source_ids": ids, "target_ids": ids} | columns), path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in" / "a.parquet", 10)
    write_rows(tmp_path / "in" / "b.parquet", 10)
    return tmp_path / "in"


def planned(
    dataset: Path, output: Path, *, rows: int | None = 5, workers: int = 1, **changes: Any
) -> Plan:
    work = work_of(dataset, output, **changes)
    return plan_in_output(work, made_with(work, fake_bundle()), rows, workers)


def work_of(dataset: Path, output: Path, **changes: Any) -> Work:
    return Work(str(dataset), str(output), "fake", **changes)


def write_parts(plan: Plan, output: Path) -> None:
    for name in plan.output_names:
        (output / name).write_bytes(b"scores")


def test_a_plan_is_read_as_it_was_written() -> None:
    file = FileState("a.jsonl", 123, 5)
    partitions = (Partition(0, file, 0, 7), Partition(1, file, 7, 2, 100, 20))
    plan = Plan((file,), {"bundle": "0" * 64, "kept": ["id"]}, 7, partitions)
    assert Plan.from_json(plan.as_json()) == plan


def test_the_same_plan_has_the_same_files_and_another_one_has_others(
    dataset: Path, tmp_path: Path
) -> None:
    names = [
        planned(dataset, tmp_path / output, rows=rows).output_names
        for output, rows in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 4
    assert not set(names[0]) & set(names[2])
    assert all(len(name) == len("part-000000-01234567.parquet") for name in names[0])


def test_a_run_that_is_started_again_goes_on_with_its_plan(dataset: Path, tmp_path: Path) -> None:
    first = planned(dataset, tmp_path / "out", rows=None, workers=1)
    assert planned(dataset, tmp_path / "out", rows=None, workers=7) == first


@pytest.mark.parametrize("rows", [5, 6])
def test_of_two_runs_that_begin_at_once_one_decides(
    rows: int, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has the same plan, or is refused."""
    barrier = threading.Barrier(2)
    write_first = Location.write_first

    def at_once(location: Location, content: bytes) -> None:
        barrier.wait(60)
        write_first(location, content)

    monkeypatch.setattr(Location, "write_first", at_once)
    outcomes: list[Any] = []

    def begin(rows: int) -> None:
        try:
            outcomes.append(planned(dataset, tmp_path / "out", rows=rows).output_names)
        except ConfigurationError as error:
            outcomes.append(error.detail)

    threads = [threading.Thread(target=begin, args=(each,)) for each in (5, rows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if rows == 5:
        assert outcomes[0] == outcomes[1]
    else:
        (refusal,) = [one for one in outcomes if isinstance(one, str)]
        assert "partition_rows was" in refusal
        (names,) = [one for one in outcomes if isinstance(one, tuple)]
        noted = Plan.from_json((tmp_path / "out" / "_plan.json").read_bytes())
        assert noted.output_names == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"with_tokens": True}, "with_tokens was False and is True;"),
        ({"settings": {"precision": "bfloat16"}}, "precision was 'auto' and is 'bfloat16';"),
        ({"settings": {"max_target_tokens": 99}}, "max_target_tokens was 4096 and is 99;"),
        (
            {"columns": PairColumns(prefix_length=1)},
            "columns.prefix_length was 0 and is 1;",
        ),
        ({"rows": 6}, "partition_rows was 5 and is 6;"),
    ],
)
def test_another_run_is_refused_and_told_what_is_other(
    changes: dict[str, Any], message: str, dataset: Path, tmp_path: Path
) -> None:
    planned(dataset, tmp_path / "out")
    with pytest.raises(ConfigurationError, match=f"scores of another run: {message}"):
        planned(dataset, tmp_path / "out", **changes)


@pytest.mark.parametrize(
    "settings",
    [
        {"device": "auto", "precision": "auto", "kernels": True},
        {"log_format": "json", "port": 81, "threads": 7, "max_batch_tokens": 999},
    ],
)
def test_what_changes_no_score_is_no_other_run(
    settings: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    first = planned(dataset, tmp_path / "out")
    assert planned(dataset, tmp_path / "out", settings=settings) == first


def test_what_the_environment_sets_is_compared_as_what_is_given(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(dataset, tmp_path / "out", settings={"precision": "float32"})
    monkeypatch.setenv("SEQLOSS_PORT", "81")
    monkeypatch.setenv("SEQLOSS_PRECISION", "float32")
    planned(dataset, tmp_path / "out")


def test_another_version_or_bundle_is_another_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(dataset, tmp_path / "out")
    noted = made_with(work, fake_bundle())
    assert {"bundle", "seqloss", "torch"} <= noted.keys()
    plan_in_output(work, noted, None, 1)
    for name in ("bundle", "seqloss", "torch"):
        with pytest.raises(ConfigurationError, match=f"run: {name} was .* and is 'another'"):
            plan_in_output(work, noted | {name: "another"}, None, 1)


def test_a_build_for_another_device_is_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = []
    for version in ("2.13.0+cpu", "2.13.0+cu129"):
        monkeypatch.setattr(plans.metadata, "version", lambda _, version=version: version)
        noted.append(made_with(work_of(Path("in"), Path("out")), fake_bundle()))
    assert noted[0] == noted[1]


@pytest.mark.parametrize("change", ["written", "added", "removed"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_dataset_that_was_changed_is_another_one(
    when: str, change: str, dataset: Path, tmp_path: Path
) -> None:
    plan = planned(dataset, tmp_path / "out")
    write_parts(plan, tmp_path / "out")
    if change == "removed":
        (dataset / "b.parquet").unlink()
    else:
        write_rows(dataset / ("b.parquet" if change == "written" else "c.parquet"), 11)
    again = {
        "before": lambda: planned(dataset, tmp_path / "out"),
        "meanwhile": lambda: finish(work_of(dataset, tmp_path / "out"), plan),
    }
    with pytest.raises(ConfigurationError, match=r"/in/.\.parquet was changed, added or removed"):
        again[when]()
    assert not (tmp_path / "out" / "_summary.json").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b'{"files": [1]}', b'{"files": [{"path": 1}]}']
)
def test_a_broken_plan_is_said_in_a_sentence(content: bytes, dataset: Path, tmp_path: Path) -> None:
    planned(dataset, tmp_path / "out")
    (tmp_path / "out" / "_plan.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"_plan\.json: it is no plan .*; take another"):
        planned(dataset, tmp_path / "out")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("in", "lies in the dataset"),
        ("in/scores", "lies in the dataset"),
        ("elsewhere/../in/scores", "lies in the dataset"),
        ("link/scores", "lies in the dataset"),
        (".", "of the dataset, lies in"),
        ("linked", "of the dataset, lies in"),
    ],
)
def test_a_dataset_and_its_output_lie_apart(
    output: str, message: str, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "elsewhere").mkdir()
    write_rows(tmp_path / "linked" / "c.parquet", 3)
    (dataset / "more").symlink_to(tmp_path / "linked")
    with pytest.raises(ConfigurationError, match=message):
        planned(dataset, Path(f"{tmp_path}/{output}"))


def test_an_output_that_holds_something_else_is_refused_and_left_alone(
    dataset: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "out" / "mine.parquet", 1)
    (tmp_path / "out" / "mine.tmp").touch()
    with pytest.raises(ConfigurationError, match="no plan says how they were made"):
        planned(dataset, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine.parquet", "mine.tmp"}


def begun_in(output: Path, name: str) -> Path:
    """What somebody who was killed left of a file."""
    left = Path((Location.of(str(output)) / name).unfinished().path)
    left.touch()
    return left


def test_only_the_same_run_sweeps(dataset: Path, tmp_path: Path) -> None:
    plan = planned(dataset, tmp_path / "out")
    left = begun_in(tmp_path / "out", plan.output_names[0])
    of_another = begun_in(tmp_path / "out", "part-000000-00000000.parquet")
    with pytest.raises(ConfigurationError):
        planned(dataset, tmp_path / "out", with_tokens=True)
    assert left.exists()
    planned(dataset, tmp_path / "out")
    assert not left.exists()
    assert of_another.exists()


def test_a_run_is_done_once_all_is_there_and_nothing_else(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plan = planned(dataset, output)
    write_parts(plan, output)
    left = begun_in(output, plan.output_names[0])
    finish(work_of(dataset, output), plan)
    assert (output / "_summary.json").read_bytes() == b'{"pairs":20,"partitions":4}'
    assert not left.exists()


def lose_part(plan: Plan, output: Path) -> None:
    (output / plan.output_names[2]).unlink()


def empty_part(plan: Plan, output: Path) -> None:
    (output / plan.output_names[2]).write_bytes(b"")


def add_part(plan: Plan, output: Path) -> None:
    (output / "part-000002-00000000.parquet").write_bytes(b"scores")


def replace_plan(plan: Plan, output: Path) -> None:
    (output / "_plan.json").write_bytes(b"{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_part, "part-000002-.* and maybe others were removed meanwhile"),
        (empty_part, "part-000002-.* and maybe others were removed meanwhile"),
        (add_part, r"holds part-000002-00000000\.parquet, which another run has written"),
        (replace_plan, "another run has begun in"),
    ],
)
def test_an_output_that_is_not_the_plan_s_is_not_called_done(
    spoil: Callable[[Plan, Path], None], message: str, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    plan = planned(dataset, output)
    write_parts(plan, output)
    spoil(plan, output)
    with pytest.raises(ConfigurationError, match=message):
        finish(work_of(dataset, output), plan)
    assert not (output / "_summary.json").exists()


def test_files_of_another_run_are_refused_before_anything_is_scored(
    dataset: Path, tmp_path: Path
) -> None:
    add_part(planned(dataset, tmp_path / "out"), tmp_path / "out")
    with pytest.raises(ConfigurationError, match="which another run has written"):
        planned(dataset, tmp_path / "out")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (("name",), "there is no column name to keep"),
        (("loss",), "the output has its own column loss"),
        (("id", "id"), "'id' is to be kept twice"),
        (("twice",), "there are several columns 'twice' to keep"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(
    kept: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    ids = [[1], [2]]
    names = ["source_ids", "target_ids", "id", "twice", "twice", "loss"]
    table = pa.Table.from_arrays([pa.array(ids)] * len(names), names=names)
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    with pytest.raises(ConfigurationError, match=message):
        planned(tmp_path / "in", tmp_path / "out", kept=kept)
