"""POST /loss and POST /loss/text: JSON, for requests that are small or strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from seqloss_client._pairs import IdPairs, source_index_of
from seqloss_client._retry import not_ours, read_object
from seqloss_client._steps import Reply
from seqloss_client.models import (
    Aggregate,
    Chunk,
    LossResult,
    PairError,
    Ragged,
    ScoringOptions,
    Usage,
)

_RecordT = TypeVar("_RecordT")

HEADERS = {"Content-Type": "application/json"}


# ---------------------------------------------------------------- requests


def encode_ids(
    pairs: IdPairs, options: ScoringOptions, model: str | None, seconds_left: float | None
) -> bytes:
    """The body of POST /loss."""
    return _dumps(
        _options(options, model, seconds_left)
        | {
            "source_ids": pairs.sources.rows(),
            "target_ids": pairs.targets.rows(),
            "source_index": pairs.source_index,
            "pad_token_id": options.pad_token_id,
            "prefix_length": pairs.prefix_length,
            "decoder_start_token_id": pairs.decoder_start_token_id,
        }
    )


def encode_text(
    chunk: Chunk,
    options: ScoringOptions,
    languages: dict[str, str | None],
    tokens: bool,
    model: str | None,
    seconds_left: float | None,
) -> bytes:
    """The body of POST /loss/text.

    Raises:
        TypeError: something is no string.
        ValueError: a string that is not Unicode, or an option that is about ids.
    """
    _refuse_options_of_ids(options)
    for name, side in (("source", chunk.sources), ("target", chunk.targets)):
        _check_strings(name, side)
    return _dumps(
        _options(options, model, seconds_left)
        | {
            "sources": list(chunk.sources),  # type: ignore[arg-type]  # they are strings
            "targets": list(chunk.targets),  # type: ignore[arg-type]
            "source_index": source_index_of(chunk),
            "tokens": tokens,
        }
        | languages
    )


def _options(
    options: ScoringOptions, model: str | None, seconds_left: float | None
) -> dict[str, Any]:
    return {
        "model": model,
        "label_smoothing": options.label_smoothing,
        "smoothing": options.smoothing,
        "return": list(options.per_token),
        "on_error": options.on_error,
        "truncation": options.truncation,
        "priority": options.priority,
        "reproducible": options.reproducible,
        "timeout_ms": None if seconds_left is None else seconds_left * 1000,
    }


def _dumps(body: dict[str, Any]) -> bytes:
    sent = {name: value for name, value in body.items() if value is not None}
    return orjson.dumps(sent, option=orjson.OPT_SERIALIZE_NUMPY)


def _refuse_options_of_ids(options: ScoringOptions) -> None:
    given = {
        "pad_token_id": options.pad_token_id is not None,
        "prefix_length": not isinstance(options.prefix_length, int) or options.prefix_length != 0,
        "decoder_start_token_id": options.decoder_start_token_id is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{name} is for ids; for strings the tokenizer and languages decide it"
            )


def _check_strings(name: str, texts: Any) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"{name}s are a {type(texts).__name__} and must be a list of strings")
    if set(map(type, texts)) <= {str} and all(map(str.isascii, texts)):
        return
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name} {place} is a {type(text).__name__} and must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} {place} is not Unicode: {error}") from None


# ---------------------------------------------------------------- replies


def read_result(reply: Reply, target_lengths: NDArray[Any] | None) -> LossResult:
    """The reply to POST /loss or POST /loss/text.

    Args:
        reply: with status 200.
        target_lengths: of targets as they were sent, which are the lengths of rows per token; None
            for strings.

    Raises:
        InvalidReply: it is none.
    """
    body = read_object(reply)
    try:
        return _result(body, target_lengths, reply.headers.get("x-request-id"))
    except (KeyError, TypeError, ValueError) as error:
        raise not_ours(reply) from error


def _result(
    body: dict[str, Any], lengths: NDArray[Any] | None, request_id: str | None
) -> LossResult:
    tokens = body.get("target_tokens")
    if tokens is not None:
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    return LossResult(
        model=body["model"],
        losses=np.array(body["losses"], np.float64),  # null becomes NaN
        nlls=np.array(body["nlls"], np.float64),
        num_tokens=np.array(body["num_tokens"], np.int32),
        errors=pair_errors(body["errors"]),
        aggregate=record(Aggregate, body["aggregate"]),
        usage=record(Usage, body["usage"]),
        token_losses=_per_token(body.get("token_losses"), lengths, np.float32),
        token_nlls=_per_token(body.get("token_nlls"), lengths, np.float32),
        token_ranks=_per_token(body.get("token_ranks"), lengths, np.int32),
        token_entropies=_per_token(body.get("token_entropies"), lengths, np.float32),
        num_truncated_source_tokens=_counts(body.get("num_truncated_source_tokens")),
        num_truncated_target_tokens=_counts(body.get("num_truncated_target_tokens")),
        source_tokens=body.get("source_tokens"),
        target_tokens=tokens,
        source_offsets=_offsets(body.get("source_offsets")),
        target_offsets=_offsets(body.get("target_offsets")),
        request_id=request_id,
    )


def pair_errors(errors: list[dict[str, Any]]) -> tuple[PairError, ...]:
    """Why targets have no loss."""
    return tuple(record(PairError, error) for error in errors)


def record(kind: type[_RecordT], body: dict[str, Any]) -> _RecordT:
    """The fields that this client knows; a later service may send more."""
    return kind(**{field.name: body[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _per_token(
    rows: list[list[Any] | None] | None, lengths: NDArray[Any] | None, dtype: type[np.generic]
) -> Ragged | None:
    """Rows with NaN for null, or -1 in integers; a row that is null has the target's length."""
    if rows is None:
        return None
    if lengths is None:
        lengths = np.array([len(row or ()) for row in rows], np.int64)
    filled = (
        [None] * length if row is None else row
        for row, length in zip(rows, lengths.tolist(), strict=True)
    )
    flat = list(chain.from_iterable(filled))
    if np.issubdtype(dtype, np.integer):
        flat = [-1 if entry is None else entry for entry in flat]
    # A shortest decimal goes through float64 on its way to float32.  Rounding twice is rounding
    # once for all but one in some 2**29 of them, such as 7.038531e-26.
    return Ragged(np.array(flat, dtype), lengths)


def _counts(values: list[int] | None) -> NDArray[np.int32] | None:
    return None if values is None else np.array(values, np.int32)


def _offsets(rows: list[list[Any]] | None) -> list[list[tuple[int, int] | None]] | None:
    if rows is None:
        return None
    return [[None if one is None else (one[0], one[1]) for one in row] for row in rows]
