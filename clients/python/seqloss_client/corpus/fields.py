"""What stands in lines: whole lines, and columns of TSV, CSV and JSONL."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from seqloss_client.corpus.errors import BadPair, BadPairs, CorpusError
from seqloss_client.corpus.lines import MAX_LINE_BYTES

Split = Callable[[str], list[str]]
"""A line to its columns; raises ValueError where it is malformed."""

csv.field_size_limit(MAX_LINE_BYTES)


def text_lines(blob: bytes, bad: BadPairs) -> list[str]:
    r"""The lines of a blob as text, without "\n" or "\r\n"; bad ones are empty.

    Args:
        blob: UTF-8; every line has its end.
        bad: gets the lines that are too long or not UTF-8, by place.
    """
    if len(blob) > MAX_LINE_BYTES:
        lines = _decoded_one_by_one(blob, bad)
    else:
        try:
            lines = blob.decode().split("\n")
        except UnicodeDecodeError:
            lines = _decoded_one_by_one(blob, bad)
    lines.pop()
    if b"\r" in blob:
        return [line.removesuffix("\r") for line in lines]
    return lines


def _decoded_one_by_one(blob: bytes, bad: BadPairs) -> list[str]:
    return [_decoded(line, place, bad) for place, line in enumerate(blob.split(b"\n"))]


def _decoded(line: bytes, place: int, bad: BadPairs) -> str:
    if len(line) > MAX_LINE_BYTES:
        bad[place] = BadPair("line_too_long", f"the line has more than {MAX_LINE_BYTES} bytes")
        return ""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        bad[place] = BadPair(
            "not_utf8",
            f"byte {error.start + 1} of the line, {line[error.start]:#04x}, is not UTF-8",
        )
        return ""


# ---------------------------------------------------------------- TSV and CSV


def split_tsv(line: str) -> list[str]:
    """Tabs separate, and nothing is quoted."""
    return line.split("\t")


def split_csv(line: str) -> list[str]:
    """Commas separate, and quotes hold fields together; a row is a line."""
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error


def columns_of(
    lines: list[str], split: Split, columns: Sequence[int], num_columns: int, bad: BadPairs
) -> list[list[str]]:
    """One list per asked column; entries of bad lines are empty.

    Args:
        lines: as `text_lines` returns them.
        split: makes the columns of a line.
        columns: which, from 0.
        num_columns: what every line has; others are bad.
        bad: those that are there already are left.
    """
    rows = [_row(line, place, split, num_columns, bad) for place, line in enumerate(lines)]
    return [[row[column] for row in rows] for column in columns]


def _row(line: str, place: int, split: Split, num_columns: int, bad: BadPairs) -> list[str]:
    try:
        row = split(line)
    except ValueError as error:
        bad.setdefault(place, BadPair("malformed_csv", f"the line is no row of a CSV: {error}"))
    else:
        if len(row) == num_columns:
            return row
        bad.setdefault(
            place,
            BadPair("ragged_row", f"the row has {len(row)} columns in place of {num_columns}"),
        )
    return [""] * num_columns


def column_places(names: Sequence[str], header: list[str] | None, path: str) -> list[int]:
    """Where columns stand, from 0.

    Args:
        names: of the columns, or their numbers from 1.
        header: the names in the file's first line; None where it has no such line.
        path: for error messages.
    """
    return [_column_place(name, header, path) for name in names]


def _column_place(name: str, header: list[str] | None, path: str) -> int:
    if header is not None and name in header:
        if header.count(name) > 1:
            raise CorpusError(f"{path} has {header.count(name)} columns named {name!r}")
        return header.index(name)
    if name.isascii() and name.isdigit() and int(name) > 0:
        return int(name) - 1
    if header is None:
        raise CorpusError(
            f"{name!r} is no number of a column, from 1; with --header columns have names"
        )
    raise CorpusError(f"{path} has no column {name!r}; it has {', '.join(map(repr, header))}")


# ---------------------------------------------------------------- JSONL


def json_fields(
    lines: list[str], keys: Sequence[str], kinds: tuple[type, ...], bad: BadPairs
) -> list[list[Any]]:
    """One list per key; entries of bad lines are empty strings.

    Args:
        lines: each a JSON object.
        keys: which of its fields.
        kinds: what these may be.
        bad: those that are there already are left.
    """
    rows = [_json_row(line, keys, kinds, place, bad) for place, line in enumerate(lines)]
    return [list(column) for column in zip(*rows, strict=True)]


def _json_row(
    line: str, keys: Sequence[str], kinds: tuple[type, ...], place: int, bad: BadPairs
) -> list[Any]:
    empty = [""] * len(keys)
    if place in bad:
        return empty
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        bad[place] = BadPair("malformed_json", f"the line is no JSON: {error}")
        return empty
    if not isinstance(row, dict):
        bad[place] = BadPair("wrong_type", "the line is JSON, but no object")
        return empty
    for key in keys:
        if key not in row:
            bad[place] = BadPair("missing_column", f"the object has no {key!r}")
            return empty
        if not isinstance(row[key], kinds):
            wanted = " or ".join(_JSON_NAMES[kind] for kind in kinds)
            bad[place] = BadPair("wrong_type", f"{key!r} is no {wanted}")
            return empty
    return [row[key] for key in keys]


_JSON_NAMES: dict[type, str] = {str: "string", list: "list"}
