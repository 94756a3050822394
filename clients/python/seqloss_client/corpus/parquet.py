"""Parquet: columns of text or ids in, columns of scores out; the extra `parquet`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from seqloss_client.corpus.blocks import Block, Columns, Digest, RawBlock, block_of
from seqloss_client.corpus.errors import BadPair, BadPairs, CorpusError
from seqloss_client.corpus.lines import MAX_BLOCK_BYTES, MAX_LINE_BYTES
from seqloss_client.corpus.token_ids import in_range
from seqloss_client.models import Ragged

_ROW_GROUP = 2**16
# Pages are read as they are needed: a row group may be larger than the memory.
_BUFFER_BYTES = 2**20


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CorpusError("Parquet needs pyarrow: pip install 'seqloss-client[parquet]'") from error


class ParquetReader:
    """Row i is pair i; only a block of rows is in memory, whatever a row group holds."""

    first_line = 1
    has_header = False

    def __init__(self, path: str, columns: Columns, block_pairs: int) -> None:
        if path == "-":
            raise CorpusError("Parquet has its index at the end: it cannot come from a pipe")
        self._path = path
        self._columns = columns
        self._block_pairs = block_pairs
        self._arrow = _pyarrow("pyarrow")
        parquet = _pyarrow("pyarrow.parquet")
        try:
            self._file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (OSError, self._arrow.ArrowException) as error:
            raise CorpusError(f"{path} cannot be read as Parquet: {error}") from error
        for name in columns.names:
            self._check_column(name)

    @property
    def size(self) -> int | None:
        """Rows."""
        return int(self._file.metadata.num_rows)

    def blocks(self) -> Iterator[RawBlock]:
        """Columns as lists of strings, or as `Ragged` ids, with the rows that are null."""
        digest = Digest()
        num_read = 0
        for sources, targets in self._tables():
            sides = [self._side(column) for column in (sources, targets)]
            num_read += len(sources)
            yield RawBlock(
                num_pairs=len(sources),
                content=tuple(sides),
                num_pairs_read=num_read,
                position=num_read,
                digest=digest.after(*(part for side in sides for part in _bytes_of(*side))),
            )

    def parse(self, raw: RawBlock) -> Block:
        """Makes pairs of a block."""
        bad: BadPairs = {}
        sides: list[Any] = []
        for name, (values, nulls) in zip(self._columns.names, raw.content, strict=True):
            for place in nulls:
                bad.setdefault(place, BadPair("missing_column", f"{name!r} is null in this row"))
            sides.append(in_range(values, bad) if isinstance(values, Ragged) else values)
            if not isinstance(values, Ragged):
                _find_too_long(values, bad)
        sources, targets = sides
        return block_of(raw, sources, targets, self._columns.of_ids, bad)

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def _tables(self) -> Iterator[tuple[Any, Any]]:
        """Pieces of exactly `block_pairs` rows, but for the last, or of fewer that are long."""
        names = list(dict.fromkeys(self._columns.names))
        waiting: Any = None
        try:
            for batch in self._file.iter_batches(self._block_pairs, columns=names):
                table = self._arrow.Table.from_batches([batch])
                waiting = table if waiting is None else self._arrow.concat_tables([waiting, table])
                while waiting.num_rows >= self._block_pairs:
                    yield from self._split(waiting.slice(0, self._block_pairs))
                    waiting = waiting.slice(self._block_pairs)
        except (OSError, self._arrow.ArrowException) as error:
            raise CorpusError(f"{self._path} is damaged: {error}") from error
        if waiting is not None and waiting.num_rows:
            yield from self._split(waiting)

    def _split(self, table: Any) -> Iterator[tuple[Any, Any]]:
        if table.nbytes > MAX_BLOCK_BYTES and table.num_rows > 1:
            middle = table.num_rows // 2
            yield from self._split(table.slice(0, middle))
            yield from self._split(table.slice(middle))
        else:
            source, target = self._columns.names
            yield table[source].combine_chunks(), table[target].combine_chunks()

    def _check_column(self, name: str) -> None:
        schema = self._file.schema_arrow
        if name not in schema.names:
            raise CorpusError(
                f"{self._path} has no column {name!r}; it has {', '.join(map(repr, schema.names))}"
            )
        kind = schema.field(name).type
        types = self._arrow.types
        is_text = _is_text(types, kind)
        is_ids = _is_list(types, kind) and types.is_integer(kind.value_type)
        if not is_text and not (is_ids and self._columns.of_ids):
            wanted = "lists of integers, or text" if self._columns.of_ids else "text"
            hint = "; --ids reads it" if is_ids else ""
            raise CorpusError(
                f"column {name!r} of {self._path} is {kind} and must be {wanted}{hint}"
            )

    def _side(self, column: Any) -> tuple[list[str] | Ragged, list[int]]:
        """Values, and the places of those that are null."""
        nulls = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        if not _is_list(self._arrow.types, column.type):
            return column.fill_null("").to_pylist(), nulls.tolist()
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        flat = column.flatten()
        rows = np.repeat(np.arange(len(lengths)), lengths)
        holes = rows[flat.is_null().to_numpy(zero_copy_only=False)]
        values = flat.fill_null(0).to_numpy(zero_copy_only=False)
        return Ragged(_signed(values), lengths.astype(np.int64)), sorted({*nulls, *holes.tolist()})


def _find_too_long(texts: list[str], bad: BadPairs) -> None:
    """As in a file of lines, so that no pair fills the memory of what comes behind."""
    for place, text in enumerate(texts):
        if len(text) > MAX_LINE_BYTES:
            detail = f"the text has more than {MAX_LINE_BYTES} characters"
            bad.setdefault(place, BadPair("line_too_long", detail))


def _signed(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """What 64 bits with a sign do not hold is out of range all the same."""
    if values.dtype == np.uint64:
        values = np.minimum(values, np.uint64(2**63 - 1))
    return values.astype(np.int64)


def _is_text(types: Any, kind: Any) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_list(types: Any, kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _bytes_of(values: list[str] | Ragged, nulls: list[int]) -> tuple[bytes, ...]:
    rest = orjson.dumps(nulls)
    if isinstance(values, Ragged):
        return values.values.tobytes(), values.lengths.tobytes(), rest
    return orjson.dumps(values), rest


def write_parquet(records: Path, output: Path, record: np.dtype[Any]) -> None:
    """Makes columns of records; NaN becomes null.

    Args:
        records: a file of them, one after the other.
        output: the Parquet file.
        record: what fields they have.
    """
    arrow, parquet = _pyarrow("pyarrow"), _pyarrow("pyarrow.parquet")
    names = record.names or ()
    schema = arrow.schema([(name, arrow.from_numpy_dtype(record[name])) for name in names])
    with records.open("rb") as file, parquet.ParquetWriter(output, schema) as writer:
        while data := file.read(_ROW_GROUP * record.itemsize):
            rows = np.frombuffer(data, record)
            columns = [
                arrow.array(np.ascontiguousarray(rows[name]), from_pandas=True) for name in names
            ]
            writer.write_table(arrow.table(columns, schema=schema))
