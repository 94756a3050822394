"""A dataset in pieces: each is read, scored and written by one worker, whole or not at all.

Pieces are cut once and noted in the output, so that a run that is started again, with more workers
or fewer, goes on with those that are not there yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from seqloss.distributed.storage import Location
from seqloss.errors import ConfigurationError
from seqloss.records import Int64Array

_SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_NEWLINE = ord("\n")
_READ_BYTES = 8 * 1024**2

PLAN_NAME = "_plan.json"
SUMMARY_NAME = "_summary.json"


@dataclass(frozen=True, slots=True)
class Partition:
    """Consecutive rows of one file.

    Attributes:
        index: among all.
        file: its path, as the filesystem of the input knows it.
        first_row: within the file.
        num_rows: how many.
        first_byte, num_bytes: where they stand, of lines of JSON; 0 of Parquet.
    """

    index: int
    file: str
    first_row: int
    num_rows: int
    first_byte: int = 0
    num_bytes: int = 0

    @property
    def output_name(self) -> str:
        """Of the file of scores."""
        return f"part-{self.index:06d}.parquet"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a dataset was cut, and what its scores depend on.

    Attributes:
        files: path, bytes, rows and time of change (nanoseconds since 1970) of each.
        made_with: everything else; what is not the same makes other scores.
        rows_each: of a partition, at most.
        partitions: of all files, in their order.
    """

    files: tuple[tuple[str, int, int, int], ...]
    made_with: dict[str, Any]
    rows_each: int
    partitions: tuple[Partition, ...]

    def as_json(self) -> bytes:
        """To be read by `from_json`."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, content: bytes) -> Plan:
        """What `as_json` wrote."""
        read = orjson.loads(content)
        return cls(
            tuple(tuple(file) for file in read["files"]),
            read["made_with"],
            read["rows_each"],
            tuple(Partition(**partition) for partition in read["partitions"]),
        )


# ---------------------------------------------------------------- cutting


def input_files(location: Location) -> list[str]:
    """The dataset's files, in the order of their names.

    Raises:
        ConfigurationError: there are none, or of another kind, or of two.
    """
    info = location.info
    if info.type == fs.FileType.NotFound:
        raise ConfigurationError(f"there is no {location.path}")
    if info.type == fs.FileType.File:
        found = [location.path]
    else:
        paths = (one.path for one in location.all_files())
        found = sorted(path for path in paths if not _is_hidden(path, location.path))
    other = [path for path in found if _suffix(path) not in _SUFFIXES]
    if other or not found:
        raise ConfigurationError(
            f"{other[0] if other else location.path}: a dataset is files of .parquet, .jsonl or "
            ".ndjson and nothing else; unpack or convert what is compressed"
        )
    if len({_SUFFIXES[_suffix(path)] for path in found}) > 1:
        raise ConfigurationError(f"{location.path} holds both Parquet and lines of JSON; take one")
    return found


def is_parquet(path: str) -> bool:
    """Whether a file of a dataset is Parquet; else it is lines of JSON."""
    return _SUFFIXES[_suffix(path)] == "parquet"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of a dataset.

    Attributes:
        path: as its filesystem knows it.
        num_bytes: its size.
        num_rows: how many there are.
        changed: when, in nanoseconds since 1970; 0 where nobody knows.
        line_starts: where lines of JSON begin, and where the last one ends; None of Parquet. Shape:
            (num_rows + 1,), int64.
        schema: of Parquet.
    """

    path: str
    num_bytes: int
    num_rows: int
    changed: int
    line_starts: Int64Array | None = None
    schema: pa.Schema | None = None


def survey(location: Location, files: Sequence[str]) -> list[InputFile]:
    """Counts rows: from the footers of Parquet, and by reading through lines of JSON.

    Raises:
        ConfigurationError: a file is broken, or has other columns than the first.
    """
    surveyed = [_surveyed(location.filesystem, path) for path in files]
    first = surveyed[0]
    for file in surveyed:
        if file.schema is not None and not file.schema.equals(first.schema):
            raise ConfigurationError(
                f"{file.path} has other columns than {first.path}; make them one"
            )
    return surveyed


