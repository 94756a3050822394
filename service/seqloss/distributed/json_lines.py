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
# What reading a line leaves as it is.
_EXACT = (str, int, type(None))


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
    others = [name for name in kept if name not in arrays]
    texts = [
        _texts(each, others, row, line, errors)
        for row, (each, line) in enumerate(zip(rows, lines, strict=True))
    ]
    for place, name in enumerate(others):
        arrays[name] = pa.array([each[place] for each in texts], pa.string())
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


def _texts(
    read: dict[str, Any], names: Sequence[str], row: int, line: bytes, errors: Errors
) -> list[str | None]:
    """A row's kept columns."""
    exact = _as_it_stands(read, names, line)
    texts: list[str | None] = []
    for name in names:
        value = exact.get(name)
        try:
            is_text = value is None or isinstance(value, str)
            texts.append(value if is_text else orjson.dumps(value).decode())
        except orjson.JSONEncodeError:
            errors.setdefault(row, f"malformed_line: {name!r} is nested too deeply to be kept")
            texts.append(None)
    return texts


def _as_it_stands(read: dict[str, Any], names: Sequence[str], line: bytes) -> dict[str, Any]:
    """The same object, with its numbers digit by digit, which a float may not have."""
    if all(isinstance(read.get(name), _EXACT) for name in names):
        return read
    # Integers beyond 64 bits are rare, and to look at each of them costs more than all else.
    for integer in (int, orjson.Fragment):
        try:
            exact: dict[str, Any] = json.loads(line, parse_float=orjson.Fragment, parse_int=integer)
            orjson.dumps([exact.get(name) for name in names])
        except (ValueError, RecursionError, orjson.JSONEncodeError):
            continue
        return exact
    return read
