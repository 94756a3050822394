"""Lines of JSON as an Arrow table; what is wrong with a line is said of that line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson
import pyarrow as pa

from seqloss.distributed.tables import Errors, PairColumns

_IDS = pa.list_(pa.int64())
_LEAST, _GREATEST = -(2**63), 2**63 - 1


def table_of(
    lines: Sequence[bytes], columns: PairColumns, kept: Sequence[str]
) -> tuple[pa.Table, Errors]:
    """One row per line.

    Args:
        lines: without their ends.
        columns: where the pairs are; what is of another type is null, and an error.
        kept: other columns, which become texts: a text as it is, everything else as JSON.
    """
    errors: Errors = {}
    rows = [_object(line, row, errors) for row, line in enumerate(lines)]
    arrays = {
        name: _pair_column([each.get(name) for each in rows], name, errors, is_text=columns.is_text)
        for name in (columns.source, columns.target)
    }
    for name in (name for name in kept if name not in arrays):
        texts = [_text(each, name, row, lines[row], errors) for row, each in enumerate(rows)]
        arrays[name] = pa.array(texts, pa.string())
    return pa.table(arrays), errors


def _object(line: bytes, row: int, errors: Errors) -> dict[str, Any]:
    try:
        read = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        errors[row] = f"malformed_line: {error.msg}, at character {error.pos}"
        return {}
    if not isinstance(read, dict):
        errors[row] = "malformed_line: it is no JSON object"
        return {}
    return read


def _pair_column(values: list[Any], name: str, errors: Errors, *, is_text: bool) -> pa.Array:
    is_right, wanted = (_is_str, "a text") if is_text else (_is_ids, "a list of 64-bit integers")
    for row, value in enumerate(values):
        if not is_right(value):
            wrong = "missing or null" if value is None else f"not {wanted}"
            errors.setdefault(row, f"wrong_type: {name!r} is {wrong}")
            values[row] = None
    return pa.array(values, pa.string() if is_text else _IDS)


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_ids(value: Any) -> bool:
    # By type, since True is an integer to Python, and 2.0 to Arrow.
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= _LEAST and max(value) <= _GREATEST)


def _text(read: dict[str, Any], name: str, row: int, line: bytes, errors: Errors) -> str | None:
    """One that is kept."""
    value = read.get(name)
    if value is None or isinstance(value, str):
        return value
    try:
        if not isinstance(value, int):
            # With its numbers as they stand there: a float has not the digits of each of them.
            read = json.loads(line, parse_float=_as_it_stands, parse_int=_as_it_stands)
            value = read[name]
        return orjson.dumps(value).decode()
    except (orjson.JSONEncodeError, RecursionError):
        errors.setdefault(row, f"malformed_line: {name!r} is nested too deeply to be kept")
        return None


def _as_it_stands(number: str) -> orjson.Fragment:
    return orjson.Fragment(number)
