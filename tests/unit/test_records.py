"""Flat rows against plain lists of lists."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seqloss.records import Pairs, Ragged, offsets_of, ranges, shift_right

Rows = list[list[int]]

ids = st.integers(-1000, 1000)
any_rows = st.lists(st.lists(ids, max_size=5), max_size=7)
filled_rows = st.lists(st.lists(ids, min_size=1, max_size=5), max_size=7)


def ragged(rows: Rows) -> Ragged:
    return Ragged.from_rows(rows, np.int32)


def lists(rows: Ragged) -> Rows:
    return [row.tolist() for row in rows.rows()]


@given(any_rows)
@example([])
@example([[]])
@example([[], [1], [], []])
def test_rows_come_back_as_they_were(rows: Rows) -> None:
    flat = ragged(rows)
    assert len(flat) == len(rows)
    assert lists(flat) == rows
    assert [flat.row(index).tolist() for index in range(len(rows))] == rows
    assert flat.values.tolist() == [value for row in rows for value in row]
    assert flat.lengths.tolist() == [len(row) for row in rows]
    assert flat.offsets[0] == 0


@given(any_rows)
@example([])
@example([[], [], [4]])
def test_every_value_knows_its_row(rows: Rows) -> None:
    expected = [index for index, row in enumerate(rows) for _ in row]
    assert ragged(rows).row_of_value.tolist() == expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("rows", [[], [[]], [[1, 2], []]])
def test_values_have_the_given_type_and_offsets_are_int64(
    rows: Rows, dtype: type[np.generic]
) -> None:
    flat = Ragged.from_rows(rows, dtype)
    assert flat.values.dtype == dtype
    assert flat.offsets.dtype == np.int64


@pytest.mark.parametrize(
    ("number", "dtype"), [(2**31, np.int32), (-(2**31) - 1, np.int32), (2**63, np.int64)]
)
def test_a_number_that_does_not_fit_is_refused(number: int, dtype: type[np.generic]) -> None:
    with pytest.raises(OverflowError):
        Ragged.from_rows([[1], [2, number]], dtype)


@given(any_rows, st.data())
def test_take_gives_any_rows_in_any_order_any_number_of_times(
    rows: Rows, data: st.DataObject
) -> None:
    places = st.lists(st.integers(0, len(rows) - 1), max_size=9) if rows else st.just([])
    taken = data.draw(places)
    assert lists(ragged(rows).take(np.array(taken, np.int64))) == [rows[index] for index in taken]


@given(any_rows, st.data())
def test_truncated_keeps_the_beginning_of_every_row(rows: Rows, data: st.DataObject) -> None:
    lengths = [data.draw(st.integers(0, len(row))) for row in rows]
    cut = ragged(rows).truncated(np.array(lengths, np.int64))
    assert lists(cut) == [row[:length] for row, length in zip(rows, lengths, strict=True)]


def test_take_and_truncated_copy() -> None:
    flat = ragged([[1, 2], [3]])
    flat.take(np.array([0, 1])).values[:] = 9
    flat.truncated(np.array([2, 1])).values[:] = 9
    assert lists(flat) == [[1, 2], [3]]


@given(st.lists(st.integers(0, 100), max_size=9))
@example([])
@example([0, 0])
def test_offsets_are_sums_of_what_comes_before(lengths: list[int]) -> None:
    offsets = offsets_of(np.array(lengths, np.int64))
    assert offsets.tolist() == list(accumulate(lengths, initial=0))
    assert offsets.dtype == np.int64


def test_offsets_of_narrow_lengths_do_not_overflow() -> None:
    assert offsets_of(np.full(3, 100, np.int8)).tolist() == [0, 100, 200, 300]


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 6)), max_size=9))
@example([])
@example([(5, 0), (7, 2), (7, 0)])
def test_ranges_are_joined_in_order(spans: list[tuple[int, int]]) -> None:
    starts, lengths = np.array(spans, np.int64).reshape(-1, 2).T
    expected = [number for start, length in spans for number in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == expected


@given(filled_rows, st.data())
@example([], None)
def test_decoder_inputs_are_the_start_and_all_labels_but_the_last(
    rows: Rows, data: st.DataObject | None
) -> None:
    starts = [data.draw(ids) for _ in rows] if data else []
    labels = ragged(rows)
    shifted = shift_right(labels, np.array(starts, np.int32))
    assert lists(shifted) == [[start, *row[:-1]] for start, row in zip(starts, rows, strict=True)]
    assert shifted.values.dtype == np.int32
    assert lists(labels) == rows


def test_pairs_know_the_lengths_of_both_sides() -> None:
    pairs = Pairs(
        sources=ragged([[1, 2, 3], [4]]),
        source_index=np.array([1, 0, 1], np.int32),
        labels=ragged([[5], [6, 7], [8, 9]]),
        counted=np.ones(5, np.bool_),
        start_ids=np.zeros(3, np.int32),
    )
    assert len(pairs) == 3
    assert pairs.source_lengths.tolist() == [1, 3, 1]
    assert pairs.target_lengths.tolist() == [1, 2, 2]
