"""A dataset in pieces: each is read, scored and written by one worker, whole or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from seqloss.distributed.storage import Location, patiently
from seqloss.errors import ConfigurationError
from seqloss.records import Int64Array

_SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_NEWLINE = ord("\n")
_READ_BYTES = 8 * 1024**2
# What is read of a partition takes some times as much memory, and a worker reads one at a time.
_MOST_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class FileState:
    """A file of a dataset as it was when the dataset was cut.

    Attributes:
        path: as its filesystem knows it.
        num_bytes: its size.
        changed: when, in nanoseconds since 1970; 0 where nobody knows.
    """

    path: str
    num_bytes: int
    changed: int

    def require_unchanged(self, filesystem: fs.FileSystem) -> None:
        """Refuses rows of another file under the same name.

        Raises:
            ConfigurationError: it was changed, or removed.
        """
        (now,) = states_of(filesystem, [self.path])
        if now != self:
            raise ConfigurationError(
                f"{self.path} is not what it was when the run began: it had {self.num_bytes:,} "
                f"bytes and has {now.num_bytes:,}, or was written anew; score the dataset as it is "
                "now into another output"
            )


def states_of(filesystem: fs.FileSystem, paths: Sequence[str]) -> tuple[FileState, ...]:
    """How files are now."""
    # A listing may know times to fractions of a second that these do not have.
    infos = patiently(lambda: filesystem.get_file_info(list(paths)))
    return tuple(FileState(one.path, one.size or 0, one.mtime_ns or 0) for one in infos)


@dataclass(frozen=True, slots=True)
class Partition:
    """Consecutive rows of one file.

    Attributes:
        index: among all.
        file: where they are.
        first_row: within the file.
        num_rows: how many.
        first_byte, num_bytes: where they stand, of lines of JSON; 0 of Parquet.
    """

    index: int
    file: FileState
    first_row: int
    num_rows: int
    first_byte: int = 0
    num_bytes: int = 0

    @classmethod
    def of(cls, read: Mapping[str, Any]) -> Partition:
        """One that was JSON."""
        return cls(**{**read, "file": FileState(**read["file"])})

    def __str__(self) -> str:
        return f"{self.file.path}, rows {self.first_row} to {self.first_row + self.num_rows - 1}"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of a dataset.

    Attributes:
        state: which, and how it was.
        num_rows: how many there are.
        line_starts: where lines of JSON begin, and where the last one ends; None of Parquet. Shape:
            (num_rows + 1,), int64.
        schema: of Parquet.
        groups: of Parquet, the rows and the bytes before each row group, and of all. Shape:
            (2, groups + 1), int64.
    """

    state: FileState
    num_rows: int
    line_starts: Int64Array | None = None
    schema: pa.Schema | None = None
    groups: Int64Array | None = None

    def end(self, first: int, most_rows: int, most_bytes: int) -> int:
        """Behind the last row of a partition that begins with a row; it has one at least."""
        fitting: float = self.num_rows
        if self.line_starts is not None:
            behind = self.line_starts[first] + most_bytes
            fitting = np.searchsorted(self.line_starts, behind, side="right") - 1
        elif self.groups is not None:
            rows, size = self.groups
            fitting = np.interp(np.interp(first, rows, size) + most_bytes, size, rows)
        return max(first + 1, min(first + most_rows, self.num_rows, int(fitting)))


def input_files(location: Location) -> list[str]:
    """The dataset's files, in the order of their names.

    Raises:
        ConfigurationError: there are none, or of another kind, or of two.
    """
    info = location.info
    if info.type == fs.FileType.NotFound:
        raise ConfigurationError(f"there is no {location.path}")
    found = {location.path: info.type}
    if info.type == fs.FileType.Directory:
        found = {
            one.path: one.type
            for one in sorted(location.all_files(), key=lambda one: str(one.path))
            if not _is_hidden(one.path, location.path)
        }
    for path, kind in found.items():
        if kind != fs.FileType.File:
            raise ConfigurationError(
                f"{path} is no file: a link that leads nowhere, or a device; remove it"
            )
    other = [path for path in found if _suffix(path) not in _SUFFIXES]
    if other or not found:
        raise ConfigurationError(
            f"{other[0] if other else location.path}: a dataset is files of .parquet, .jsonl or "
            ".ndjson and nothing else; unpack or convert what is compressed"
        )
    if len({_SUFFIXES[_suffix(path)] for path in found}) > 1:
        raise ConfigurationError(f"{location.path} holds both Parquet and lines of JSON; take one")
    return list(found)


