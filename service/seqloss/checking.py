"""Which pairs of a request can be scored, and what is wrong with the others.

All of it happens on the CPU, over flat arrays, before anything is queued: on a GPU an id out of
range poisons the whole process, and a wrong number is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seqloss.bundle.manifest import Manifest
from seqloss.errors import Fault, InvalidRequestError, PairCode
from seqloss.records import BoolArray, Int64Array, Pairs, Ragged, ranges

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class RequestArrays:
    """A request as it was sent, flat; its shapes are consistent, its values unchecked.

    Attributes:
        source_ids: int64.
        target_ids: int64, `IGNORE_INDEX` where a position is not counted. N rows.
        source_index: the source of each target, within range. Shape: (N,).
        source_mask: aligned with `source_ids.values`; None where all is attended.
        target_mask: aligned with `target_ids.values`; None where all is counted.
        decoder_input_ids: aligned with `target_ids.values`, int64; None where they are the shifted
            targets.
        start_ids: the decoder's first input; None where it is the model's own. Shape: (N,).
        prefix_lengths: tokens at each target's beginning that are fed and not counted. Shape: (N,).
        pad_token_id: an id that is not counted in targets, nor attended at the end of sources.
        truncation: whether what is too long is cut.
    """

    source_ids: Ragged
    target_ids: Ragged
    source_index: Int64Array
    source_mask: BoolArray | None
    target_mask: BoolArray | None
    decoder_input_ids: Int64Array | None
    start_ids: Int64Array | None
    prefix_lengths: Int64Array
    pad_token_id: int | None
    truncation: bool


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """The longest source and target that are taken."""

    max_source_tokens: int
    max_target_tokens: int


@dataclass(frozen=True, slots=True)
class Checked:
    """What can be scored, and why the rest cannot.

    Attributes:
        pairs: the good ones.
        rows: which targets of the request they are. Shape: (len(pairs),).
        counted_positions: where their counted tokens stand among all target tokens as sent,
            ascending. Shape: (K,).
        faults: one for each other target, in the order of the request.
        cut_source_tokens, cut_target_tokens: what truncation removed. Shape: (N,).
        num_source_tokens, num_target_tokens: what the request holds, padding not counted.
    """

    pairs: Pairs
    rows: Int64Array
    counted_positions: Int64Array
    faults: tuple[Fault, ...]
    cut_source_tokens: Int64Array
    cut_target_tokens: Int64Array
    num_source_tokens: int
    num_target_tokens: int


def check(request: RequestArrays, manifest: Manifest, limits: LengthLimits) -> Checked:
    """Applies masks, limits and ranges to all pairs at once.

    Args:
        request: N targets.
        manifest: of the model that shall score them.
        limits: the longest source and target.

    Raises:
        InvalidRequestError: the padding is an id that the model has not.
    """
    _refuse_unknown_pad(request.pad_token_id, manifest)
    sources = _Sources.of(request, manifest, limits)
    targets = _Targets.of(request, manifest, limits)
    reasons = _Reasons(len(request.target_ids))
    of_target = request.source_index
    # The order of these lines is the order of precedence: a pair has one fault.
    reasons.add("source_mask_not_trailing", sources.has_holes[of_target])
    reasons.add("empty_source", sources.lengths[of_target] == 0)
    reasons.add("source_too_long", sources.lengths[of_target] > limits.max_source_tokens)
    reasons.add("token_out_of_range", sources.first_bad[of_target] >= 0)
    reasons.add("empty_target", targets.lengths == 0)
    reasons.add("target_too_long", targets.lengths > limits.max_target_tokens)
    reasons.add("token_out_of_range", targets.first_bad >= 0)
    reasons.add("token_out_of_range", targets.first_bad_input >= 0)
    reasons.add("token_out_of_range", targets.has_bad_start)
    good = np.flatnonzero(reasons.code == 0)
    describe = _Describer(request, manifest, limits, sources, targets)
    return Checked(
        pairs=_pairs(request, manifest, sources, targets, good),
        rows=good,
        counted_positions=np.flatnonzero(
            targets.counted & (reasons.code == 0)[request.target_ids.row_of_value]
        ),
        faults=tuple(
            describe.fault(int(index), reasons.codes[reasons.code[index] - 1])
            for index in np.flatnonzero(reasons.code)
        ),
        cut_source_tokens=sources.num_cut[of_target],
        cut_target_tokens=targets.num_cut,
        num_source_tokens=int(sources.lengths.sum()),
        num_target_tokens=int(targets.lengths.sum()),
    )


def _refuse_unknown_pad(pad_token_id: int | None, manifest: Manifest) -> None:
    size = max(manifest.vocabulary.source, manifest.vocabulary.target)
    if pad_token_id is not None and not 0 <= pad_token_id < size:
        detail = f"pad_token_id {pad_token_id} is not in the vocabulary, which has {size}"
        fault = Fault("token_out_of_range", detail, loc=("pad_token_id",))
        raise InvalidRequestError(detail, [fault])


class _Reasons:
    """The first reason that applies to each target, as an index into `codes` plus one."""

    def __init__(self, num_targets: int) -> None:
        self.code = np.zeros(num_targets, np.int8)
        self.codes: list[PairCode] = []

    def add(self, code: PairCode, applies: BoolArray) -> None:
        self.codes.append(code)
        self.code[(self.code == 0) & applies] = len(self.codes)


@dataclass(frozen=True, slots=True)
class _Sources:
    """Per source: how much of it is attended, and what is wrong with that."""

    lengths: Int64Array
    num_cut: Int64Array
    has_holes: BoolArray
    first_bad: Int64Array

    @classmethod
    def of(cls, request: RequestArrays, manifest: Manifest, limits: LengthLimits) -> _Sources:
        ids = request.source_ids
        attended = np.ones(len(ids.values), np.bool_)
        has_holes = np.zeros(len(ids), np.bool_)
        if request.source_mask is not None:
            attended = request.source_mask
            num_attended = np.bincount(ids.row_of_value[attended], minlength=len(ids))
            has_holes = _length_up_to_last(ids, attended) != num_attended
        if request.pad_token_id is not None:
            attended = attended & (ids.values != request.pad_token_id)
        lengths = _length_up_to_last(ids, attended)
        lengths, num_cut = _cut(lengths, limits.max_source_tokens, request.truncation)
        bad = _out_of_range(ids.values, manifest.vocabulary.source)
        return cls(lengths, num_cut, has_holes, _first(ids, bad, lengths))


@dataclass(frozen=True, slots=True)
class _Targets:
    """Per target: how much of it the model must see, what counts, and what is wrong with it."""

    lengths: Int64Array
    num_cut: Int64Array
    counted: BoolArray
    first_bad: Int64Array
    first_bad_input: Int64Array
    has_bad_start: BoolArray

    @classmethod
    def of(cls, request: RequestArrays, manifest: Manifest, limits: LengthLimits) -> _Targets:
        ids = request.target_ids
        row, place = ids.row_of_value, _place(ids)
        ignored = ids.values == IGNORE_INDEX
        counted = ~ignored & (place >= request.prefix_lengths[row])
        if request.target_mask is not None:
            counted &= request.target_mask
        if request.pad_token_id is not None:
            counted &= ids.values != request.pad_token_id
        # What follows the last counted token influences nothing that is asked for.
        lengths = _length_up_to_last(ids, counted)
        lengths, num_cut = _cut(lengths, limits.max_target_tokens, request.truncation)
        counted &= place < lengths[row]
        if request.truncation:
            lengths = _length_up_to_last(ids, counted)
        vocabulary = manifest.vocabulary
        bad = ~ignored & _out_of_range(ids.values, vocabulary.target)
        if vocabulary.excluded_classes:
            bad |= counted & ~bad & vocabulary.excluded[np.where(counted & ~bad, ids.values, 0)]
        bad_input = np.zeros_like(bad)
        has_bad_start = np.zeros(len(ids), np.bool_)
        if request.decoder_input_ids is not None:
            bad_input = _out_of_range(request.decoder_input_ids, vocabulary.target)
        elif request.start_ids is not None:
            has_bad_start = _out_of_range(request.start_ids, vocabulary.target)
        return cls(
            lengths,
            num_cut,
            counted,
            _first(ids, bad, lengths),
            _first(ids, bad_input, lengths),
            has_bad_start,
        )


def _pairs(
    request: RequestArrays,
    manifest: Manifest,
    sources: _Sources,
    targets: _Targets,
    good: Int64Array,
) -> Pairs:
    used, source_index = np.unique(request.source_index[good], return_inverse=True)
    starts, lengths = request.target_ids.offsets[:-1][good], targets.lengths[good]
    kept = ranges(starts, lengths)
    labels = request.target_ids.values[kept]
    labels = np.where(labels == IGNORE_INDEX, manifest.special_ids.pad, labels)
    start_ids = np.full(len(request.target_ids), manifest.special_ids.decoder_start)
    if request.start_ids is not None:
        start_ids = request.start_ids
    return Pairs(
        sources=_int32(request.source_ids.take(used).truncated(sources.lengths[used])),
        source_index=source_index.astype(np.int32),
        labels=_int32(Ragged(labels, request.target_ids.take(good).truncated(lengths).offsets)),
        counted=targets.counted[kept],
        start_ids=start_ids[good].astype(np.int32),
        decoder_input_ids=(
            None
            if request.decoder_input_ids is None
            else request.decoder_input_ids[kept].astype(np.int32)
        ),
    )


class _Describer:
    """Says in words what is wrong with a target."""

    def __init__(
        self,
        request: RequestArrays,
        manifest: Manifest,
        limits: LengthLimits,
        sources: _Sources,
        targets: _Targets,
    ) -> None:
        self._request = request
        self._vocabulary = manifest.vocabulary
        self._limits = limits
        self._sources = sources
        self._targets = targets

    def fault(self, index: int, code: PairCode) -> Fault:
        source = int(self._request.source_index[index])
        match code:
            case "source_mask_not_trailing":
                detail = (
                    f"the mask of source {source} masks its beginning or leaves a hole; a source "
                    "mask may only cut the end"
                )
                return Fault(code, detail, index, ("source_mask", source))
            case "empty_source":
                detail = f"source {source} has no token that is attended to"
                return Fault(code, detail, index, ("source_ids", source))
            case "source_too_long":
                detail = self._too_long(f"source {source}", self._sources.lengths[source], "source")
                return Fault(code, detail, index, ("source_ids", source))
            case "empty_target":
                detail = f"target {index} has no token that counts"
                return Fault(code, detail, index, ("target_ids", index))
            case "target_too_long":
                detail = self._too_long(f"target {index}", self._targets.lengths[index], "target")
                return Fault(code, detail, index, ("target_ids", index))
            case "token_out_of_range":
                return self._out_of_range(index, source)
            case _:
                raise AssertionError(f"{code} is not found by checking. This is a bug.")

    def _too_long(self, what: str, length: int, side: str) -> str:
        limit = getattr(self._limits, f"max_{side}_tokens")
        return (
            f"{what} has {length} tokens, and at most {limit} are taken; shorten it, or ask for "
            '"truncation": true'
        )

    def _out_of_range(self, index: int, source: int) -> Fault:
        request, vocabulary = self._request, self._vocabulary
        place = int(self._sources.first_bad[source])
        if place >= 0:
            name = request.source_ids.row(source)[place]
            detail = _unknown_id(f"source {source}", name, place, vocabulary.source)
            return Fault("token_out_of_range", detail, index, ("source_ids", source, place))
        place = int(self._targets.first_bad[index])
        if place >= 0:
            name = request.target_ids.row(index)[place]
            detail = _unknown_id(f"target {index}", name, place, vocabulary.target)
            if 0 <= name < vocabulary.target:
                detail = (
                    f"target {index} has the id {name} at position {place}, which this bundle "
                    "excludes from the softmax: the model cannot predict it"
                )
            return Fault("token_out_of_range", detail, index, ("target_ids", index, place))
        place = int(self._targets.first_bad_input[index])
        if place >= 0 and request.decoder_input_ids is not None:
            name = request.decoder_input_ids[request.target_ids.offsets[index] + place]
            what = f"the decoder input of target {index}"
            detail = _unknown_id(what, name, place, vocabulary.target)
            return Fault("token_out_of_range", detail, index, ("decoder_input_ids", index, place))
        assert request.start_ids is not None  # noqa: S101 - what else is out of range?
        detail = (
            f"decoder_start_token_id {request.start_ids[index]} of target {index} is not in the "
            f"vocabulary, which has {vocabulary.target}"
        )
        return Fault("token_out_of_range", detail, index, ("decoder_start_token_id", index))


def _unknown_id(what: str, name: int, place: int, size: int) -> str:
    limits = np.iinfo(np.int64)
    shown = "an id beyond 64 bits" if name in (limits.min, limits.max) else f"the id {name}"
    return f"{what} has {shown} at position {place}, the vocabulary has {size}"


def _out_of_range(ids: NDArray[np.int64], size: int) -> BoolArray:
    return (ids < 0) | (ids >= size)


def _place(rows: Ragged) -> Int64Array:
    """Each value's position in its row. Shape: (total,)."""
    return np.arange(len(rows.values)) - rows.offsets[:-1][rows.row_of_value]


