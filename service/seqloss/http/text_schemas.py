"""The bodies of /loss/text, and what becomes of them."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from seqloss.errors import Fault, InvalidRequestError, RequestTooLargeError
from seqloss.http.columns import encode_reply, loss_reply, source_index_of
from seqloss.http.schemas import Ints, LossReply, RequestOptions, StopAtFirst, parse_body
from seqloss.records import Int64Array, RequestArrays
from seqloss.scorer import ScoredRequest
from seqloss.tokenization.encoded import EncodedTexts
from seqloss.tokenization.encoder import EncodedPairs, TextPairs

_Texts = Annotated[list[str], StopAtFirst()]

# Of ids, by that of the texts that they are made of.
_FIELDS: dict[str | int, str] = {"source_ids": "sources", "target_ids": "targets"}

# For the demo model: a source and two translations, the second one wrong by an hour.
_EXAMPLE: JsonDict = {
    "sources": ["Thursday, March 5, 2026 at 4:05 PM"],
    "targets": ["Donnerstag, 5. März 2026 um 16:05", "Donnerstag, 5. März 2026 um 15:05"],
    "source_index": [0, 0],
    "target_language": "de",
    "return": ["token_losses"],
}


class TextRequest(RequestOptions):
    """Texts to score; `sources` and `targets` are required, and languages where a model has them.

    The model's tokenizer makes the ids, as it made them for training; `truncation` and the limits
    on lengths are of tokens.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    sources: _Texts = Field(
        description="As they are: a prefix that the model was trained with, such as T5's "
        "`translate English to German: `, is a part of the text."
    )
    targets: _Texts = Field(description="As they are.")
    source_index: Ints | None = Field(
        None, description="The source of each target; without it target i goes with source i."
    )
    source_language: str | None = Field(
        None, description="Of all sources, where the model is told; `/models` lists the names."
    )
    target_language: str | None = Field(
        None,
        description="Of all targets, likewise. For a model whose sources begin with a tag, such as "
        "`>>de<<`, it puts the tag there; without it the sources bring their own.",
    )
    tokens: bool = Field(True, description="Whether to send tokens and where they stand.")


class TextReply(LossReply):
    """A reply to ids, and the tokens that texts were made into: those are what has losses."""

    source_tokens: list[list[str]] | None = Field(None, description="One list per source.")
    source_offsets: list[list[tuple[int, int] | None]] | None = Field(
        None,
        description="Where each token begins and ends, in characters (code points) of the source; "
        "null for a token that stands for none of them, such as `</s>`.",
    )
    target_tokens: list[list[str]] | None = Field(
        None, description="One list per target, aligned with what is sent per token."
    )
    target_offsets: list[list[tuple[int, int] | None]] | None = Field(
        None, description="As `source_offsets`, of the targets."
    )


def parse_text_request(body: bytes, max_rows: int) -> tuple[TextRequest, Int64Array]:
    """A body to a request, and the source of each target.

    Args:
        body: JSON.
        max_rows: the most sources, and the most targets.

    Raises:
        RequestTooLargeError: it has more.
        MalformedBodyError: it is not JSON.
        InvalidRequestError: it is, and fields are unknown, missing, of the wrong kind, or
            contradict each other.
    """
    request = parse_body(TextRequest, body)
    # Before they are encoded, which takes far longer than all that is done with ids.
    for name, texts in (("sources", request.sources), ("targets", request.targets)):
        if len(texts) > max_rows:
            raise RequestTooLargeError(
                f"the request has {len(texts)} {name}, and at most {max_rows} are taken; split it"
            )
    faults: list[Fault] = []

    def fault(field: str, detail: str, *place: int) -> None:
        faults.append(Fault("inconsistent", detail, loc=(field, *place)))

    index = source_index_of(request.source_index, request.sources, request.targets, fault)
    if index is None:
        raise InvalidRequestError("the fields of the body contradict each other", faults)
    return request, index


def texts_of(request: TextRequest) -> TextPairs:
    """What is to be encoded."""
    return TextPairs(
        request.sources, request.targets, request.source_language, request.target_language
    )


def arrays_of(request: TextRequest, index: Int64Array, pairs: EncodedPairs) -> RequestArrays:
    """The pairs, flat, as if they had been sent as ids."""
    num_targets = len(request.targets)
    return RequestArrays(
        source_ids=pairs.sources.ids,
        target_ids=pairs.targets.ids,
        source_index=index,
        source_mask=None,
        target_mask=None,
        decoder_input_ids=None,
        start_ids=None if pairs.start_id is None else np.full(num_targets, pairs.start_id),
        prefix_lengths=np.full(num_targets, pairs.prefix_length),
        pad_token_id=None,
        truncation=request.truncation,
    )


def of_texts(error: InvalidRequestError) -> InvalidRequestError:
    """What is wrong with ids, at the places of the texts that they were made of."""
    return InvalidRequestError(error.detail, [_of_text(fault) for fault in error.faults])


def _of_text(fault: Fault) -> Fault:
    if fault.loc and (field := _FIELDS.get(fault.loc[0])):
        return Fault(fault.code, fault.detail, fault.index, (field, *fault.loc[1:2]))
    return fault


def encode_text_reply(
    model: str, request: TextRequest, pairs: EncodedPairs, scored: ScoredRequest
) -> bytes:
    """A `TextReply` as JSON."""
    reply = loss_reply(model, request, scored)
    if request.tokens:
        reply |= _tokens("source", pairs.sources) | _tokens("target", pairs.targets)
    return encode_reply(reply)


def _tokens(side: str, texts: EncodedTexts) -> dict[str, Any]:
    return {f"{side}_tokens": texts.tokens, f"{side}_offsets": texts.spans}