def is_parquet(path: str) -> bool:
    """Whether a file of a dataset is Parquet; else it is lines of JSON."""
    return _SUFFIXES[_suffix(path)] == "parquet"


def survey(
    location: Location, files: Sequence[str], columns: Collection[str]
) -> tuple[InputFile, ...]:
    """Counts rows: from the footers of Parquet, and by reading through lines of JSON.

    Args:
        location: of the dataset.
        files: of `input_files`.
        columns: which are read of Parquet.

    Raises:
        ConfigurationError: a file is broken, was changed meanwhile, or has columns of other types
            than the first.
    """
    states = states_of(location.filesystem, files)
    surveyed = tuple(_surveyed(location.filesystem, state, columns) for state in states)
    first = surveyed[0]
    for file in surveyed:
        if _types(file.schema, columns) != _types(first.schema, columns):
            raise ConfigurationError(
                f"{file.state.path} has other columns than {first.state.path}; make them one"
            )
    return surveyed


def _surveyed(filesystem: fs.FileSystem, state: FileState, columns: Collection[str]) -> InputFile:
    if is_parquet(state.path):
        opened = open_parquet(filesystem, state.path)
        metadata = opened.metadata
        file = InputFile(
            state,
            metadata.num_rows,
            schema=opened.schema_arrow,
            groups=_groups(metadata, columns),
        )
    else:
        starts = patiently(lambda: _line_starts(filesystem, state.path))
        file = InputFile(state, len(starts) - 1, line_starts=starts)
    state.require_unchanged(filesystem)
    return file


def open_parquet(filesystem: fs.FileSystem, path: str) -> pq.ParquetFile:
    """A file, of which the footer is read.

    Raises:
        ConfigurationError: it is broken.
    """
    try:
        return patiently(lambda: pq.ParquetFile(path, filesystem=filesystem))
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigurationError(f"{path}: {error}") from error


def _types(schema: pa.Schema | None, columns: Collection[str]) -> list[tuple[str, str]]:
    found = (field for field in schema or () if field.name in columns)
    return sorted((field.name, str(field.type)) for field in found)


def _groups(metadata: pq.FileMetaData, columns: Collection[str]) -> Int64Array:
    paths = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
    wanted = [
        place
        for place, path in enumerate(paths)
        if any(path == name or path.startswith(f"{name}.") for name in columns)
    ]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    size = [
        sum(group.column(place).total_uncompressed_size for place in wanted) for group in groups
    ]
    return np.cumsum([[0, *rows], [0, *size]], axis=1)


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


def cut(
    files: Sequence[InputFile], rows_each: int, bytes_each: int = _MOST_BYTES
) -> tuple[Partition, ...]:
    """All rows of all files, at most `rows_each` together, or what fits some `bytes_each`."""
    partitions: list[Partition] = []
    for file in files:
        first = 0
        while first < file.num_rows:
            end = file.end(first, rows_each, bytes_each)
            place = (0, 0)
            if file.line_starts is not None:
                begin, behind = (int(file.line_starts[row]) for row in (first, end))
                place = begin, behind - begin
            partitions.append(Partition(len(partitions), file.state, first, end - first, *place))
            first = end
    return tuple(partitions)


def _suffix(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return name[name.rfind(".") :].lower() if "." in name else ""


def _is_hidden(path: str, folder: str) -> bool:
    """As everywhere around Parquet: what begins with a dot or an underscore is no data."""
    return any(part[0] in "._" for part in path[len(folder) :].strip("/").split("/"))
