"""Checks a request as a whole: good pairs out, a fault for each other one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from seqloss.bundle.manifest import Manifest
from seqloss.checking.explain import Explainer
from seqloss.checking.sides import Sources, Targets
from seqloss.errors import Fault, InvalidRequestError
from seqloss.records import (
    IGNORE_INDEX,
    BoolArray,
    Int64Array,
    LengthLimits,
    Pairs,
    Ragged,
    RequestArrays,
    ranges,
)


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
        num_source_tokens, num_target_tokens: what the model would see of all sources and targets,
            bad ones among them.
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
    sources = Sources.of(request, manifest, limits)
    targets = Targets.of(request, manifest, limits)
    reasons = _Reasons(len(request.target_ids))
    of_target = request.source_index
    explain = Explainer(request, manifest.vocabulary, limits, sources, targets)
    # The order of these lines is the order of precedence: a pair has one fault.
    reasons.add(sources.has_holes[of_target], explain.mask_not_trailing)
    reasons.add(sources.lengths[of_target] == 0, explain.empty_source)
    reasons.add(sources.lengths[of_target] > limits.max_source_tokens, explain.source_too_long)
    reasons.add(sources.first_bad[of_target] >= 0, explain.source_id)
    reasons.add(targets.lengths == 0, explain.empty_target)
    reasons.add(targets.lengths > limits.max_target_tokens, explain.target_too_long)
    reasons.add(targets.first_bad >= 0, explain.target_id)
    reasons.add(targets.first_bad_input >= 0, explain.decoder_input_id)
    reasons.add(targets.has_bad_start, explain.start_id)
    is_good = reasons.number == 0
    good = np.flatnonzero(is_good)
    return Checked(
        pairs=_pairs(request, manifest, sources, targets, good),
        rows=good,
        counted_positions=np.flatnonzero(
            targets.counted & is_good[request.target_ids.row_of_value]
        ),
        faults=reasons.faults(),
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
    """The first reason that applies to each target, as a number from 1; 0 where none does."""

    def __init__(self, num_targets: int) -> None:
        self.number = np.zeros(num_targets, np.int8)
        self._explanations: list[Callable[[int], Fault]] = []

    def add(self, applies: BoolArray, explain: Callable[[int], Fault]) -> None:
        self._explanations.append(explain)
        self.number[(self.number == 0) & applies] = len(self._explanations)

    def faults(self) -> tuple[Fault, ...]:
        return tuple(
            self._explanations[self.number[index] - 1](int(index))
            for index in np.flatnonzero(self.number)
        )


def _pairs(
    request: RequestArrays,
    manifest: Manifest,
    sources: Sources,
    targets: Targets,
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


def _int32(rows: Ragged) -> Ragged:
    """Narrowed; every value is known to be an id in a vocabulary."""
    return Ragged(rows.values.astype(np.int32), rows.offsets)
