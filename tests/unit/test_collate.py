"""Batches of several requests' pairs against plain lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloss.batching.collate import Part, collate
from seqloss.records import Batch, Pairs, Ragged


@dataclass(frozen=True)
class Target:
    """One pair as the model shall see it."""

    source: list[int]
    fed: list[int]
    labels: list[int]
    counted: list[bool]


@dataclass(frozen=True)
class Request:
    """Pairs, and the same in plain lists."""

    pairs: Pairs
    targets: list[Target]


def request_of(
    sources: list[list[int]],
    source_index: list[int],
    labels: list[list[int]],
    counted: list[list[bool]],
    *,
    start_ids: list[int],
    fed: list[list[int]] | None = None,
) -> Request:
    """Without `fed`, the decoder is fed its start id and the shifted labels."""
    pairs = Pairs(
        sources=Ragged.from_rows(sources, np.int32),
        source_index=np.array(source_index, np.int32),
        labels=Ragged.from_rows(labels, np.int32),
        counted=np.array([flag for row in counted for flag in row], np.bool_),
        start_ids=np.array(start_ids, np.int32),
        decoder_input_ids=None if fed is None else Ragged.from_rows(fed, np.int32).values,
    )
    shifted = [[start, *row[:-1]] for start, row in zip(start_ids, labels, strict=True)]
    rows = zip(source_index, fed or shifted, labels, counted, strict=True)
    return Request(pairs, [Target(sources[index], *rest) for index, *rest in rows])


@st.composite
def any_request(draw: st.DrawFn, min_pairs: int = 1, max_pairs: int = 5) -> Request:
    """Of few ids, so that many sources are equal, or the beginning of one another."""
    count = draw(st.integers(min_pairs, max_pairs))
    sources = draw(
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=4)
    )
    labels = [
        draw(st.lists(st.integers(3, 40), min_size=1, max_size=draw(st.sampled_from([1, 2, 6]))))
        for _ in range(count)
    ]
    return request_of(
        sources,
        [draw(st.integers(0, len(sources) - 1)) for _ in labels],
        labels,
        [[draw(st.booleans()) for _ in row[:-1]] + [True] for row in labels],
        start_ids=[draw(st.integers(41, 49)) for _ in labels],
        fed=(
            [[draw(st.integers(0, 49)) for _ in row] for row in labels]
            if draw(st.booleans())
            else None
        ),
    )


@st.composite
def any_parts(draw: st.DrawFn) -> list[tuple[Request, list[int]]]:
    """Some rows of each of several requests."""
    parts = []
    for request in draw(st.lists(any_request(), min_size=1, max_size=4)):
        order = draw(st.permutations(range(len(request.targets))))
        parts.append((request, order[: draw(st.integers(1, len(order)))]))
    return parts


def part(request: Request, rows: list[int]) -> Part:
    return Part(request.pairs, np.array(rows, np.int64))


def batch_of(parts: list[tuple[Request, list[int]]]) -> Batch:
    return collate([part(*both) for both in parts], with_ranks_and_entropies=False)


def targets_of(batch: Batch) -> list[Target]:
    fed = batch.decoder_input_ids
    return [
        Target(
            batch.sources.row(batch.source_row[index]).tolist(),
            fed.row(index).tolist(),
            Ragged(batch.labels, fed.offsets).row(index).tolist(),
            Ragged(batch.counted, fed.offsets).row(index).tolist(),
        )
        for index in range(len(fed))
    ]


@given(any_parts())
def test_every_target_keeps_what_belongs_to_it(parts: list[tuple[Request, list[int]]]) -> None:
    batch = batch_of(parts)
    assert targets_of(batch) == [request.targets[row] for request, rows in parts for row in rows]
    arrays = (batch.sources.values, batch.source_row, batch.decoder_input_ids.values, batch.labels)
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
    assert batch.counted.dtype == np.bool_


@given(any_parts())
def test_sources_are_those_in_use_and_each_is_there_once(
    parts: list[tuple[Request, list[int]]],
) -> None:
    used = {tuple(request.targets[row].source) for request, rows in parts for row in rows}
    there = [tuple(source.tolist()) for source in batch_of(parts).sources.rows()]
    assert sorted(there) == sorted(used)


@given(any_parts())
def test_counted_positions_are_in_the_order_of_terms(
    parts: list[tuple[Request, list[int]]],
) -> None:
    batch = batch_of(parts)
    expected = []
    for request, rows in parts:
        begins = np.cumsum([0, *(len(target.labels) for target in request.targets)]).tolist()
        positions = [
            begins[row] + place
            for row in rows
            for place, flag in enumerate(request.targets[row].counted)
            if flag
        ]
        assert part(request, rows).counted_positions.tolist() == positions
        expected += request.pairs.labels.values[positions].tolist()
    assert batch.labels[batch.counted].tolist() == expected


@pytest.mark.parametrize("with_both", [False, True])
def test_what_the_engine_is_asked_for_is_passed_on(with_both: bool) -> None:
    request = request_of([[1]], [0], [[5]], [[True]], start_ids=[9])
    batch = collate([part(request, [0])], with_ranks_and_entropies=with_both)
    assert batch.with_ranks_and_entropies is with_both


def test_equal_sources_of_several_requests_are_one_and_beginnings_stay_apart() -> None:
    first = request_of(
        [[7, 8], [7], [7, 8, 0]], [0, 1, 2], [[5]] * 3, [[True]] * 3, start_ids=[9] * 3
    )
    second = request_of([[7], [7, 8]], [1, 0], [[6]] * 2, [[True]] * 2, start_ids=[9] * 2)
    batch = batch_of([(first, [2, 0, 1]), (second, [0, 1])])
    assert [target.source for target in targets_of(batch)] == [
        *([7, 8, 0], [7, 8], [7]),
        *([7, 8], [7]),
    ]
    assert len(batch.sources) == 3


def test_given_and_shifted_decoder_inputs_share_a_batch() -> None:
    counted = [[True, True]]
    given_inputs = request_of([[1]], [0], [[5, 6]], counted, start_ids=[9], fed=[[30, 31]])
    shifted = request_of([[1]], [0], [[7, 8]], counted, start_ids=[9])
    batch = batch_of([(given_inputs, [0]), (shifted, [0])])
    assert [row.tolist() for row in batch.decoder_input_ids.rows()] == [[30, 31], [9, 7]]
    assert batch.labels.tolist() == [5, 6, 7, 8]
