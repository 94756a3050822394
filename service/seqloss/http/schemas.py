"""The bodies of the wire, and their way into flat arrays and out again.

A body is parsed once, in Rust, straight from bytes (`model_validate_json`), and flattened at once:
no Python code runs per token, and no object is made per pair beyond the lists that parsing makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from seqloss.checking import RequestArrays
from seqloss.errors import Fault, InvalidRequestError, MalformedBodyError
from seqloss.loss.reduce import (
    LabelSmoothing,
    Smoothing,
    aggregate,
    mean_losses,
    perplexities,
)
from seqloss.records import BoolArray, Int64Array, Priority, Ragged
from seqloss.runtime import ScoredRequest, ScoreOptions

PerTokenName = Literal["token_losses", "token_nlls", "token_ranks", "token_entropies"]

# A mask is a list of 0 and 1 or of false and true; pydantic's strict bool takes the latter alone.
_Bit = Annotated[int, Field(ge=0, le=1, strict=True)] | Annotated[bool, Field(strict=True)]
_Ids = list[list[int]]

# For the demo model: a source and two translations, the second one wrong by an hour.
_EXAMPLE: JsonDict = {
    "source_ids": [
        [3, 335, 8, 229, 93, 17, 8, 93, 14, 12, 14, 18, 114, 93, 16, 22, 12, 17, 110, 1],
    ],
    "target_ids": [
        [522, 8, 93, 17, 10, 274, 93, 14, 12, 14, 18, 172, 93, 13, 18, 22, 12, 17, 1],
        [522, 8, 93, 17, 10, 274, 93, 14, 12, 14, 18, 172, 93, 13, 17, 22, 12, 17, 1],
    ],
    "source_index": [0, 0],
    "return": ["token_losses"],
}


class LossRequest(BaseModel):
    """Token ids to score; only `source_ids` and `target_ids` are required.

    The names of a body made by transformers' `DataCollatorForSeq2Seq` are taken too: `input_ids`,
    `attention_mask`, `labels`, and `token_type_ids` where it is all zero.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra={"examples": [_EXAMPLE]}
    )

    model: str | None = Field(None, description="Needed only where several models are served.")
    source_ids: _Ids = Field(
        validation_alias=AliasChoices("source_ids", "input_ids"),
        description="One list of token ids per source; nothing is added or removed.",
    )
    target_ids: _Ids = Field(
        validation_alias=AliasChoices("target_ids", "labels"),
        description="One list of token ids per target; -100 marks positions that do not count.",
    )
    source_index: list[int] | None = Field(
        None, description="The source of each target; without it target i goes with source i."
    )
    source_mask: list[list[_Bit]] | None = Field(
        None,
        validation_alias=AliasChoices("source_mask", "attention_mask"),
        description="Shaped as the sources; it may only cut their ends.",
    )
    target_mask: list[list[_Bit]] | None = Field(
        None, description="Shaped as the targets; 0 where a position does not count."
    )
    token_type_ids: list[list[int]] | None = Field(
        None, description="Some collators send it; taken only if it is all zero."
    )
    pad_token_id: int | None = Field(
        None,
        description="Target positions with this id do not count, and trailing source positions "
        "are not attended to. Never inferred.",
    )
    prefix_length: int | list[int] = Field(
        0, description="Tokens at the beginning of targets that are fed and do not count."
    )
    decoder_start_token_id: int | list[int] | None = Field(
        None, description="The decoder's first input, one or one per target."
    )
    decoder_input_ids: _Ids | None = Field(
        None, description="Used as they are, in place of the shifted targets."
    )
    label_smoothing: float = Field(0.0, ge=0.0, le=1.0)
    smoothing: Smoothing = Field(
        "uniform",
        description="`uniform`: PyTorch and Keras; `uniform_excluding_target`: fairseq.",
    )
    per_token: list[PerTokenName] = Field([], alias="return")
    on_error: Literal["fail", "partial"] = "fail"
    truncation: bool = False
    priority: Priority = "interactive"
    timeout_ms: float | None = Field(None, gt=0)

    def options(self, stream: str) -> ScoreOptions:
        """What the request chooses beside its pairs."""
        return ScoreOptions(
            smoothing=LabelSmoothing(self.label_smoothing, self.smoothing),
            with_ranks_and_entropies=bool({"token_ranks", "token_entropies"} & set(self.per_token)),
            on_error=self.on_error,
            priority=self.priority,
            timeout_seconds=None if self.timeout_ms is None else self.timeout_ms / 1000,
            stream=stream,
        )

    def arrays(self) -> RequestArrays:
        """The pairs, flat.

        Raises:
            InvalidRequestError: counts or shapes that contradict each other; all of them listed.
        """
        return _Flattener(self).arrays()


