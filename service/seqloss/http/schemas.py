"""The bodies of the wire. They are parsed once, in Rust, straight from bytes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic.config import JsonDict

from seqloss.errors import Fault, InvalidRequestError, MalformedBodyError, RequestTooLargeError
from seqloss.loss.reduce import Smoothing
from seqloss.records import Priority

# Of a name that somebody made up so much is repeated back.
_LONGEST_NAME = 100
# Beyond so many, listing them takes more time and memory than anybody has.
_MOST_FAULTS = 1000
# Fields that are lists of lists.
_NUM_NESTED = 6

_Body = TypeVar("_Body", bound=BaseModel)

PerTokenName = Literal["token_losses", "token_nlls", "token_ranks", "token_entropies"]


class StopAtFirst(FailFast):
    """Of a million wrong entries the first one is shown, and only it costs time and memory."""

    def __hash__(self) -> int:  # unions hash their arms
        return hash(type(self))


Ints = Annotated[list[int], StopAtFirst()]
_Bools = Annotated[list[bool], StopAtFirst()]
TokenIds = Annotated[list[Ints], StopAtFirst()]
# Strict integers are no booleans. A union of lists is decided once, a list of unions per entry.
Mask = TokenIds | Annotated[list[_Bools], StopAtFirst()]

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


class RequestOptions(BaseModel):
    """What a request chooses beside its pairs, whatever these are made of."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = Field(None, description="Needed only where several models are served.")
    label_smoothing: float = Field(
        0.0, ge=0.0, le=1.0, description="Changes `losses` and `token_losses`, never an nll."
    )
    smoothing: Smoothing = Field(
        "uniform",
        description="`uniform`: PyTorch and Keras; `uniform_excluding_target`: fairseq.",
    )
    per_token: list[PerTokenName] = Field(
        [], alias="return", description="Arrays per token to send; others are not computed."
    )
    on_error: Literal["fail", "partial"] = Field(
        "fail",
        description="`fail`: one bad pair fails the request, with all bad ones listed; `partial`: "
        "bad pairs are null and listed in `errors`.",
    )
    truncation: bool = Field(
        False, description="Cut what is too long, and say how many tokens; else it is an error."
    )
    priority: Priority = Field(
        "interactive", description="`bulk` lets interactive requests go first, four in a row."
    )
    reproducible: bool = Field(
        False,
        description="The same request gives the same bits, whatever else the service does. Where "
        "the engine's batches change bits (/models says so), its pairs share batches with no other "
        "request's, and small requests are slower than in company.",
    )
    timeout_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="From the request's arrival; then 504."
    )


class LossRequest(RequestOptions):
    """Token ids to score; only `source_ids` and `target_ids` are required.

    The names of a body made by transformers' `DataCollatorForSeq2Seq` are taken too: `input_ids`,
    `attention_mask`, `labels`, and `token_type_ids` where it is all zero.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    source_ids: TokenIds = Field(
        validation_alias=AliasChoices("source_ids", "input_ids"),
        description="One list of token ids per source; nothing is added or removed.",
    )
    target_ids: TokenIds = Field(
        validation_alias=AliasChoices("target_ids", "labels"),
        description="One list of token ids per target; -100 marks positions that do not count.",
    )
    source_index: Ints | None = Field(
        None, description="The source of each target; without it target i goes with source i."
    )
    source_mask: Mask | None = Field(
        None,
        validation_alias=AliasChoices("source_mask", "attention_mask"),
        description="Shaped as the sources; it may only cut their ends.",
    )
    target_mask: Mask | None = Field(
        None, description="Shaped as the targets; 0 where a position does not count."
    )
    token_type_ids: TokenIds | None = Field(
        None, description="Some collators send it; taken only if it is all zero."
    )
    pad_token_id: int | None = Field(
        None,
        description="Target positions with this id do not count, and trailing source positions "
        "are not attended to. Never inferred.",
    )
    prefix_length: int | Ints = Field(
        0, description="Tokens at the beginning of targets that are fed and do not count."
    )
    decoder_start_token_id: int | Ints | None = Field(
        None, description="The decoder's first input, one or one per target."
    )
    decoder_input_ids: TokenIds | None = Field(
        None, description="Used as they are, in place of the shifted targets."
    )


def parse_loss_request(body: bytes, max_rows: int) -> LossRequest:
    """A body to a request.

    Args:
        body: JSON.
        max_rows: the most rows that a list of lists may have.

    Raises:
        RequestTooLargeError: it has more lists than so many rows can have.
        MalformedBodyError: it is not JSON.
        InvalidRequestError: it is, and fields are unknown, missing or of the wrong kind.
    """
    # Counted before it is parsed: nine million empty lists fit a body, and take five seconds.
    if body.count(b"[") > _NUM_NESTED * (max_rows + 1) + len(LossRequest.model_fields):
        raise RequestTooLargeError(
            f"the request has more than {max_rows} sources or targets; split it"
        )
    return parse_body(LossRequest, body)


def parse_body(kind: type[_Body], body: bytes) -> _Body:
    """JSON to a model of it.

    Raises:
        MalformedBodyError: it is not JSON.
        InvalidRequestError: it is, and fields are unknown, missing or of the wrong kind.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > _MOST_FAULTS:
            raise InvalidRequestError(
                f"{error.error_count()} fields of the body are wrong"
            ) from error
        faults = [
            Fault(fault["type"], _explained(fault), loc=_path(fault["loc"]))
            for fault in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        if faults[0].code == "json_invalid":
            raise MalformedBodyError(f"the body is not JSON: {faults[0].detail}") from error
        raise InvalidRequestError(
            "fields of the body are unknown, missing or of the wrong kind", faults
        ) from error


def _path(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Without the names that pydantic gives to the arms of a union, and without endless names."""
    return tuple(
        step[:_LONGEST_NAME] if isinstance(step, str) else step
        for step in loc
        if isinstance(step, int) or not re.fullmatch(r"(list|int|bool)(\[.*\])?", step)
    )


def _explained(fault: Any) -> str:
    name = ".".join(map(str, _path(fault["loc"])))
    if fault["type"] == "extra_forbidden":
        return f"there is no field {name!r}; is it misspelt, or given under two names?"
    return f"{name}: {fault['msg']}" if name else str(fault["msg"])


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

    source_tokens: int = Field(description="Of all sources that were sent, padding not counted.")
    target_tokens: int = Field(description="Of all targets that were sent, up to what counts last.")
    encoded_sources: int = Field(description="Distinct sources, summed over the batches.")
    batches: int = Field(description="Batches that held targets of the request.")
    queue_ms: float = Field(description="Until the first of them.")
    compute_ms: float = Field(description="Of all of them, other requests' share included.")


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
