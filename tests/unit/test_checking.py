"""`check` against the same rules applied to one pair after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fakes import EOS, PAD, START, fake_manifest
from seqloss.bundle.manifest import Manifest, Vocabulary
from seqloss.checking.check import check
from seqloss.errors import InvalidRequestError
from seqloss.records import IGNORE_INDEX, LengthLimits, Ragged, RequestArrays

Loc = tuple[str | int, ...]

LIMITS = LengthLimits(max_source_tokens=4, max_target_tokens=5)
MANIFEST = fake_manifest(
    vocabulary=Vocabulary(source=9, target=7, classes=8, excluded_classes=[(5, 5)])
)
WRONG_IDS = [-1, 7, 8, 9, 2**31 + 3, 2**63 - 1, -(2**63)]


@dataclass(frozen=True)
class Request:
    """What a client sends, as lists."""

    sources: list[list[int]]
    targets: list[list[int]]
    source_index: list[int]
    source_mask: list[list[bool]] | None = None
    target_mask: list[list[bool]] | None = None
    decoder_input_ids: list[list[int]] | None = None
    start_ids: list[int] | None = None
    prefix_lengths: list[int] | None = None
    pad_token_id: int | None = None
    truncation: bool = False

    def arrays(self) -> RequestArrays:
        return RequestArrays(
            source_ids=Ragged.from_rows(self.sources, np.int64),
            target_ids=Ragged.from_rows(self.targets, np.int64),
            source_index=np.array(self.source_index, np.int64),
            source_mask=flat(self.source_mask, np.bool_),
            target_mask=flat(self.target_mask, np.bool_),
            decoder_input_ids=flat(self.decoder_input_ids, np.int64),
            start_ids=None if self.start_ids is None else np.array(self.start_ids, np.int64),
            prefix_lengths=np.array(self.prefix_lengths or [0] * len(self.targets), np.int64),
            pad_token_id=self.pad_token_id,
            truncation=self.truncation,
        )


def flat(rows: list[list[int]] | None, dtype: type[np.generic]) -> np.ndarray | None:
    return None if rows is None else Ragged.from_rows(rows, dtype).values


@dataclass(frozen=True)
class Source:
    """One source of a request: the ids that are attended to."""

    ids: list[int]
    num_cut: int
    has_hole: bool

    @classmethod
    def of(cls, request: Request, index: int) -> Source:
        ids = request.sources[index]
        mask = request.source_mask[index] if request.source_mask else [True] * len(ids)
        end = len(ids)
        while end and (not mask[end - 1] or ids[end - 1] == request.pad_token_id):
            end -= 1
        kept = min(end, LIMITS.max_source_tokens) if request.truncation else end
        return cls(ids[:kept], end - kept, has_hole=mask != sorted(mask, reverse=True))


@dataclass(frozen=True)
class Target:
    """One target of a request: the ids up to the last one that counts."""

    ids: list[int]
    counted: list[bool]
    num_cut: int

    @classmethod
    def of(cls, request: Request, index: int) -> Target:
        ids = request.targets[index]
        counted = [id_ not in (IGNORE_INDEX, request.pad_token_id) for id_ in ids]
        for place in range(len(ids)):
            if request.target_mask and not request.target_mask[index][place]:
                counted[place] = False
            if request.prefix_lengths and place < request.prefix_lengths[index]:
                counted[place] = False
        end = end_of_counted(counted)
        kept = min(end, LIMITS.max_target_tokens) if request.truncation else end
        num_cut = end - kept
        if request.truncation:
            kept = end_of_counted(counted[:kept])
        return cls(ids[:kept], counted[:kept], num_cut)


def end_of_counted(counted: list[bool]) -> int:
    return max((place + 1 for place, flag in enumerate(counted) if flag), default=0)


def is_unknown(id_: int, size: int) -> bool:
    return not 0 <= id_ < size


def reason(request: Request, index: int, vocabulary: Vocabulary) -> tuple[str, Loc] | None:
    """What is wrong with a pair, and where; the first thing that applies."""
    return (
        source_reason(request, request.source_index[index], vocabulary)
        or target_reason(request, index, vocabulary)
        or decoder_reason(request, index, vocabulary)
    )


def source_reason(request: Request, index: int, vocabulary: Vocabulary) -> tuple[str, Loc] | None:
    source = Source.of(request, index)
    if source.has_hole:
        return "source_mask_not_trailing", ("source_mask", index)
    if not source.ids:
        return "empty_source", ("source_ids", index)
    if len(source.ids) > LIMITS.max_source_tokens:
        return "source_too_long", ("source_ids", index)
    for place, id_ in enumerate(source.ids):
        if is_unknown(id_, vocabulary.source):
            return "token_out_of_range", ("source_ids", index, place)
    return None


def target_reason(request: Request, index: int, vocabulary: Vocabulary) -> tuple[str, Loc] | None:
    target = Target.of(request, index)
    if not target.ids:
        return "empty_target", ("target_ids", index)
    if len(target.ids) > LIMITS.max_target_tokens:
        return "target_too_long", ("target_ids", index)
    for place, (id_, counts) in enumerate(zip(target.ids, target.counted, strict=True)):
        is_excluded = any(first <= id_ <= last for first, last in vocabulary.excluded_classes)
        is_wrong = is_unknown(id_, vocabulary.target) or (counts and is_excluded)
        if is_wrong and id_ != IGNORE_INDEX:
            return "token_out_of_range", ("target_ids", index, place)
    return None


def decoder_reason(request: Request, index: int, vocabulary: Vocabulary) -> tuple[str, Loc] | None:
    if request.decoder_input_ids:
        fed = request.decoder_input_ids[index][: len(Target.of(request, index).ids)]
        for place, id_ in enumerate(fed):
            if is_unknown(id_, vocabulary.target):
                return "token_out_of_range", ("decoder_input_ids", index, place)
    elif request.start_ids and is_unknown(request.start_ids[index], vocabulary.target):
        return "token_out_of_range", ("decoder_start_token_id", index)
    return None


def assert_checked_one_by_one(request: Request, manifest: Manifest = MANIFEST) -> None:
    checked = check(request.arrays(), manifest, LIMITS)
    indices = range(len(request.targets))
    reasons = {index: reason(request, index, manifest.vocabulary) for index in indices}
    good = [index for index, why in reasons.items() if why is None]
    targets = [Target.of(request, index) for index in indices]
    sources = [Source.of(request, index) for index in range(len(request.sources))]

    assert checked.rows.tolist() == good
    assert [(fault.index, (fault.code, fault.loc)) for fault in checked.faults] == [
        (index, why) for index, why in reasons.items() if why
    ]
    pairs = checked.pairs
    assert len(pairs) == len(good)
    assert [row.tolist() for row in pairs.labels.rows()] == [
        [PAD if id_ == IGNORE_INDEX else id_ for id_ in targets[index].ids] for index in good
    ]
    assert pairs.counted.tolist() == [flag for index in good for flag in targets[index].counted]
    assert [pairs.sources.row(row).tolist() for row in pairs.source_index] == [
        sources[request.source_index[index]].ids for index in good
    ]
    assert len(pairs.sources) == len({request.source_index[index] for index in good})
    if request.decoder_input_ids is None:
        assert pairs.decoder_input_ids is None
        starts = request.start_ids or [manifest.special_ids.decoder_start] * len(indices)
        assert pairs.start_ids.tolist() == [starts[index] for index in good]
    else:
        assert pairs.decoder_input_ids is not None
        assert pairs.decoder_input_ids.tolist() == [
            id_
            for index in good
            for id_ in request.decoder_input_ids[index][: len(targets[index].ids)]
        ]
    begins = np.cumsum([0, *map(len, request.targets)]).tolist()
    assert checked.counted_positions.tolist() == [
        begins[index] + place
        for index in good
        for place, flag in enumerate(targets[index].counted)
        if flag
    ]
    assert checked.cut_source_tokens.tolist() == [
        sources[index].num_cut for index in request.source_index
    ]
    assert checked.cut_target_tokens.tolist() == [target.num_cut for target in targets]
    if not request.truncation:
        assert checked.num_source_tokens == sum(len(source.ids) for source in sources)
        assert checked.num_target_tokens == sum(len(target.ids) for target in targets)


def same_shape(draw: st.DrawFn, rows: list[list[int]], values: st.SearchStrategy[int]) -> list:
    return [[draw(values) for _ in row] for row in rows]


@st.composite
def any_requests(draw: st.DrawFn) -> Request:
    """Small ones, with every optional field there or not, and few wrong ids among good ones."""
    good = [*range(5), 6] * draw(st.sampled_from([2, 10, 40]))
    source_ids = st.sampled_from([*good, 8, *WRONG_IDS, IGNORE_INDEX])
    target_ids = st.sampled_from([*good, *good, *WRONG_IDS, 5, *[IGNORE_INDEX] * 8])
    fed_ids = st.sampled_from([*good, 5, *WRONG_IDS, IGNORE_INDEX])

    def rows(count: int, lengths: list[int], ids: st.SearchStrategy[int]) -> list[list[int]]:
        sizes = [draw(st.sampled_from(lengths)) for _ in range(count)]
        return [[draw(ids) for _ in range(size)] for size in sizes]

    sources = rows(draw(st.integers(1, 4)), [3, 1, 2, 3, 4, 4, 5, 6, 0], source_ids)
    targets = rows(draw(st.integers(1, 5)), [3, 1, 2, 3, 4, 5, 5, 6, 8, 0], target_ids)

    def maybe(values: list[list[int]] | list[int]) -> list | None:
        return values if draw(st.booleans()) else None

    def trailing_mask(row: list[int]) -> list[bool]:
        attended = draw(st.sampled_from([len(row), *range(len(row) + 1)]))
        return [place < attended for place in range(len(row))]

    any_flag, mostly_set = st.booleans(), st.sampled_from([True] * 4 + [False])
    source_masks = (
        [trailing_mask(row) for row in sources]
        if draw(mostly_set)
        else same_shape(draw, sources, any_flag)
    )
    return Request(
        sources,
        targets,
        source_index=[draw(st.integers(0, len(sources) - 1)) for _ in targets],
        source_mask=maybe(source_masks),
        target_mask=maybe(same_shape(draw, targets, mostly_set)),
        decoder_input_ids=maybe(same_shape(draw, targets, fed_ids)),
        start_ids=maybe([draw(fed_ids) for _ in targets]),
        prefix_lengths=maybe([draw(st.sampled_from([0, 1, 1, 3, 6])) for _ in targets]),
        pad_token_id=draw(st.sampled_from([None, 0, PAD, 6])),
        truncation=draw(st.booleans()),
    )


@settings(max_examples=600)
@given(any_requests())
@example(Request([], [], []))
@example(Request([[3]], [], []))
@example(Request([], [], [], [], [], [], [], [], 0, truncation=True))
def test_all_pairs_at_once_are_as_one_after_the_other(request: Request) -> None:
    assert_checked_one_by_one(request)


@settings(max_examples=50)
@given(any_requests())
def test_a_pair_is_checked_alone_as_among_others(request: Request) -> None:
    request = replace(request, source_mask=None, target_mask=None, decoder_input_ids=None)
    together = check(request.arrays(), MANIFEST, LIMITS)
    reasons = {fault.index: fault.code for fault in together.faults}
    for index, target in enumerate(request.targets):
        alone = replace(
            request,
            sources=[request.sources[request.source_index[index]]],
            targets=[target],
            source_index=[0],
            start_ids=request.start_ids and [request.start_ids[index]],
            prefix_lengths=request.prefix_lengths and [request.prefix_lengths[index]],
        )
        checked = check(alone.arrays(), MANIFEST, LIMITS)
        assert [fault.code for fault in checked.faults] == (
            [reasons[index]] if index in reasons else []
        )


def one_pair(source: list[int], target: list[int], **changes: object) -> Request:
    return Request([source], [target], [0], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "labels", "counted"),
    [
        (one_pair([3], [4, 6, IGNORE_INDEX, IGNORE_INDEX]), [4, 6], [0, 1]),
        (one_pair([3], [4, IGNORE_INDEX, 6]), [4, PAD, 6], [0, 2]),
        (one_pair([3], [4, 0, 6, 0, 0], pad_token_id=0), [4, 0, 6], [0, 2]),
        (one_pair([3], [4, 0, 6, 0, 0]), [4, 0, 6, 0, 0], [0, 1, 2, 3, 4]),
        (one_pair([3], [4, 6, 2], prefix_lengths=[2]), [4, 6, 2], [2]),
        (one_pair([3], [4, 6, 2], target_mask=[[True, True, False]]), [4, 6], [0, 1]),
        (one_pair([3], [4] * 9, truncation=True), [4] * 5, [0, 1, 2, 3, 4]),
        (one_pair([3], [4, 4, 0, 0, 0, 4], pad_token_id=0, truncation=True), [4, 4], [0, 1]),
    ],
)
def test_nothing_is_fed_beyond_the_last_token_that_counts(
    request_: Request, labels: list[int], counted: list[int]
) -> None:
    checked = check(request_.arrays(), MANIFEST, LIMITS)
    assert not checked.faults
    assert checked.pairs.labels.values.tolist() == labels
    assert checked.counted_positions.tolist() == counted
    assert_checked_one_by_one(request_)


@pytest.mark.parametrize(
    ("request_", "attended"),
    [
        (one_pair([3, 0, 4, 0, 0], [6], pad_token_id=0, truncation=True), [3, 0, 4]),
        (one_pair([3, 0, 4, 0], [6]), [3, 0, 4, 0]),
        (one_pair([3, 4, 99], [6], source_mask=[[True, True, False]]), [3, 4]),
        (one_pair([3, 0, 99], [6], source_mask=[[True, True, False]], pad_token_id=0), [3]),
        (one_pair([3, 4, 3, 4, 99], [6], truncation=True), [3, 4, 3, 4]),
    ],
)
def test_only_the_end_of_a_source_is_not_attended_to(
    request_: Request, attended: list[int]
) -> None:
    checked = check(request_.arrays(), MANIFEST, LIMITS)
    assert not checked.faults
    assert checked.pairs.sources.values.tolist() == attended
    assert_checked_one_by_one(request_)


def test_a_pair_with_everything_wrong_has_one_fault() -> None:
    request = one_pair(
        [99, -1, 3, 3, 3, 99],
        [99] * 9,
        source_mask=[[False, True, True, True, True, True]],
        start_ids=[99],
    )
    checked = check(request.arrays(), MANIFEST, LIMITS)
    assert [fault.code for fault in checked.faults] == ["source_mask_not_trailing"]


def test_an_excluded_class_may_be_fed_and_not_predicted() -> None:
    assert_checked_one_by_one(one_pair([5], [5, 4], prefix_lengths=[1]))
    fed = check(one_pair([5], [5, 4], prefix_lengths=[1]).arrays(), MANIFEST, LIMITS)
    assert fed.rows.tolist() == [0]
    (fault,) = check(one_pair([5], [4, 5]).arrays(), MANIFEST, LIMITS).faults
    assert fault.loc == ("target_ids", 0, 1)
    assert "excludes" in fault.detail


def test_sources_that_no_good_pair_uses_are_not_kept() -> None:
    request = Request([[3], [4], [6], [8]], [[2], [99], [2]], source_index=[2, 1, 0])
    pairs = check(request.arrays(), MANIFEST, LIMITS).pairs
    assert [row.tolist() for row in pairs.sources.rows()] == [[3], [6]]
    assert pairs.source_index.tolist() == [1, 0]


@pytest.mark.parametrize("pad_token_id", [-1, IGNORE_INDEX, 9, 2**63])
def test_an_unknown_pad_id_fails_the_whole_request(pad_token_id: int) -> None:
    request = one_pair([3], [4], pad_token_id=pad_token_id)
    with pytest.raises(InvalidRequestError) as caught:
        check(request.arrays(), MANIFEST, LIMITS)
    (fault,) = caught.value.faults
    assert (fault.index, fault.loc) == (None, ("pad_token_id",))


def test_the_model_s_own_start_is_the_default() -> None:
    manifest = fake_manifest()
    request = Request([[3]], [[4, EOS], [5, EOS]], [0, 0])
    assert check(request.arrays(), manifest, LIMITS).pairs.start_ids.tolist() == [START, START]
    assert_checked_one_by_one(request, manifest)