def _surveyed(filesystem: fs.FileSystem, path: str) -> InputFile:
    info = filesystem.get_file_info(path)
    changed = info.mtime_ns or 0
    if is_parquet(path):
        opened = _parquet(filesystem, path)
        rows, schema = opened.metadata.num_rows, opened.schema_arrow
        return InputFile(path, info.size, rows, changed, schema=schema)
    starts = _line_starts(filesystem, path)
    return InputFile(path, info.size, len(starts) - 1, changed, line_starts=starts)


def cut(files: Sequence[InputFile], rows_each: int) -> tuple[Partition, ...]:
    """All rows of all files, at most `rows_each` together."""
    partitions: list[Partition] = []
    for file in files:
        for first in range(0, file.num_rows, rows_each):
            end = min(first + rows_each, file.num_rows)
            place = (0, 0)
            if file.line_starts is not None:
                begin, behind = (int(file.line_starts[row]) for row in (first, end))
                place = begin, behind - begin
            partitions.append(Partition(len(partitions), file.path, first, end - first, *place))
    return tuple(partitions)


def _line_starts(filesystem: fs.FileSystem, path: str) -> Int64Array:
    """Where each line begins, and where the last one ends. Shape: (lines + 1,)."""
    found, offset = [np.zeros(1, np.int64)], 0
    with filesystem.open_input_stream(path) as stream:
        while block := stream.read(_READ_BYTES):
            at = np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE)
            found.append(at + offset + 1)
            offset += len(block)
    starts = np.concatenate(found)
    return starts if starts[-1] == offset else np.append(starts, offset)


def _suffix(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return name[name.rfind(".") :].lower() if "." in name else ""


def read_lines(filesystem: fs.FileSystem, partition: Partition) -> list[bytes]:
    """The lines of a partition of lines of JSON."""
    with filesystem.open_input_file(partition.file) as file:
        lines = bytes(file.read_at(partition.num_bytes, partition.first_byte))
    return lines.removesuffix(b"\n").split(b"\n")


def _is_hidden(path: str, folder: str) -> bool:
    """As everywhere around Parquet: what begins with a dot or an underscore is no data."""
    return any(part[0] in "._" for part in path[len(folder) :].strip("/").split("/"))


# ---------------------------------------------------------------- reading and writing


def write_rows(location: Location, partition: Partition, table: pa.Table) -> None:
    """The scores of a partition; they are there whole or not at all, and again are the same."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    (location / partition.output_name).write(sink.getvalue().to_pybytes())


def _parquet(filesystem: fs.FileSystem, path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, filesystem=filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigurationError(f"{path}: {error}") from error


class ParquetReader:
    """Reads partitions; keeps the last row group, of which the next partition often is too."""

    def __init__(self, filesystem: fs.FileSystem, columns: Sequence[str]) -> None:
        self._filesystem = filesystem
        self._columns = list(columns)
        self._file: tuple[str, pq.ParquetFile] | None = None
        self._group: tuple[tuple[str, int], pa.Table] | None = None

    def read(self, partition: Partition) -> pa.Table:
        """The columns of a partition."""
        metadata = self._opened(partition.file).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        last_row = partition.first_row + partition.num_rows - 1
        first, last = np.searchsorted(ends, [partition.first_row, last_row], side="right")
        groups = [self._row_group(partition.file, group) for group in range(first, last + 1)]
        before = int(ends[first] - sizes[first])
        return pa.concat_tables(groups).slice(partition.first_row - before, partition.num_rows)

    def _opened(self, path: str) -> pq.ParquetFile:
        if self._file is None or self._file[0] != path:
            self._file = path, _parquet(self._filesystem, path)
        return self._file[1]

    def _row_group(self, path: str, group: int) -> pa.Table:
        if self._group is None or self._group[0] != (path, group):
            table = self._opened(path).read_row_group(group, columns=self._columns)
            self._group = (path, group), table
        return self._group[1]
