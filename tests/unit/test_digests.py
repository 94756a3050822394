"""Equal rows have equal digests, and others practically never."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloss.batching import digests
from seqloss.batching.digests import row_digests
from seqloss.records import Ragged

ids = st.integers(0, 3) | st.integers(0, 2**31 - 1)
rows_of_ids = st.lists(st.lists(ids, max_size=6), max_size=12)


def digests_of(rows: list[list[int]], dtype: type[np.generic] = np.int32) -> list[int]:
    found = row_digests(Ragged.from_rows(rows, dtype))
    assert found.dtype == np.int64
    return [int(digest) for digest in found]


@given(rows_of_ids)
def test_digests_are_equal_where_rows_are_and_nowhere_else(rows: list[list[int]]) -> None:
    found = digests_of(rows)
    assert len(found) == len(rows)
    for first, row in zip(found, rows, strict=True):
        for second, other in zip(found, rows, strict=True):
            assert (first == second) == (row == other)


@given(rows_of_ids, st.lists(ids, max_size=6), rows_of_ids)
def test_a_row_has_the_same_digest_among_whatever_others(
    before: list[list[int]], row: list[int], after: list[list[int]]
) -> None:
    assert digests_of([*before, row, *after])[len(before)] == digests_of([row])[0]


@given(st.lists(st.lists(st.integers(-(2**62), 2**62), max_size=3), max_size=6))
def test_entries_may_be_of_64_bits(rows: list[list[int]]) -> None:
    found = digests_of(rows, np.int64)
    assert len(set(found)) == len({tuple(row) for row in rows})


@pytest.mark.parametrize(
    ("one", "other"),
    [([0], [0, 0]), ([], [0]), ([1, 2], [2, 1]), ([1, 0], [1]), ([0, 1], [1]), ([5] * 9, [5] * 8)],
)
def test_zeros_order_and_length_all_count(one: list[int], other: list[int]) -> None:
    first, second = digests_of([one, other])
    assert first != second


def test_no_rows_have_no_digests_and_empty_rows_have_the_same() -> None:
    assert digests_of([]) == []
    empty, full, again = digests_of([[], [1], []])
    assert empty == again != full


def test_rows_longer_than_any_before_leave_the_digests_of_shorter_ones() -> None:
    row = list(range(50))
    before = digests_of([row])
    longer = list(range(len(digests._multipliers) + 100))
    found = digests_of([longer, row, [*longer[:-1], 0], longer])
    assert found[1] == before[0]
    assert found[0] == found[3] != found[2]


def test_hundreds_of_thousands_of_rows_that_differ_in_one_bit_have_digests_of_their_own() -> None:
    count = 200_000
    values = np.stack([np.arange(count), np.zeros(count)], axis=1).astype(np.int32)
    rows = Ragged(values.ravel(), np.arange(count + 1) * 2)
    assert len(np.unique(row_digests(rows))) == count


def test_every_process_has_digests_of_its_own() -> None:
    """Else rows that collide could be prepared, and whoever sends them would slow others down."""
    program = (
        "import numpy as np; from seqloss.batching.digests import row_digests; "
        "from seqloss.records import Ragged; "
        "print(int(row_digests(Ragged.from_rows([[1, 2, 3]], np.int32))[0]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(other.stdout) != digests_of([[1, 2, 3]])[0]
