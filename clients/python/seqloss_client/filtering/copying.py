"""Copies the pairs that are kept, as they stand in the input."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from seqloss_client.corpus.compression import READ_ERRORS, compression_of, decompressed
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus.lines import open_input
from seqloss_client.plain_lines import LineWriter

Keeps = Callable[[int, int], NDArray[np.bool_]]
"""Whether the pairs from the first number until before the second one are kept."""

_PAIRS_AT_A_TIME = 2**16


@dataclass(frozen=True, slots=True)
class Copier:
    """Splits files into what is kept and what is not, in the order of the input.

    Attributes:
        keeps: which pairs are kept.
        num_pairs: how many there are.
        has_header: whether a file's first line is no pair; it goes to both sides.
    """

    keeps: Keeps
    num_pairs: int
    has_header: bool

    def copy_lines(self, path: str, kept: str, rejected: str | None) -> int:
        """A file with a pair, or one side of it, on each line; lines stay the same bytes.

        Returns:
            How many pairs are kept.

        Raises:
            CorpusError: the file has another number of pairs, or cannot be read.
        """
        num_kept = 0
        with ExitStack() as stack:
            lines = stack.enter_context(closing(_lines(path)))
            kept_lines = stack.enter_context(LineWriter(kept))
            rejected_lines = stack.enter_context(LineWriter(rejected)) if rejected else None
            if self.has_header:
                header = next(lines, b"")
                kept_lines.write([header])
                if rejected_lines:
                    rejected_lines.write([header])
            for place, is_kept in enumerate(self._decisions()):
                line = next(lines, None)
                if line is None:
                    raise self._wrong_count(path, f"{place:,}")
                if is_kept:
                    kept_lines.write([line])
                    num_kept += 1
                elif rejected_lines:
                    rejected_lines.write([line])
            if next(lines, None) is not None:
                raise self._wrong_count(path, f"more than {self.num_pairs:,}")
        return num_kept

    def copy_rows(self, path: str, kept: str, rejected: str | None) -> int:
        """As `copy_lines`, for Parquet: all columns, the schema and its metadata stay."""
        parquet = importlib.import_module("pyarrow.parquet")
        num_kept = 0
        with ExitStack() as stack:
            file = stack.enter_context(parquet.ParquetFile(path))
            if file.metadata.num_rows != self.num_pairs:
                raise self._wrong_count(path, f"{file.metadata.num_rows:,}")
            writers = [
                stack.enter_context(_parquet_writer(Path(output), file.schema_arrow))
                for output in (kept, rejected)
                if output
            ]
            start = 0
            for batch in file.iter_batches(_PAIRS_AT_A_TIME):
                mask = self.keeps(start, start + batch.num_rows)
                start += batch.num_rows
                num_kept += int(mask.sum())
                for writer, rows in zip(writers, (mask, ~mask), strict=False):
                    writer.write_batch(batch.filter(rows))
        return num_kept

    def _decisions(self) -> Iterator[bool]:
        for start in range(0, self.num_pairs, _PAIRS_AT_A_TIME):
            stop = min(start + _PAIRS_AT_A_TIME, self.num_pairs)
            yield from self.keeps(start, stop).tolist()

    def _wrong_count(self, path: str, found: str) -> CorpusError:
        return CorpusError(
            f"{path} has {found} pairs, and there are scores for {self.num_pairs:,}: they are of "
            "another input, or of this one with another --header"
        )


def _lines(path: str) -> Generator[bytes, None, None]:
    """Lines with their ends; one is in memory, however long it is."""
    compression = compression_of(path)
    with (
        open_input(path) as raw,
        cast("io.RawIOBase", decompressed(raw, compression)) as stream,
        io.BufferedReader(stream) as lines,
    ):
        try:
            for line in lines:
                yield line if line.endswith(b"\n") else line + b"\n"
        except READ_ERRORS as error:
            raise CorpusError(f"{path} is damaged, or cut off: {error}") from error


@contextmanager
def _parquet_writer(path: Path, schema: Any) -> Iterator[Any]:
    """Writes a file that is there once it is whole."""
    parquet = importlib.import_module("pyarrow.parquet")
    partial = path.with_name(path.name + ".partial")
    try:
        with parquet.ParquetWriter(partial, schema) as writer:
            yield writer
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
