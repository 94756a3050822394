"""Token ids as text: a whole block is parsed at once, without a Python object per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from seqloss_client.corpus.errors import BadPair, BadPairs
from seqloss_client.models import Ragged

_LARGEST = 2**31 - 1
# A sign and the ten digits of what 32 bits hold.
_LONGEST_ID = 11
_OTHER, _BLANK, _DIGIT, _MINUS = range(4)
_KINDS = np.full(256, _OTHER, np.uint8)
_KINDS[list(b" \t\n")] = _BLANK
_KINDS[list(b"0123456789")] = _DIGIT
_KINDS[ord("-")] = _MINUS

_MALFORMED = BadPair(
    "malformed_ids", "the ids are neither integers with blanks between them nor a JSON list of them"
)
_OUT_OF_RANGE = BadPair("malformed_ids", "an id is not in the range of 32 bits")


def parse_ids(fields: Sequence[str | list[Any]], bad: BadPairs) -> Ragged:
    """Token ids of every field; those of a bad one mean nothing.

    Args:
        fields: `12 5 9`, `[12, 5, 9]`, or a list.
        bad: gets the fields that hold no ids; those that are there already are left.

    Returns:
        int32. Shape: (len(fields), ragged).
    """
    if all(isinstance(field, str) for field in fields):
        text = "\n".join(map(str, fields))
        if "[" not in text and text.count("\n") == len(fields) - 1:
            return in_range(_parse_text(list(map(str, fields)), bad), bad)
    rows = [_row_of(field, place, bad) for place, field in enumerate(fields)]
    return in_range(Ragged.from_rows(rows), bad)


def in_range(ids: Ragged, bad: BadPairs) -> Ragged:
    """As int32; rows with a value that it does not hold are bad."""
    outside = np.flatnonzero((ids.values > _LARGEST) | (ids.values < -_LARGEST))
    for place in np.unique(np.searchsorted(ids.offsets, outside, side="right") - 1).tolist():
        bad.setdefault(place, _OUT_OF_RANGE)
    return Ragged(ids.values.astype(np.int32), ids.lengths)


def rows_of(ids: Ragged, kept: npt.NDArray[np.bool_]) -> Ragged:
    """Some of the rows. `kept` has the shape (rows,)."""
    return Ragged(ids.values[np.repeat(kept, ids.lengths)], ids.lengths[kept])


def _parse_text(fields: list[str], bad: BadPairs) -> Ragged:
    text = "\n".join([*fields, ""])
    encoded = np.frombuffer(text.encode(), np.uint8)
    ends = np.flatnonzero(encoded == ord("\n"))
    kinds = _KINDS[encoded]
    wrong = _wrong_places(kinds)
    if len(wrong):
        places = np.unique(np.searchsorted(ends, wrong)).tolist()
        for place in places:
            bad.setdefault(place, _MALFORMED)
            fields[place] = ""
        return _parse_text(fields, bad)
    starts = np.flatnonzero(_begins(kinds))
    lengths = np.diff(np.searchsorted(starts, ends), prepend=0)
    values = np.fromstring(text, np.int64, sep=" ") if len(starts) else np.empty(0, np.int64)
    if len(values) != len(starts):
        raise RuntimeError(f"{len(starts)} ids were read as {len(values)}. This is a bug.")
    return Ragged(values, lengths)


def _begins(kinds: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Where a word begins."""
    begins: npt.NDArray[np.bool_] = kinds != _BLANK
    begins[1:] &= kinds[:-1] == _BLANK
    return begins


def _wrong_places(kinds: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Bytes that are no part of an integer, or of one that is too long. The last one is blank."""
    minus = np.flatnonzero(kinds == _MINUS)
    lonely = minus[kinds[minus + 1] != _DIGIT]
    within = minus[~_begins(kinds)[minus]]
    starts = np.flatnonzero(_begins(kinds))
    is_end = (kinds == _BLANK).copy()
    is_end[1:] &= kinds[:-1] != _BLANK
    is_end[0] = False
    too_long = starts[np.flatnonzero(is_end) - starts > _LONGEST_ID]
    return np.concatenate([np.flatnonzero(kinds == _OTHER), lonely, within, too_long])


def _row_of(field: str | list[Any], place: int, bad: BadPairs) -> list[int]:
    """One field's ids, where some are JSON."""
    values: Any = field
    try:
        if isinstance(field, str):
            is_json = field.lstrip().startswith("[")
            values = orjson.loads(field) if is_json else [int(word) for word in _words(field)]
    except ValueError:
        values = None
    if isinstance(values, list) and set(map(type, values)) <= {int}:
        if max(map(abs, values), default=0) <= _LARGEST:
            return values
        bad.setdefault(place, _OUT_OF_RANGE)
    else:
        bad.setdefault(place, _MALFORMED)
    return []


def _words(field: str) -> list[str]:
    """As text without JSON beside it is parsed: what `int` takes beyond that is refused."""
    words = field.split()
    if not all(word.removeprefix("-").isdigit() and word.isascii() for word in words):
        raise ValueError(field)
    return words
