"""A dataset is cut once, and what was cut is all there is."""

from __future__ import annotations

from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqloss.distributed.json_lines import table_of
from seqloss.distributed.partitions import (
    ParquetReader,
    Partition,
    Plan,
    cut,
    input_files,
    read_lines,
    survey,
    write_rows,
)
from seqloss.distributed.storage import Location
from seqloss.distributed.tables import PairColumns
from seqloss.errors import ConfigurationError

COLUMNS = ("source_ids", "target_ids")


def rows(first: int, end: int) -> pa.Table:
    numbers = range(first, end)
    columns = {"source_ids": [[n] for n in numbers], "target_ids": [[n, 1] for n in numbers]}
    return pa.table(columns, pa.schema({name: pa.list_(pa.int64()) for name in columns}))


def write_lines(path: Path, first: int, end: int, *, ends_line: bool = True) -> None:
    lines = [orjson.dumps(row) for row in rows(first, end).to_pylist()]
    path.write_bytes(b"\n".join(lines) + (b"\n" if ends_line else b""))


@pytest.mark.parametrize("rows_each", [1, 3, 7, 10, 1000])
@pytest.mark.parametrize("group", [1, 4, 100])
def test_partitions_of_parquet_are_all_rows_once(
    rows_each: int, group: int, tmp_path: Path
) -> None:
    pq.write_table(rows(0, 10), tmp_path / "a.parquet", row_group_size=group)
    pq.write_table(rows(10, 10), tmp_path / "b.parquet")
    pq.write_table(rows(10, 27), tmp_path / "c.parquet", row_group_size=group)
    location = Location.of(str(tmp_path))
    partitions = cut(survey(location, input_files(location)), rows_each)
    reader = ParquetReader(location.filesystem, COLUMNS)
    read = [reader.read(one) for one in partitions]
    assert [len(table) for table in read] == [one.num_rows for one in partitions]
    assert max(map(len, read)) <= rows_each
    assert pa.concat_tables(read).equals(rows(0, 27))
    assert [one.index for one in partitions] == list(range(len(partitions)))


@pytest.mark.parametrize("rows_each", [1, 3, 10, 1000])
@pytest.mark.parametrize("ends_line", [True, False])
def test_partitions_of_lines_are_all_lines_once(
    rows_each: int, ends_line: bool, tmp_path: Path
) -> None:
    write_lines(tmp_path / "a.jsonl", 0, 10, ends_line=ends_line)
    (tmp_path / "b.ndjson").write_bytes(b"")
    write_lines(tmp_path / "c.jsonl", 10, 27, ends_line=ends_line)
    location = Location.of(str(tmp_path))
    partitions = cut(survey(location, input_files(location)), rows_each)
    lines = [read_lines(location.filesystem, one) for one in partitions]
    assert [len(part) for part in lines] == [one.num_rows for one in partitions]
    table, errors = table_of([line for part in lines for line in part], PairColumns(), [])
    assert table.to_pylist() == rows(0, 27).to_pylist()
    assert errors == {}


def test_files_that_are_no_data_are_left_out(tmp_path: Path) -> None:
    for name in ("_SUCCESS", ".a.parquet.crc", "_temporary/0.parquet", "day=1/a.parquet"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert input_files(Location.of(str(tmp_path))) == [str(tmp_path / "day=1/a.parquet")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "a dataset is files of .parquet, .jsonl or .ndjson"),
        (["a.parquet", "b.csv"], "b.csv: a dataset is"),
        (["a.jsonl.gz"], "unpack or convert what is compressed"),
        (["a.parquet", "b.jsonl"], "both Parquet and lines of JSON"),
    ],
)
def test_other_files_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ConfigurationError, match=message):
        input_files(Location.of(str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "message"), [("/nowhere/at/all", "there is no /nowhere"), ("ftp://a/b", "ftp://a/b: ")]
)
def test_what_is_not_there_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        input_files(Location.of(text))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    location = Location.of(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"a\.parquet: .*Parquet"):
        survey(location, input_files(location))


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(rows(0, 2), tmp_path / "a.parquet")
    pq.write_table(rows(0, 2).rename_columns(["a", "b"]), tmp_path / "b.parquet")
    location = Location.of(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"b\.parquet has other columns than .*a\.parquet"):
        survey(location, input_files(location))


def test_a_uri_names_a_folder_as_a_path_does(tmp_path: Path) -> None:
    pq.write_table(rows(0, 2), tmp_path / "a.parquet")
    assert input_files(Location.of(tmp_path.as_uri())) == input_files(Location.of(str(tmp_path)))


def test_a_plan_is_read_as_it_was_written() -> None:
    partitions = (Partition(0, "a.parquet", 0, 7), Partition(1, "b.jsonl", 7, 2, 100, 20))
    plan = Plan((("a.parquet", 123, 7, 5),), {"bundle": "0" * 64}, 7, partitions)
    assert Plan.from_json(plan.as_json()) == plan


def test_scores_are_there_whole_and_nothing_else_is(tmp_path: Path) -> None:
    partition = Partition(3, "a.parquet", 0, 5)
    for _ in range(2):
        write_rows(Location.of(str(tmp_path)), partition, rows(0, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["part-000003.parquet"]
    assert pq.read_table(tmp_path / "part-000003.parquet").equals(rows(0, 5))