def parse_loss_request(body: bytes) -> LossRequest:
    """A body to a request.

    Raises:
        MalformedBodyError: it is not JSON.
        InvalidRequestError: it is, and fields are unknown, missing or of the wrong kind.
    """
    try:
        return LossRequest.model_validate_json(body)
    except ValidationError as error:
        # Millions of wrong ids have one cause; the first ones show it.
        faults = [
            Fault(fault["type"], _explained(fault), loc=fault["loc"])
            for fault in error.errors(
                include_url=False, include_context=False, include_input=False
            )[:20]
        ]
        if faults[0].code == "json_invalid":
            raise MalformedBodyError(f"the body is not JSON: {faults[0].detail}") from error
        raise InvalidRequestError(
            f"{error.error_count()} fields of the body are wrong", faults
        ) from error


def _explained(fault: Any) -> str:
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"there is no field {name!r}; is it misspelt, or given under two names?"
    return f"{name}: {fault['msg']}" if name else str(fault["msg"])


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
            "source_index": self._source_index(len(sources), len(targets)),
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
        if request.token_type_ids and any(map(any, request.token_type_ids)):
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

    def _source_index(self, num_sources: int, num_targets: int) -> Int64Array | None:
        index = self._request.source_index
        if index is None:
            if num_sources != num_targets:
                self._fault(
                    "source_ids",
                    f"there are {num_sources} sources and {num_targets} targets; without "
                    "source_index target i goes with source i, and the counts must match",
                )
            return np.arange(num_targets)
        if len(index) != num_targets:
            self._fault(
                "source_index", f"source_index has {len(index)} entries for {num_targets} targets"
            )
            return None
        wrong = [place for place, source in enumerate(index) if not 0 <= source < num_sources]
        for place in wrong:
            self._fault(
                "source_index",
                f"target {place} names source {index[place]}, and there are {num_sources}",
                place,
            )
        return None if wrong else np.array(index, np.int64)

    def _mask(
        self, field: str, mask: list[list[Any]] | None, rows: Ragged, of: str
    ) -> BoolArray | None:
        if mask is None:
            return None
        flat = Ragged.from_rows(mask, np.int64)
        return flat.values.astype(np.bool_) if self._same_shape(field, flat, rows, of) else None

    def _decoder_input_ids(self, ids: _Ids | None, targets: Ragged) -> Int64Array | None:
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
            self._fault(field, "prefix_length is negative")
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


# ---------------------------------------------------------------- replies


class PairErrorBody(BaseModel):
    """Why a target has no loss."""

    index: int
    code: str
    detail: str


class AggregateBody(BaseModel):
    """The request's losses as one number each, in nats; null where nothing counts."""

    loss: float
    nll: float
    num_tokens: int
    num_pairs: int
    mean_loss: float | None = Field(description="Per token: the usual training loss.")
    mean_pair_loss: float | None = Field(description="The mean of the pairs' means.")
    perplexity: float | None = Field(description="exp(nll / num_tokens)")


class UsageBody(BaseModel):
    """What the request cost."""

    source_tokens: int
    target_tokens: int
    encoded_sources: int
    batches: int
    queue_ms: float
    compute_ms: float


class LossReply(BaseModel):
    """One array per quantity, entry i for target i; null for a target that has an error."""

    model: str
    losses: list[float | None]
    nlls: list[float | None]
    num_tokens: list[int]
    mean_losses: list[float | None]
    perplexities: list[float | None]
    token_losses: list[list[float | None] | None] | None = None
    token_nlls: list[list[float | None] | None] | None = None
    token_ranks: list[list[int | None] | None] | None = None
    token_entropies: list[list[float | None] | None] | None = None
    num_truncated_source_tokens: list[int] | None = None
    num_truncated_target_tokens: list[int] | None = None
    errors: list[PairErrorBody]
    aggregate: AggregateBody
    usage: UsageBody


def encode_loss_reply(model: str, request: LossRequest, scored: ScoredRequest) -> bytes:
    """A `LossReply` as JSON: NaN becomes null, numbers are the shortest that round-trip."""
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
    reply["errors"] = [
        {"index": fault.index, "code": fault.code, "detail": fault.detail}
        for fault in scored.faults
    ]
    reply["aggregate"] = aggregate(scores)
    usage = scored.usage
    reply["usage"] = {
        "source_tokens": usage.source_tokens,
        "target_tokens": usage.target_tokens,
        "encoded_sources": usage.encoded_sources,
        "batches": usage.batches,
        "queue_ms": round(usage.queue_seconds * 1000, 3),
        "compute_ms": round(usage.compute_seconds * 1000, 3),
    }
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def _per_token(rows: Ragged, num_tokens: Int64Array) -> list[Any]:
    """One array per target, null for a target without a loss."""
    values: list[Any] = list(rows.rows())
    if rows.values.dtype == np.int32:  # ranks have no NaN to say that a position does not count
        values = [[None if rank < 0 else rank for rank in row.tolist()] for row in values]
    for index in np.flatnonzero(num_tokens == 0):
        values[index] = None
    return values
