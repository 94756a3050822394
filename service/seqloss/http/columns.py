"""Lists of the wire to flat arrays, and arrays to JSON: no object is made per pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any

import numpy as np
import orjson

from seqloss.errors import Fault, InvalidRequestError
from seqloss.http.schemas import LossRequest, Mask, RequestOptions, TokenIds
from seqloss.loss.reduce import LabelSmoothing, aggregate, mean_losses, perplexities
from seqloss.records import BoolArray, Int64Array, Ragged, RequestArrays
from seqloss.scorer import ScoredRequest, ScoreOptions


def options_of(request: RequestOptions, stream: str, seconds_since_arrival: float) -> ScoreOptions:
    """What the request chooses beside its pairs."""
    timeout_ms = request.timeout_ms
    return ScoreOptions(
        smoothing=LabelSmoothing(request.label_smoothing, request.smoothing),
        with_ranks_and_entropies=bool({"token_ranks", "token_entropies"} & set(request.per_token)),
        on_error=request.on_error,
        priority=request.priority,
        seconds_left=None if timeout_ms is None else timeout_ms / 1000 - seconds_since_arrival,
        stream=stream,
        reproducible=request.reproducible,
    )


def arrays_of(request: LossRequest) -> RequestArrays:
    """The pairs, flat.

    Raises:
        InvalidRequestError: counts or shapes that contradict each other; all of them listed.
    """
    return _Flattener(request).arrays()


def source_index_of(
    index: list[int] | None, sources: Sized, targets: Sized, fault: Callable[..., None]
) -> Int64Array | None:
    """The source of each target, within range.

    Args:
        index: as it was sent.
        sources: of the request.
        targets: of the request.
        fault: is told what is wrong: the field, a sentence, and the place in the field.

    Returns:
        Shape: (targets,); None where something is wrong.
    """
    num_sources, num_targets = len(sources), len(targets)
    if index is None:
        if num_sources != num_targets:
            fault(
                "source_index",
                f"there are {num_sources} sources and {num_targets} targets; without "
                "source_index target i goes with source i, and the counts must match",
            )
            return None
        return np.arange(num_targets)
    if len(index) != num_targets:
        fault("source_index", f"source_index has {len(index)} entries for {num_targets} targets")
        return None
    wrong = [place for place, source in enumerate(index) if not 0 <= source < num_sources]
    for place in wrong:
        fault(
            "source_index",
            f"target {place} names source {index[place]}, and there are {num_sources}, from 0",
            place,
        )
    return None if wrong else np.array(index, np.int64)


class _Flattener:
    """Turns the lists of a request into arrays and collects what does not fit together."""

    def __init__(self, request: LossRequest) -> None:
        self._request = request
        self._faults: list[Fault] = []

    def arrays(self) -> RequestArrays:
        request = self._request
        sources = _ids(request.source_ids)
        targets = _ids(request.target_ids)
        inputs = request.decoder_input_ids
        arrays = {
            "source_index": source_index_of(request.source_index, sources, targets, self._fault),
            "source_mask": self._mask("source_mask", request.source_mask, sources, "source_ids"),
            "target_mask": self._mask("target_mask", request.target_mask, targets, "target_ids"),
            "decoder_input_ids": self._decoder_input_ids(inputs, targets),
            "start_ids": self._per_target("decoder_start_token_id", len(targets)),
            "prefix_lengths": self._per_target("prefix_length", len(targets)),
        }
        if inputs is not None and request.decoder_start_token_id is not None:
            self._fault(
                "decoder_start_token_id",
                "decoder_input_ids begin with their own start; give one of the two",
            )
        types = request.token_type_ids
        if types is not None:
            self._same_shape("token_type_ids", _ids(types), sources, "source_ids")
        if types is not None and any(map(any, types)):
            self._fault(
                "token_type_ids", "token_type_ids are not all zero; no model here has types"
            )
        if self._faults:
            raise InvalidRequestError("the fields of the body contradict each other", self._faults)
        return RequestArrays(
            source_ids=sources,
            target_ids=targets,
            pad_token_id=request.pad_token_id,
            truncation=request.truncation,
            **arrays,  # type: ignore[arg-type]  # a fault is raised above where one is None
        )

    def _fault(self, field: str, detail: str, *place: int) -> None:
        self._faults.append(Fault("inconsistent", detail, loc=(field, *place)))

    def _mask(self, field: str, mask: Mask | None, rows: Ragged, of: str) -> BoolArray | None:
        if mask is None:
            return None
        flat = _ids(mask)
        if ((flat.values < 0) | (flat.values > 1)).any():
            self._fault(field, f"{field} holds other entries than 0 and 1 or false and true")
        return flat.values.astype(np.bool_) if self._same_shape(field, flat, rows, of) else None

    def _decoder_input_ids(self, ids: TokenIds | None, targets: Ragged) -> Int64Array | None:
        if ids is None:
            return None
        flat = _ids(ids)
        return (
            flat.values
            if self._same_shape("decoder_input_ids", flat, targets, "target_ids")
            else None
        )

    def _same_shape(self, field: str, given: Ragged, rows: Ragged, of: str) -> bool:
        if np.array_equal(given.offsets, rows.offsets):
            return True
        if len(given) != len(rows):
            self._fault(field, f"{field} has {len(given)} rows, {of} has {len(rows)}")
            return False
        for row in np.flatnonzero(given.lengths != rows.lengths):
            self._fault(
                field,
                f"row {row} of {field} has {given.lengths[row]} entries, that of {of} has "
                f"{rows.lengths[row]}",
                int(row),
            )
        return False

    def _per_target(self, field: str, num_targets: int) -> Int64Array | None:
        value = getattr(self._request, field)
        if value is None:
            return None
        if isinstance(value, list) and len(value) != num_targets:
            self._fault(field, f"{field} has {len(value)} entries for {num_targets} targets")
            return None
        values = [value] * num_targets if isinstance(value, int) else value
        if field == "prefix_length" and any(length < 0 for length in values):
            self._fault(field, f"prefix_length is negative: {min(values)}")
        return _ids([values]).values


def _ids(rows: Sequence[Sequence[int]]) -> Ragged:
    """Flat int64; what does not fit becomes the nearest number that does, which no model has."""
    try:
        return Ragged.from_rows(rows, np.int64)
    except OverflowError:
        limits = np.iinfo(np.int64)
        return Ragged.from_rows(
            [[max(limits.min, min(limits.max, number)) for number in row] for row in rows], np.int64
        )


def encode_loss_reply(model: str, request: RequestOptions, scored: ScoredRequest) -> bytes:
    """A `LossReply` as JSON."""
    return encode_reply(loss_reply(model, request, scored))


def encode_reply(reply: dict[str, Any]) -> bytes:
    """JSON: NaN becomes null, numbers are the shortest that round-trip."""
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def loss_reply(model: str, request: RequestOptions, scored: ScoredRequest) -> dict[str, Any]:
    """A `LossReply`, of arrays."""
    scores = scored.scores
    reply: dict[str, Any] = {
        "model": model,
        "losses": scores.losses,
        "nlls": scores.nlls,
        "num_tokens": scores.num_tokens,
        "mean_losses": mean_losses(scores),
        "perplexities": perplexities(scores.nlls, scores.num_tokens),
    }
    for name in request.per_token:
        reply[name] = _per_token(getattr(scores, name), scores.num_tokens)
    if request.truncation:
        reply["num_truncated_source_tokens"] = scored.cut_source_tokens
        reply["num_truncated_target_tokens"] = scored.cut_target_tokens
    reply["errors"] = errors_body(scored)
    reply["aggregate"] = aggregate(scores)
    reply["usage"] = usage_body(scored)
    return reply


def errors_body(scored: ScoredRequest) -> list[dict[str, Any]]:
    """Why some targets have no loss."""
    return [
        {"index": fault.index, "code": fault.code, "detail": fault.detail}
        for fault in scored.faults
    ]


def usage_body(scored: ScoredRequest) -> dict[str, Any]:
    """What the request cost."""
    usage = scored.usage
    return {
        "source_tokens": usage.source_tokens,
        "target_tokens": usage.target_tokens,
        "encoded_sources": usage.encoded_sources,
        "batches": usage.batches,
        "queue_ms": round(usage.queue_seconds * 1000, 3),
        "compute_ms": round(usage.compute_seconds * 1000, 3),
    }


def _per_token(rows: Ragged, num_tokens: Int64Array) -> list[Any]:
    """One array per target, null for a target without a loss."""
    values: list[Any] = list(rows.rows())
    if rows.values.dtype == np.int32:  # ranks have no NaN to say that a position does not count
        values = [[None if rank < 0 else rank for rank in row.tolist()] for row in values]
    for index in np.flatnonzero(num_tokens == 0):
        values[index] = None
    return values
