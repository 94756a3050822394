"""Batches of several requests' pairs against plain lists."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeEngine, fake_nll
from seqloss.batching.collate import collate
from seqloss.batching.jobs import Job, Selection
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


def selection_of(parts: list[tuple[Request, list[int]]], *, all_terms: bool = False) -> Selection:
    return [
        (Job(request.pairs, "bulk", all_terms, 0.0, Mock(), number), np.array(rows, np.int64))
        for number, (request, rows) in enumerate(parts)
    ]


def batch_of(parts: list[tuple[Request, list[int]]]) -> Batch:
    return collate(selection_of(parts)).batch


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
def test_every_pair_keeps_what_belongs_to_it(parts: list[tuple[Request, list[int]]]) -> None:
    collated = collate(selection_of(parts))
    batch, targets = collated.batch, targets_of(collated.batch)
    expected = [request.targets[row] for request, rows in parts for row in rows]
    assert [targets[index] for index in collated.target_of_pair] == expected
    arrays = (batch.sources.values, batch.source_row, batch.decoder_input_ids.values, batch.labels)
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
    assert batch.counted.dtype == np.bool_


@given(any_parts())
def test_equal_pairs_are_one_target(parts: list[tuple[Request, list[int]]]) -> None:
    targets = targets_of(batch_of(parts))
    assert all(target not in targets[:index] for index, target in enumerate(targets))
    assert targets == list(
        {str(one): one for request, rows in parts for one in map(request.targets.__getitem__, rows)}
        .values()
    )  # fmt: skip


@given(any_parts())
def test_sources_are_those_in_use_and_each_is_there_once(
    parts: list[tuple[Request, list[int]]],
) -> None:
    used = {tuple(request.targets[row].source) for request, rows in parts for row in rows}
    there = [tuple(source.tolist()) for source in batch_of(parts).sources.rows()]
    assert sorted(there) == sorted(used)


@given(any_parts(), st.booleans())
def test_terms_find_the_way_back_to_their_pairs(
    parts: list[tuple[Request, list[int]]], all_terms: bool
) -> None:
    selection = selection_of(parts, all_terms=all_terms)
    collated = collate(selection)
    assert collated.batch.with_ranks_and_entropies is all_terms
    collated.scatter(FakeEngine().score(collated.batch))
    for (job, rows), (request, _) in zip(selection, parts, strict=True):
        known = Ragged(job.terms.target_logprob, request.pairs.labels.offsets)
        for row, target in enumerate(request.targets):
            expected = [
                -fake_nll(target.source, fed, label) if counts and row in rows else np.nan
                for fed, label, counts in zip(
                    target.fed, target.labels, target.counted, strict=True
                )
            ]
            np.testing.assert_array_equal(known.row(row), np.array(expected, np.float32))


def test_digests_that_collide_merge_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "seqloss.batching.collate.row_digests", lambda rows: np.zeros(len(rows), np.int64)
    )
    request = request_of([[1], [2]], [0, 1, 0], [[5], [6], [5]], [[True]] * 3, start_ids=[9, 9, 9])
    targets = targets_of(batch_of([(request, [0, 1, 2])]))
    assert targets == request.targets


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
