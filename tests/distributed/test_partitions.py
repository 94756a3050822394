"""A dataset is cut once, and what was cut is all there is."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqloss.distributed import storage
from seqloss.distributed.partitions import InputFile, Partition, cut, input_files, survey
from seqloss.distributed.reading import PartitionReader
from seqloss.distributed.storage import Location
from seqloss.distributed.tables import PairColumns
from seqloss.errors import ConfigurationError

COLUMNS = ("source_ids", "target_ids")


def rows(first: int, end: int) -> pa.Table:
    numbers = range(first, end)
    columns = {"source_ids": [[n] for n in numbers], "target_ids": [[n, 1] for n in numbers]}
    return pa.table(columns, pa.schema({name: pa.list_(pa.int64()) for name in columns}))


def surveyed(folder: Path) -> tuple[InputFile, ...]:
    location = Location.of(str(folder))
    return survey(location, input_files(location), COLUMNS)


def reader_of(folder: Path) -> PartitionReader:
    return PartitionReader(Location.of(str(folder)).filesystem, PairColumns(), ())


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
    partitions = cut(surveyed(tmp_path), rows_each)
    reader = reader_of(tmp_path)
    read = [reader.read(one)[0] for one in partitions]
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
    partitions = cut(surveyed(tmp_path), rows_each)
    reader = reader_of(tmp_path)
    read = [reader.read(one) for one in partitions]
    assert [len(table) for table, _ in read] == [one.num_rows for one in partitions]
    assert pa.concat_tables(table for table, _ in read).to_pylist() == rows(0, 27).to_pylist()
    assert not any(errors for _, errors in read)


def test_partitions_of_lines_are_bounded_in_bytes(tmp_path: Path) -> None:
    """But for a line that is longer than that by itself."""
    lengths = [10, 10, 10, 50, 10, 20, 10]
    lines = [b"x" * (length - 1) + b"\n" for length in lengths]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    partitions = cut(surveyed(tmp_path), 100, 30)
    assert [one.num_bytes for one in partitions] == [30, 50, 30, 10]
    assert [one.first_row for one in partitions] == [0, 3, 4, 6]


def test_partitions_of_parquet_are_bounded_in_bytes(tmp_path: Path) -> None:
    """By what its row groups have on average, of the columns that are read."""
    short, long = (
        rows(0, 400),
        pa.table({name: [list(range(row, row + 50)) for row in range(400)] for name in COLUMNS}),
    )
    table = pa.concat_tables([short, long]).append_column("text", [["x" * 10_000] * 800])
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=400, use_dictionary=False)
    partitions = cut(surveyed(tmp_path), 400, 40_000)
    assert partitions[0].num_rows == 400
    assert [one.num_rows for one in partitions[1:-1]] == [pytest.approx(49, abs=2)] * 8
    assert sum(one.num_rows for one in partitions) == 800


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
    with pytest.raises(ConfigurationError, match=r"a\.parquet: .*Parquet"):
        surveyed(tmp_path)


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(rows(0, 2), tmp_path / "a.parquet")
    pq.write_table(rows(0, 2).rename_columns(["a", "b"]), tmp_path / "b.parquet")
    with pytest.raises(ConfigurationError, match=r"b\.parquet has other columns than .*a\.parquet"):
        surveyed(tmp_path)


def test_columns_that_nobody_reads_may_differ(tmp_path: Path) -> None:
    pq.write_table(rows(0, 2).append_column("id", [[1, 2]]), tmp_path / "a.parquet")
    pq.write_table(rows(0, 2).append_column("id", [["x", "y"]]), tmp_path / "b.parquet")
    assert [file.num_rows for file in surveyed(tmp_path)] == [2, 2]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_is_not_left_out(kind: str, tmp_path: Path) -> None:
    pq.write_table(rows(0, 2), tmp_path / "a.parquet")
    path = tmp_path / "b.parquet"
    path.symlink_to("nowhere.parquet") if kind == "link" else os.mkfifo(path)
    with pytest.raises(
        ConfigurationError, match=r"b\.parquet is no file: a link that leads nowhere"
    ):
        input_files(Location.of(str(tmp_path)))
    path.unlink()
    path.symlink_to("a.parquet")
    assert len(input_files(Location.of(str(tmp_path)))) == 2


def test_a_uri_names_a_folder_as_a_path_does(tmp_path: Path) -> None:
    pq.write_table(rows(0, 2), tmp_path / "a.parquet")
    assert input_files(Location.of(tmp_path.as_uri())) == input_files(Location.of(str(tmp_path)))


def first_partition(folder: Path) -> tuple[Path, Partition]:
    path = folder / "a.parquet"
    pq.write_table(rows(0, 10), path)
    return path, cut(surveyed(folder), 100)[0]


def change(path: Path) -> None:
    """To a file that is longer, and a moment older."""
    pq.write_table(rows(0, 20), path)


def test_a_file_that_was_changed_since_it_was_cut_is_not_read(tmp_path: Path) -> None:
    path, partition = first_partition(tmp_path)
    change(path)
    with pytest.raises(
        ConfigurationError, match=r"a\.parquet is not what it was when the run began"
    ):
        reader_of(tmp_path).read(partition)


def test_a_file_that_was_written_anew_is_another_one(tmp_path: Path) -> None:
    path, partition = first_partition(tmp_path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ConfigurationError, match="or was written anew"):
        reader_of(tmp_path).read(partition)


def test_a_file_that_is_changed_while_it_is_read_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, partition = first_partition(tmp_path)
    reader = reader_of(tmp_path)

    def changing(_: Partition) -> tuple[pa.Table, dict[int, str]]:
        change(path)
        return rows(0, 10), {}

    monkeypatch.setattr(reader, "_read", changing)
    with pytest.raises(ConfigurationError, match="is not what it was"):
        reader.read(partition)


def test_a_file_that_is_changed_while_it_is_surveyed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = first_partition(tmp_path)
    opened = pq.ParquetFile(path)

    def changing(*_: object, **__: object) -> pq.ParquetFile:
        change(path)
        return opened

    monkeypatch.setattr(pq, "ParquetFile", changing)
    with pytest.raises(ConfigurationError, match="is not what it was"):
        surveyed(tmp_path)


@pytest.mark.parametrize("there", [9, 11])
def test_other_numbers_of_rows_are_refused(
    there: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever way they came about."""
    _, partition = first_partition(tmp_path)
    reader = reader_of(tmp_path)
    monkeypatch.setattr(reader, "_read", lambda _: (rows(0, there), {}))
    with pytest.raises(ConfigurationError, match=f"rows 0 to 9: {there} rows are there"):
        reader.read(partition)


def test_a_broken_page_is_named_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PAUSES_SECONDS", (0.0,))
    path = tmp_path / "a.parquet"
    pq.write_table(rows(0, 1000), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = second.dictionary_page_offset
    content[start : start + 50] = b"\xff" * 50
    path.write_bytes(content)
    reader = reader_of(tmp_path)
    first, second = cut(surveyed(tmp_path), 500)
    assert len(reader.read(first)[0]) == 500
    message = r"a\.parquet, rows 500 to 999: they cannot be read, since the file is broken"
    with pytest.raises(ConfigurationError, match=message):
        reader.read(second)


def test_a_store_that_fails_for_a_moment_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PAUSES_SECONDS", (0.0, 0.0))
    _, partition = first_partition(tmp_path)
    failures = [OSError("the store is busy"), OSError("it still is")]
    read = pq.ParquetFile.read_row_group

    def failing(*arguments: object, **options: object) -> pa.Table:
        if failures:
            raise failures.pop()
        return read(*arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", failing)
    assert reader_of(tmp_path).read(partition)[0].equals(rows(0, 10))