def _length_up_to_last(rows: Ragged, flags: BoolArray) -> Int64Array:
    """One more than the position of the last flagged value of each row, 0 where there is none."""
    lengths = np.zeros(len(rows), np.int64)
    flagged = np.flatnonzero(flags)
    row = rows.row_of_value[flagged]
    lengths[row] = flagged - rows.offsets[:-1][row] + 1  # of several, the last one stays
    return lengths


def _first(rows: Ragged, flags: BoolArray, lengths: Int64Array) -> Int64Array:
    """The position of the first flagged value within each row's length, -1 where there is none."""
    first = np.full(len(rows), -1)
    flagged = np.flatnonzero(flags)[::-1]
    row = rows.row_of_value[flagged]
    place = flagged - rows.offsets[:-1][row]
    within = place < lengths[row]
    first[row[within]] = place[within]  # of several, the last one stays: the first in the row
    return first


def _cut(lengths: Int64Array, limit: int, truncation: bool) -> tuple[Int64Array, Int64Array]:
    """Lengths after truncation, and how many tokens it removed."""
    kept = np.minimum(lengths, limit) if truncation else lengths
    return kept, lengths - kept


def _int32(rows: Ragged) -> Ragged:
    """Narrowed; every value is known to be an id in a vocabulary."""
    return Ragged(rows.values.astype(np.int32), rows.offsets)
