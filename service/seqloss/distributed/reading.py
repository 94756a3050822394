"""Partitions are read as the dataset was when it was cut, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from seqloss.distributed import json_lines
from seqloss.distributed.partitions import Partition, is_parquet, open_parquet
from seqloss.distributed.storage import patiently
from seqloss.distributed.tables import Errors, PairColumns
from seqloss.errors import ConfigurationError


class PartitionReader:
    """Reads one after the other."""

    def __init__(
        self, filesystem: fs.FileSystem, columns: PairColumns, kept: Sequence[str]
    ) -> None:
        """Reads nothing yet.

        Args:
            filesystem: of the dataset.
            columns: where the pairs are.
            kept: other columns that are wanted.
        """
        self._filesystem = filesystem
        self._columns = columns
        self._kept = kept
        self._parquet = ParquetReader(filesystem, columns.names(kept))

    def read(self, partition: Partition) -> tuple[pa.Table, Errors]:
        """Its rows, and what is wrong with some of them.

        Raises:
            ConfigurationError: it cannot be read, or its file was changed since it was cut.
        """
        partition.file.require_unchanged(self._filesystem)
        try:
            table, errors = patiently(lambda: self._read(partition))
        except (pa.ArrowException, OSError) as error:
            partition.file.require_unchanged(self._filesystem)
            raise ConfigurationError(
                f"{partition}: they cannot be read, since the file is broken or its store does not "
                f"answer: {error}"
            ) from error
        partition.file.require_unchanged(self._filesystem)
        if len(table) != partition.num_rows:
            raise ConfigurationError(
                f"{partition}: {len(table)} rows are there; the file was changed since it was cut"
            )
        return table, errors

    def _read(self, partition: Partition) -> tuple[pa.Table, Errors]:
        if is_parquet(partition.file.path):
            return self._parquet.read(partition), {}
        lines = read_lines(self._filesystem, partition)
        return json_lines.table_of(lines, self._columns, self._kept)


def read_lines(filesystem: fs.FileSystem, partition: Partition) -> list[bytes]:
    """The lines of a partition of lines of JSON."""
    with filesystem.open_input_file(partition.file.path) as file:
        lines = bytes(file.read_at(partition.num_bytes, partition.first_byte))
    return lines.removesuffix(b"\n").split(b"\n")


class ParquetReader:
    """Reads partitions; keeps the last row group, of which the next partition often is too."""

    def __init__(self, filesystem: fs.FileSystem, columns: Sequence[str]) -> None:
        self._filesystem = filesystem
        self._columns = list(columns)
        self._file: tuple[str, pq.ParquetFile] | None = None
        self._group: tuple[tuple[str, int], pa.Table] | None = None

    def read(self, partition: Partition) -> pa.Table:
        """The columns of a partition."""
        path = partition.file.path
        metadata = self._opened(path).metadata
        last_row = partition.first_row + partition.num_rows - 1
        if last_row >= metadata.num_rows:
            raise pa.ArrowInvalid(f"the file has {metadata.num_rows} rows")
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        first, last = np.searchsorted(ends, [partition.first_row, last_row], side="right")
        groups = [self._row_group(path, group) for group in range(first, last + 1)]
        before = int(ends[first] - sizes[first])
        return pa.concat_tables(groups).slice(partition.first_row - before, partition.num_rows)

    def _opened(self, path: str) -> pq.ParquetFile:
        if self._file is None or self._file[0] != path:
            self._file = path, open_parquet(self._filesystem, path)
        return self._file[1]

    def _row_group(self, path: str, group: int) -> pa.Table:
        if self._group is None or self._group[0] != (path, group):
            try:
                table = self._opened(path).read_row_group(group, columns=self._columns)
            except OSError:
                self._file = None  # its connection may be what is broken
                raise
            self._group = (path, group), table
        return self._group[1]
