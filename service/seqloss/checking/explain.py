"""Says in words what is wrong with a pair, and where in the request it stands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqloss.bundle.manifest import Vocabulary
from seqloss.checking.sides import Sources, Targets
from seqloss.errors import Fault
from seqloss.records import LengthLimits, RequestArrays


@dataclass(frozen=True, slots=True)
class Explainer:
    """One method per reason; each takes the index of a target to which it applies."""

    request: RequestArrays
    vocabulary: Vocabulary
    limits: LengthLimits
    sources: Sources
    targets: Targets

    def mask_not_trailing(self, index: int) -> Fault:
        """The mask cuts more than the end of the source."""
        source = self._source(index)
        detail = (
            f"the mask of source {source} masks its beginning or leaves a hole; a source mask may "
            "only cut the end"
        )
        return Fault("source_mask_not_trailing", detail, index, ("source_mask", source))

    def empty_source(self, index: int) -> Fault:
        """There is nothing to attend to."""
        source = self._source(index)
        detail = f"source {source} has no token that is attended to"
        return Fault("empty_source", detail, index, ("source_ids", source))

    def source_too_long(self, index: int) -> Fault:
        """The source is over the limit."""
        source = self._source(index)
        detail = _too_long(
            f"source {source}", int(self.sources.lengths[source]), self.limits.max_source_tokens
        )
        return Fault("source_too_long", detail, index, ("source_ids", source))

    def source_id(self, index: int) -> Fault:
        """The source holds an id that the model has not."""
        source = self._source(index)
        place = int(self.sources.first_bad[source])
        number = int(self.request.source_ids.row(source)[place])
        detail = _unknown(f"source {source}", number, place, self.vocabulary.source)
        return Fault("token_out_of_range", detail, index, ("source_ids", source, place))

    def empty_target(self, index: int) -> Fault:
        """There is nothing to count."""
        detail = (
            f"target {index} has no token that counts: it is empty, or masks, prefix, padding and "
            "truncation leave nothing of it"
        )
        return Fault("empty_target", detail, index, ("target_ids", index))

    def target_too_long(self, index: int) -> Fault:
        """The target is over the limit."""
        detail = _too_long(
            f"target {index}", int(self.targets.lengths[index]), self.limits.max_target_tokens
        )
        return Fault("target_too_long", detail, index, ("target_ids", index))

    def target_id(self, index: int) -> Fault:
        """The target holds an id that the model has not, or cannot predict."""
        place = int(self.targets.first_bad[index])
        number = int(self.request.target_ids.row(index)[place])
        if 0 <= number < self.vocabulary.target:
            detail = (
                f"target {index} has the id {number} at position {place}, which this bundle "
                "excludes from the softmax: the model cannot predict it"
            )
        else:
            detail = _unknown(f"target {index}", number, place, self.vocabulary.target)
        return Fault("token_out_of_range", detail, index, ("target_ids", index, place))

    def decoder_input_id(self, index: int) -> Fault:
        """The given decoder inputs hold an id that the model has not."""
        assert self.request.decoder_input_ids is not None  # noqa: S101 - for mypy; one is wrong
        place = int(self.targets.first_bad_input[index])
        start = self.request.target_ids.offsets[index]
        number = int(self.request.decoder_input_ids[start + place])
        what = f"the decoder input of target {index}"
        detail = _unknown(what, number, place, self.vocabulary.target)
        return Fault("token_out_of_range", detail, index, ("decoder_input_ids", index, place))

    def start_id(self, index: int) -> Fault:
        """The given start id is none that the model has."""
        assert self.request.start_ids is not None  # noqa: S101 - for mypy; one is wrong
        detail = (
            f"decoder_start_token_id of target {index} is {_shown(self.request.start_ids[index])}, "
            f"the vocabulary has {self.vocabulary.target}"
        )
        return Fault("token_out_of_range", detail, index, ("decoder_start_token_id", index))

    def _source(self, index: int) -> int:
        return int(self.request.source_index[index])


def _too_long(what: str, length: int, limit: int) -> str:
    return (
        f"{what} has {length} tokens, and at most {limit} are taken; shorten it, or ask for "
        '"truncation": true'
    )


def _unknown(what: str, number: int, place: int, size: int) -> str:
    return f"{what} has {_shown(number)} at position {place}, the vocabulary has {size}"


def _shown(number: int) -> str:
    """The id, unless it was too long for 64 bits and cut to the nearest number that is not."""
    limits = np.iinfo(np.int64)
    return "an id beyond 63 bits" if number in (limits.min, limits.max) else f"the id {number}"
