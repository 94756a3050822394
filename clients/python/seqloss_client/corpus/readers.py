"""Readers of lines: two parallel files, and files with columns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Literal

from seqloss_client.corpus.blocks import Block, Columns, Digest, RawBlock, Reader, block_of
from seqloss_client.corpus.errors import BadPairs, CorpusError
from seqloss_client.corpus.fields import (
    Split,
    column_places,
    columns_of,
    json_fields,
    split_csv,
    split_tsv,
    text_lines,
)
from seqloss_client.corpus.lines import LineSource

InputFormat = Literal["tsv", "csv", "jsonl", "parquet"]


class ParallelReader:
    """Line i of one file is the source of line i of the other; both have as many lines."""

    first_line = 1
    has_header = False

    def __init__(self, source: str, target: str, block_pairs: int, of_ids: bool) -> None:
        with ExitStack() as opened:
            self._files = tuple(
                opened.enter_context(closing(LineSource(path))) for path in (source, target)
            )
            opened.pop_all()
        self._block_pairs = block_pairs
        self._of_ids = of_ids

    @property
    def size(self) -> int | None:
        """Of both files."""
        sizes = [file.size for file in self._files]
        return None if None in sizes else sum(filter(None, sizes))

    def blocks(self) -> Iterator[RawBlock]:
        """Raises CorpusError where one file ends before the other."""
        digest = Digest()
        source, target = self._files
        while True:
            counts = [file.fill(self._block_pairs) for file in self._files]
            num_pairs = min(counts)
            if num_pairs == 0:
                if any(counts):
                    raise CorpusError(
                        f"{source.path} has {source.num_lines()} lines and {target.path} has "
                        f"{target.num_lines()}: line i of one must be that of the other"
                    )
                return
            blobs = [file.take(num_pairs) for file in self._files]
            yield RawBlock(
                num_pairs=num_pairs,
                content=tuple(blobs),
                num_pairs_read=source.num_taken,
                position=sum(file.position for file in self._files),
                digest=digest.after(*blobs),
            )

    def parse(self, raw: RawBlock) -> Block:
        """Makes pairs of a block."""
        bad: BadPairs = {}
        sources, targets = (text_lines(blob, bad) for blob in raw.content)
        return block_of(raw, sources, targets, self._of_ids, bad)

    def close(self) -> None:
        """Lets go of both files."""
        for file in self._files:
            file.close()


class _LinesReader:
    """A file whose lines hold both sides."""

    def __init__(self, path: str, block_pairs: int) -> None:
        self.first_line = 1
        self.has_header = False
        self._file = LineSource(path)
        self._block_pairs = block_pairs

    @property
    def size(self) -> int | None:
        """The file's."""
        return self._file.size

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def blocks(self) -> Iterator[RawBlock]:
        """All lines but the header."""
        digest = Digest()
        while num_pairs := self._file.fill(self._block_pairs):
            blob = self._file.take(num_pairs)
            yield RawBlock(
                num_pairs=num_pairs,
                content=(blob,),
                num_pairs_read=self._file.num_taken - self.first_line + 1,
                position=self._file.position,
                digest=digest.after(blob),
            )


class ColumnsReader(_LinesReader):
    """TSV or CSV: a pair a line, and every line with as many columns."""

    def __init__(self, path: str, split: Split, columns: Columns, block_pairs: int) -> None:
        super().__init__(path, block_pairs)
        self._split = split
        self._of_ids = columns.of_ids
        with ExitStack() as opened:
            opened.callback(self.close)
            header = self._header() if columns.has_header else None
            self._places = column_places(columns.names, header, path)
            self._num_columns = None if header is None else len(header)
            if self._num_columns is not None:
                self._check_places()
            opened.pop_all()

    def blocks(self) -> Iterator[RawBlock]:
        """Without a header the first good line says how many columns there are."""
        for raw in super().blocks():
            if self._num_columns is None:
                self._num_columns = self._count_columns(raw.content[0])
                self._check_places()
            yield raw

    def parse(self, raw: RawBlock) -> Block:
        """Makes pairs of a block."""
        if self._num_columns is None:
            raise RuntimeError("a block is parsed before it is read. This is a bug.")
        bad: BadPairs = {}
        lines = text_lines(raw.content[0], bad)
        sources, targets = columns_of(lines, self._split, self._places, self._num_columns, bad)
        return block_of(raw, sources, targets, self._of_ids, bad)

    def _header(self) -> list[str]:
        if not self._file.fill(1):
            raise CorpusError(f"{self._file.path} is empty; it should have a header")
        bad: BadPairs = {}
        (line,) = text_lines(self._file.take(1), bad)
        try:
            if bad:
                raise ValueError(bad[0].detail)
            header = self._split(line)
        except ValueError as error:
            raise CorpusError(f"the header of {self._file.path} cannot be read: {error}") from error
        self.first_line = 2
        self.has_header = True
        return header

    def _count_columns(self, blob: bytes) -> int:
        bad: BadPairs = {}
        for place, line in enumerate(text_lines(blob, bad)):
            with suppress(ValueError):
                if place not in bad:
                    return len(self._split(line))
        return max(self._places) + 1

    def _check_places(self) -> None:
        if max(self._places) >= (self._num_columns or 0):
            raise CorpusError(
                f"{self._file.path} has {self._num_columns} columns, and none with the number "
                f"{max(self._places) + 1}"
            )


class JsonReader(_LinesReader):
    """JSONL: an object a line; others of its fields are ignored."""

    def __init__(self, path: str, columns: Columns, block_pairs: int) -> None:
        super().__init__(path, block_pairs)
        self._columns = columns

    def parse(self, raw: RawBlock) -> Block:
        """Makes pairs of a block."""
        bad: BadPairs = {}
        of_ids = self._columns.of_ids
        kinds: tuple[type, ...] = (list, str) if of_ids else (str,)
        lines = text_lines(raw.content[0], bad)
        sources, targets = json_fields(lines, self._columns.names, kinds, bad)
        return block_of(raw, sources, targets, of_ids, bad)


def open_columns(
    path: str, input_format: InputFormat, columns: Columns, block_pairs: int
) -> Reader:
    """The reader of a file with columns."""
    if input_format == "parquet":
        from seqloss_client.corpus.parquet import ParquetReader  # noqa: PLC0415 - an extra

        return ParquetReader(path, columns, block_pairs)
    if input_format == "jsonl":
        return JsonReader(path, columns, block_pairs)
    split = split_csv if input_format == "csv" else split_tsv
    return ColumnsReader(path, split, columns, block_pairs)
