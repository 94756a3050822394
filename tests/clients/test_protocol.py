"""What the client says and how it reads replies, without a service."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from conversations import (
    AGGREGATE,
    USAGE,
    FakeTime,
    converse,
    json_reply,
    problem,
    read_tensors,
    tensors_reply,
)
from seqloss_client import Aggregate, Chunk, PairError, Ragged, ScoringOptions, Usage, errors
from seqloss_client._protocol import JSON_UP_TO, HowToScore, Protocol
from seqloss_client._steps import Lost, Reply, Request
from seqloss_client.models import Options

SMALL = Chunk([[5, 6, 7], [8, 2]], [[1, 2], [3, 4]])
JSON_REPLY = {
    "model": "fake",
    "losses": [3.5, None],
    "nlls": [3.25, None],
    "num_tokens": [4, 0],
    "mean_losses": [0.875, None],
    "perplexities": [None, None],
    "token_losses": [[1.5, None], None],
    "token_ranks": [[7, None], None],
    "errors": [{"index": 1, "code": "token_out_of_range", "detail": "too large"}],
    "aggregate": AGGREGATE,
    "usage": USAGE,
}


def protocol(model: str | None = "fake", time: FakeTime | None = None, **headers: str) -> Protocol:
    timing = (time or FakeTime()).timing
    return Protocol(
        "http://host:1/", model=model, headers=headers, retries=5, reply_seconds=60, timing=timing
    )


def how(**options: Any) -> HowToScore:
    return HowToScore(ScoringOptions(**options))


def large_chunk() -> Chunk:
    """Just over what JSON is for."""
    values = np.arange(JSON_UP_TO)
    return Chunk(Ragged(values, np.array([len(values) - 3, 3])), [[9], [10, -100]])


def large_reply(**more: tuple[str, list[float]]) -> Reply:
    outputs: dict[str, tuple[str, list[float]]] = {
        "loss": ("FP64", [3.5, math.nan]),
        "nll": ("FP64", [3.25, math.nan]),
        "num_tokens": ("INT32", [4, 0]),
    }
    pair_errors = json.dumps(JSON_REPLY["errors"])
    return tensors_reply(
        outputs | more, errors=pair_errors, aggregate=json.dumps(AGGREGATE), **USAGE
    )


def sent(chunk: Chunk, **options: Any) -> Request:
    """The request for a chunk."""
    talk = converse(protocol().loss(chunk, how(**options)), [])
    assert talk.error is None, talk.error
    return talk.attempts[0].request


# ---------------------------------------------------------------- requests


def test_a_small_request_is_json() -> None:
    request = sent(SMALL)
    assert (request.method, request.url) == ("POST", "http://host:1/loss")
    assert request.headers["Content-Type"] == "application/json"
    body = json.loads(request.body)
    assert body["source_ids"] == [[5, 6, 7], [8, 2]]
    assert body["target_ids"] == [[1, 2], [3, 4]]
    assert body["model"] == "fake"
    assert "timeout_ms" not in body


def test_options_are_named_as_the_service_names_them() -> None:
    chunk = dataclasses.replace(SMALL, source_index=np.array([1, 0]))
    body = json.loads(
        sent(
            chunk,
            label_smoothing=0.25,
            smoothing="uniform_excluding_target",
            per_token=["token_ranks"],
            on_error="partial",
            truncation=True,
            priority="bulk",
            timeout=1.5,
            reproducible=True,
            pad_token_id=1,
            prefix_length=[0, 1],
            decoder_start_token_id=np.int32(7),
        ).body
    )
    del body["source_ids"], body["target_ids"]
    assert body == {
        "model": "fake",
        "source_index": [1, 0],
        "label_smoothing": 0.25,
        "smoothing": "uniform_excluding_target",
        "return": ["token_ranks"],
        "on_error": "partial",
        "truncation": True,
        "priority": "bulk",
        "timeout_ms": 1500.0,
        "reproducible": True,
        "pad_token_id": 1,
        "prefix_length": [0, 1],
        "decoder_start_token_id": 7,
    }


def test_a_large_request_is_tensors() -> None:
    request = sent(large_chunk())
    assert request.url == "http://host:1/v2/models/fake/infer"
    assert request.headers["Content-Type"] == "application/octet-stream"
    head, tensors = read_tensors(request.headers, request.body)
    assert tensors == {
        "source_ids": list(range(JSON_UP_TO)),
        "source_lengths": [JSON_UP_TO - 3, 3],
        "target_ids": [9, 10, -100],
        "target_lengths": [1, 2],
    }
    assert [one["name"] for one in head["outputs"]] == ["loss", "nll", "num_tokens"]
    assert all(one["parameters"] == {"binary_data": True} for one in head["outputs"])
    assert head["parameters"] == {
        "label_smoothing": 0.0,
        "smoothing": "uniform",
        "on_error": "fail",
        "truncation": False,
        "priority": 1,
        "reproducible": False,
        "prefix_length": 0,
    }


def test_tensors_carry_the_same_options() -> None:
    chunk = dataclasses.replace(large_chunk(), source_index=[1, 0])
    head, tensors = read_tensors(
        *_headers_and_body(
            sent(
                chunk,
                label_smoothing=0.25,
                per_token=("token_nlls", "token_entropies"),
                truncation=True,
                priority="bulk",
                timeout=1.5,
                reproducible=True,
                pad_token_id=1,
                prefix_length=np.array([0, 1], np.int8),
                decoder_start_token_id=7,
            )
        )
    )
    assert tensors["source_index"] == [1, 0]
    assert tensors["prefix_length"] == [0, 1]
    assert [one["name"] for one in head["outputs"][3:]] == [
        "token_nlls",
        "token_entropies",
        "num_truncated_source_tokens",
        "num_truncated_target_tokens",
    ]
    expected = {
        "label_smoothing": 0.25,
        "priority": 2,
        "timeout": 1_500_000,
        "reproducible": True,
        "pad_token_id": 1,
        "decoder_start_token_id": 7,
        "truncation": True,
    }
    assert expected.items() <= head["parameters"].items()
    assert "prefix_length" not in head["parameters"]


def _headers_and_body(request: Request) -> tuple[Any, bytes]:
    return request.headers, request.body


def test_the_wire_is_chosen_by_what_is_sent() -> None:
    # Ids and lengths: a row of n ids counts n + 1.
    fits = Chunk([[1] * (JSON_UP_TO - 3)], [[1]])
    assert sent(fits).url.endswith("/loss")
    assert sent(Chunk([[1] * (JSON_UP_TO - 2)], [[1]])).url.endswith("/infer")


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", ">i4", "u4", "i8", ">i8", "u8"])
@pytest.mark.parametrize("pad", [0, JSON_UP_TO])
def test_every_integer_type_arrives_as_it_is(dtype: str, pad: int) -> None:
    values = np.array([0, 1, 127], dtype)
    filled = Ragged(np.concatenate([values, np.zeros(pad, dtype)]), np.array([3 + pad]))
    request = sent(Chunk(filled, [[1]]))
    if pad:
        _, tensors = read_tensors(request.headers, request.body)
        assert tensors["source_ids"] == [0, 1, 127] + [0] * pad
    else:
        assert json.loads(request.body)["source_ids"] == [[0, 1, 127]]


@pytest.mark.parametrize("pad", [0, JSON_UP_TO])
def test_ids_that_32_bits_do_not_hold_are_not_cut(pad: int) -> None:
    request = sent(Chunk([[2**31, -(2**31) - 1, *[0] * pad]], [[1]]))
    if pad:
        head, tensors = read_tensors(request.headers, request.body)
        assert head["inputs"][0]["datatype"] == "INT64"
        assert tensors["source_ids"][:2] == [2**31, -(2**31) - 1]
    else:
        assert json.loads(request.body)["source_ids"] == [[2**31, -(2**31) - 1]]


def test_views_that_are_not_contiguous_arrive_in_order() -> None:
    values = np.arange(12)[::-2]
    assert json.loads(sent(Chunk(Ragged(values, np.array([2, 4])), SMALL.targets)).body)[
        "source_ids"
    ] == [[11, 9], [7, 5, 3, 1]]


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2, 3], [4, 5, 6]],
        ((1, 2, 3), (4, 5, 6)),
        np.array([[1, 2, 3], [4, 5, 6]]),
        [np.array([1, 2, 3]), np.array([4, 5, 6], np.int16)],
        [[1, 2, 3], np.array([4, 5, 6])],
        [[np.int64(1), np.uint8(2), 3], range(4, 7)],
        Ragged(np.arange(1, 7), np.array([3, 3])),
    ],
)
def test_rows_may_be_given_in_many_ways(rows: Any) -> None:
    body = json.loads(sent(Chunk(rows, rows)).body)
    assert body["source_ids"] == body["target_ids"] == [[1, 2, 3], [4, 5, 6]]


def test_empty_rows_stay_rows() -> None:
    body = json.loads(sent(Chunk([[], [1], []], [np.zeros(0), np.array([2]), []])).body)
    assert body["source_ids"] == [[], [1], []]
    assert body["target_ids"] == [[], [2], []]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1], [2, 3.0]], "row 1 of source_ids has 3.0 at position 1, a float"),
        ([[1], [True]], "row 1 of source_ids has True at position 0, a bool"),
        ([[1, None]], "row 0 of source_ids has None"),
        ([1, 2], "row 0 of source_ids is a int"),
        (["ab"], "row 0 of source_ids is a str"),
        (7, "source_ids is a int"),
        (np.array([[1.0, 2.0]]), "source_ids are float64"),
        (np.array([[True]]), "source_ids are bool"),
        ([np.array([1.5])], "row 0 of source_ids is float64"),
        ([np.array([True])], "row 0 of source_ids is bool"),
        (Ragged(np.array([1.0]), np.array([1])), "source_ids are float64"),
        ([np.array([1]), np.array([1], np.uint64)], "source_ids mixes integers"),
    ],
)
def test_what_is_no_integer_is_refused(rows: Any, message: str) -> None:
    talk = converse(protocol().loss(Chunk(rows, [[1]]), how()), [])
    assert isinstance(talk.error, TypeError)
    assert str(talk.error).startswith(message)
    assert not talk.attempts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[2**63]], "source_ids: 9223372036854775808 is no id"),
        ([np.array([2**63], np.uint64)], "source_ids: 9223372036854775808 is no id"),
        ([np.zeros((1, 1), int)], "row 0 of source_ids has 2 dimensions"),
    ],
)
def test_integers_that_no_wire_has_are_refused(rows: Any, message: str) -> None:
    talk = converse(protocol().loss(Chunk(rows, [[1]]), how()), [])
    assert isinstance(talk.error, ValueError)
    assert str(talk.error).startswith(message)


@pytest.mark.parametrize(
    ("values", "lengths", "error", "message"),
    [
        ([1, 2], np.array([2]), TypeError, "values is a list"),
        (np.zeros(2, int), [2], TypeError, "lengths is a list"),
        (np.zeros((2, 1), int), np.array([2]), ValueError, "values has 2 dimensions"),
        (np.zeros(2, int), np.array([2.0]), TypeError, "lengths are float64"),
        (np.zeros(2, int), np.array([True, True]), TypeError, "lengths are bool"),
        (np.zeros(2, int), np.array([3, -1]), ValueError, "row 1 has the length -1"),
        (np.zeros(2, int), np.array([3]), ValueError, "the lengths add up to 3"),
    ],
)
def test_a_ragged_that_contradicts_itself_is_refused(
    values: Any, lengths: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Ragged(values, lengths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": "high"}, "priority is 'high' and must be one of interactive, bulk"),
        ({"on_error": "skip"}, "on_error is 'skip'"),
        ({"smoothing": "none"}, "smoothing is 'none'"),
        ({"per_token": ["losses"]}, "per_token: there is no 'losses'"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": math.nan}, "timeout is nan"),
    ],
)
def test_options_that_nobody_knows_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoringOptions(**options)


def test_options_per_target_are_integers() -> None:
    for options in ({"prefix_length": 1.0}, {"decoder_start_token_id": True}):
        talk = converse(protocol().loss(SMALL, how(**options)), [])
        assert isinstance(talk.error, TypeError)


def test_keyword_arguments_are_the_options() -> None:
    names = {field.name for field in dataclasses.fields(ScoringOptions)}
    assert Options.__annotations__.keys() == names


def test_strings_are_sent_as_they_are() -> None:
    chunk = Chunk(["Grüße 🙂", ""], ["a", "b"], [1, 0])
    run = HowToScore(ScoringOptions(truncation=True), "eng_Latn", "deu_Latn", tokens=True)
    request = converse(protocol().score(chunk, run), []).attempts[0].request
    assert request.url == "http://host:1/loss/text"
    assert json.loads(request.body) == {
        "model": "fake",
        "sources": ["Grüße 🙂", ""],
        "targets": ["a", "b"],
        "source_index": [1, 0],
        "source_language": "eng_Latn",
        "target_language": "deu_Latn",
        "tokens": True,
        "label_smoothing": 0.0,
        "smoothing": "uniform",
        "return": [],
        "on_error": "fail",
        "truncation": True,
        "priority": "interactive",
        "reproducible": False,
    }


@pytest.mark.parametrize(
    ("chunk", "options", "error", "message"),
    [
        (Chunk(["a", 1], ["b", "c"]), {}, TypeError, "source 1 is a int"),  # type: ignore[list-item]
        (Chunk("ab", ["b", "c"]), {}, TypeError, "sources are a str"),
        (Chunk(["a"], ["\ud800"]), {}, ValueError, "target 0 is not Unicode"),
        (Chunk(["a"], ["b"]), {"pad_token_id": 1}, ValueError, "pad_token_id is for ids"),
        (Chunk(["a"], ["b"]), {"prefix_length": [1]}, ValueError, "prefix_length is for ids"),
    ],
)
def test_strings_that_cannot_be_sent_are_refused(
    chunk: Chunk, options: Any, error: type[Exception], message: str
) -> None:
    talk = converse(protocol().loss_text(chunk, how(**options)), [])
    assert isinstance(talk.error, error)
    assert str(talk.error).startswith(message)
    assert not talk.attempts


def test_languages_are_for_strings() -> None:
    talk = converse(protocol().score(SMALL, HowToScore(ScoringOptions(), "eng_Latn")), [])
    assert isinstance(talk.error, ValueError)


def test_headers_go_with_every_request() -> None:
    speaker = protocol(model=None, Authorization="Bearer secret")
    models = json_reply(200, {"models": [model_body("fake")]})
    talk = converse(speaker.loss(large_chunk(), how()), [models, large_reply()])
    assert len(talk.attempts) == 2
    for attempt in talk.attempts:
        assert attempt.request.headers["Authorization"] == "Bearer secret"
        assert attempt.request.headers["Accept-Encoding"] == "identity"


# ---------------------------------------------------------------- the model's name


def model_body(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "state": "ready",
        "family": "marian",
        "checkpoint": "somebody/something",
        "engine": "torch",
        "device": "cpu",
        "precision": "float32",
        "bundle_digest": "0" * 64,
        "source_vocabulary_size": 50,
        "target_vocabulary_size": 51,
        "pad_token_id": 1,
        "decoder_start_token_id": 49,
        "max_source_tokens": 12,
        "max_target_tokens": 13,
        "a_field_of_a_later_version": 7,
    }


def test_the_only_models_name_is_asked_for_once() -> None:
    speaker = protocol(model=None)
    models = json_reply(200, {"models": [model_body("a/b")]})
    talk = converse(speaker.loss(large_chunk(), how()), [models, large_reply()])
    assert [attempt.request.url for attempt in talk.attempts] == [
        "http://host:1/models",
        "http://host:1/v2/models/a%2Fb/infer",
    ]
    again = converse(speaker.loss(large_chunk(), how()), [large_reply()])
    assert again.result.model == "fake"


def test_of_several_models_the_service_says_that_one_must_be_named() -> None:
    models = json_reply(200, {"models": [model_body("a"), model_body("b")]})
    talk = converse(
        protocol(model=None).loss(large_chunk(), how()), [models, problem(422, "invalid_request")]
    )
    assert talk.attempts[1].request.url == "http://host:1/loss"
    assert isinstance(talk.error, errors.InvalidRequest)


def test_a_model_that_is_gone_is_looked_up_again() -> None:
    speaker = protocol(model=None)
    models = json_reply(200, {"models": [model_body("a")]})
    gone = converse(speaker.loss(large_chunk(), how()), [models, problem(404, "unknown_model")])
    assert isinstance(gone.error, errors.NotFound)
    models = json_reply(200, {"models": [model_body("b")]})
    talk = converse(speaker.loss(large_chunk(), how()), [models, large_reply()])
    assert talk.attempts[1].request.url == "http://host:1/v2/models/b/infer"


def test_models_have_what_the_service_says() -> None:
    talk = converse(protocol().models(), [json_reply(200, {"models": [model_body("m")]})])
    (model,) = talk.result
    assert (model.name, model.target_vocabulary_size, model.max_target_tokens) == ("m", 51, 13)
    assert model.details["a_field_of_a_later_version"] == 7


@pytest.mark.parametrize(
    ("outcome", "is_ready"),
    [
        (json_reply(200, {"status": "ready"}), True),
        (problem(503, "not_ready"), False),
        (Reply(502, {}, b"<html>"), False),
        (Lost("connection refused"), False),
        (Lost("no reply", is_timeout=True), False),
    ],
)
def test_ready_is_asked_once(outcome: Any, is_ready: bool) -> None:
    talk = converse(protocol().ready(), [outcome])
    assert talk.result is is_ready


def test_ready_says_what_is_no_answer_to_it() -> None:
    assert isinstance(converse(protocol().ready(), [Reply(404, {}, b"")]).error, errors.NotFound)


# ---------------------------------------------------------------- replies


def test_json_becomes_arrays() -> None:
    options = how(per_token=["token_losses", "token_ranks"])
    reply = json_reply(200, JSON_REPLY, x_request_id="r-9")
    result = converse(protocol().loss(SMALL, options), [reply]).result
    np.testing.assert_array_equal(result.losses, [3.5, np.nan])
    np.testing.assert_array_equal(result.nlls, [3.25, np.nan])
    np.testing.assert_array_equal(result.num_tokens, [4, 0])
    assert (result.losses.dtype, result.num_tokens.dtype) == (np.float64, np.int32)
    np.testing.assert_array_equal(result.mean_losses, [0.875, np.nan])
    np.testing.assert_allclose(result.perplexities, [math.exp(3.25 / 4), np.nan])
    np.testing.assert_array_equal(
        result.token_losses.values, np.float32([1.5, np.nan] + 2 * [np.nan])
    )
    assert result.token_losses.values.dtype == np.float32
    np.testing.assert_array_equal(result.token_ranks.values, [7, -1, -1, -1])
    np.testing.assert_array_equal(result.token_ranks.lengths, [2, 2])
    assert result.token_nlls is None
    assert result.errors == (PairError(1, "token_out_of_range", "too large"),)
    assert result.aggregate == Aggregate(**AGGREGATE)  # type: ignore[arg-type]
    assert result.usage == Usage(**USAGE)  # type: ignore[arg-type]
    assert (result.model, result.request_id, len(result)) == ("fake", "r-9", 2)


def test_tensors_become_the_same_arrays() -> None:
    reply = large_reply(
        token_losses=("FP32", [1.5, math.nan, -0.0]),
        token_ranks=("INT32", [7, -1, 3]),
        num_truncated_target_tokens=("INT32", [0, 2]),
    )
    result = converse(protocol().loss(large_chunk(), how()), [reply]).result
    np.testing.assert_array_equal(result.losses, [3.5, np.nan])
    np.testing.assert_array_equal(result.nlls, [3.25, np.nan])
    np.testing.assert_array_equal(result.num_tokens, [4, 0])
    assert (result.losses.dtype, result.num_tokens.dtype) == (np.float64, np.int32)
    np.testing.assert_array_equal(result.token_losses.values, np.float32([1.5, np.nan, -0.0]))
    np.testing.assert_array_equal(result.token_losses.lengths, [1, 2])
    np.testing.assert_array_equal(result.token_ranks.rows()[1], [-1, 3])
    np.testing.assert_array_equal(result.num_truncated_target_tokens, [0, 2])
    assert result.token_entropies is None
    assert result.errors == (PairError(1, "token_out_of_range", "too large"),)
    assert result.aggregate == Aggregate(**AGGREGATE)  # type: ignore[arg-type]
    assert result.usage == Usage(**USAGE)  # type: ignore[arg-type]
    assert result.request_id == "r-2"


def test_tokens_come_with_their_losses() -> None:
    reply = JSON_REPLY | {
        "source_tokens": [["▁a", "</s>"], ["▁b"]],
        "target_tokens": [["▁c", "</s>"], ["▁d", "e", "</s>"]],
        "source_offsets": [[[0, 1], None], [[0, 1]]],
        "target_offsets": None,
    }
    run = HowToScore(ScoringOptions(per_token=["token_losses"]), tokens=True)
    chunk = Chunk(["a", "b"], ["c", "de"])
    result = converse(protocol().loss_text(chunk, run), [json_reply(200, reply)]).result
    assert result.target_tokens == [["▁c", "</s>"], ["▁d", "e", "</s>"]]
    assert result.source_offsets == [[(0, 1), None], [(0, 1)]]
    assert result.target_offsets is None
    np.testing.assert_array_equal(result.token_losses.lengths, [2, 3])
    np.testing.assert_array_equal(np.isnan(result.token_losses.values), [False, *[True] * 4])


def test_scores_of_pairs_are_those_of_the_arrays() -> None:
    options = how(per_token=["token_losses", "token_ranks"])
    result = converse(protocol().loss(SMALL, options), [json_reply(200, JSON_REPLY)]).result
    first, second = result.pairs()
    assert (first.loss, first.nll, first.num_tokens, first.error) == (3.5, 3.25, 4, None)
    assert first.mean_loss == 0.875
    assert first.token_ranks.tolist() == [7, -1]
    assert first.token_entropies is None
    assert math.isnan(second.loss)
    assert math.isnan(second.mean_loss)
    assert second.error == PairError(1, "token_out_of_range", "too large")


def _cut(reply: Reply, end: int) -> Reply:
    return dataclasses.replace(reply, body=reply.body[:end])


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, {}, b"<html>welcome</html>"),
        Reply(200, {}, b"[]"),
        json_reply(200, {"hello": "world"}),
        json_reply(200, JSON_REPLY | {"token_losses": [[1.0], None]}),
        json_reply(200, JSON_REPLY | {"losses": ["three"]}),
    ],
)
def test_json_that_is_no_reply_is_said_to_be_none(reply: Reply) -> None:
    options = how(per_token=["token_losses"])
    assert isinstance(converse(protocol().loss(SMALL, options), [reply]).error, errors.InvalidReply)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, {}, b"<html>welcome</html>"),
        json_reply(200, JSON_REPLY),
        _cut(large_reply(), -1),
        _cut(large_reply(), 30),
        dataclasses.replace(large_reply(), body=large_reply().body + b"x"),
        large_reply(token_losses=("FP32", [1.0])),
        large_reply(loss=("FP64", [1.0])),
    ],
)
def test_tensors_that_are_no_reply_are_said_to_be_none(reply: Reply) -> None:
    talk = converse(protocol().loss(large_chunk(), how()), [reply])
    assert isinstance(talk.error, errors.InvalidReply)
