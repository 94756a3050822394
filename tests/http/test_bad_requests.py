"""Every reason and every status: sent over HTTP, answered as documented, survived."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest
import zstandard

from bad_pairs import BAD_PAIRS, TOO_MANY
from fakes import MAX_TOKENS, PAD, START, VOCABULARY_SIZE, FakeEngine, fake_bundle, fake_nll
from seqloss.records import Batch, TokenTerms

GOOD = {"source_ids": [[3, 4]], "target_ids": [[5, 2]]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def service(make_client: Any, engine: FakeEngine) -> Any:
    return make_client(engine=engine, max_body_bytes=20_000, max_pairs_per_request=100)


def assert_problem(response: Any, status: int, code: str) -> dict[str, Any]:
    """A problem document with all its fields, and the service's identification of the request."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["code"] == code
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["error"] == problem["detail"]
    assert {"type", "title", "detail", "errors"} <= problem.keys()
    return problem


def assert_alive(service: Any) -> None:
    response = service.post("/loss", json=GOOD)
    assert response.status_code == 200, response.text
    expected = fake_nll([3, 4], START, 5) + fake_nll([3, 4], 5, 2)
    assert response.json()["losses"] == pytest.approx([expected])


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_fails_the_request_before_anything_is_computed(
    name: str, service: Any, engine: FakeEngine
) -> None:
    changes, code, loc = BAD_PAIRS[name]
    body = {"source_ids": [[3], [4], [5]], "target_ids": [[5], [6], [7]]} | changes
    problem = assert_problem(service.post("/loss", json=body), 422, "invalid_request")
    assert [(fault["index"], fault["code"], fault["loc"]) for fault in problem["errors"]] == [
        (1, code, loc)
    ]
    assert not engine.batches
    assert_alive(service)


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_spoils_no_other_where_partial_is_asked_for(
    name: str, service: Any, engine: FakeEngine
) -> None:
    changes, code, _ = BAD_PAIRS[name]
    body = {"source_ids": [[3], [4], [5]], "target_ids": [[5], [6], [7]], "on_error": "partial"}
    body |= changes | {"return": ["token_losses"]}
    response = service.post("/loss", json=body)
    assert response.status_code == 200, response.text
    reply = response.json()
    assert [(fault["index"], fault["code"]) for fault in reply["errors"]] == [(1, code)]
    for quantity in ("losses", "nlls", "mean_losses", "perplexities", "token_losses"):
        assert reply[quantity][1] is None, quantity
        assert None not in (reply[quantity][0], reply[quantity][2]), quantity
    assert reply["num_tokens"][1] == 0
    assert reply["aggregate"]["num_pairs"] == 2
    # The others are those of a request without it.
    keep = {
        field: [value[0], value[2]] if isinstance(value, list) and len(value) == 3 else value
        for field, value in body.items()
    }
    alone = service.post("/loss", json=keep).json()
    assert [reply["losses"][0], reply["losses"][2]] == alone["losses"]
    # A wrong id never reaches the model.
    for batch in engine.batches:
        for ids in (batch.sources.values, batch.labels, batch.decoder_input_ids.values):
            assert ids.min() >= 0
            assert ids.max() < VOCABULARY_SIZE


def test_all_faults_are_listed(service: Any) -> None:
    body = {
        "source_ids": [[3], [], [99], [3]],
        "target_ids": [[5], [6], [7], [-5]],
    }
    problem = assert_problem(service.post("/loss", json=body), 422, "invalid_request")
    assert [(fault["index"], fault["code"]) for fault in problem["errors"]] == [
        (1, "empty_source"),
        (2, "token_out_of_range"),
        (3, "token_out_of_range"),
    ]
    assert "the id 99 at position 0, the vocabulary has 50" in problem["errors"][1]["detail"]


WRONG_FIELDS = {
    "no targets": {"source_ids": [[3]]},
    "no sources": {"target_ids": [[3]]},
    "unknown field": GOOD | {"label_smothing": 0.1},
    "two names for one field": GOOD | {"labels": [[5, 2]]},
    "ids as text": GOOD | {"target_ids": [["5"]]},
    "ids as booleans": GOOD | {"target_ids": [[True]]},
    "ids as floats": GOOD | {"target_ids": [[5.0]]},
    "ids as null": GOOD | {"target_ids": [[None]]},
    "flat ids": GOOD | {"target_ids": [5, 2]},
    "smoothing beyond 1": GOOD | {"label_smoothing": 1.5},
    "negative smoothing": GOOD | {"label_smoothing": -0.1},
    "smoothing that is no number": GOOD | {"label_smoothing": "0.1"},
    "unknown convention": GOOD | {"smoothing": "keras"},
    "unknown return": GOOD | {"return": ["logits"]},
    "unknown on_error": GOOD | {"on_error": "ignore"},
    "unknown priority": GOOD | {"priority": "urgent"},
    "no time at all": GOOD | {"timeout_ms": 0},
    "mask of twos": GOOD | {"target_mask": [[2, 1]]},
    "mask of floats": GOOD | {"target_mask": [[0.5, 1]]},
    "a list": [1],
    "counts differ": GOOD | {"source_ids": [[3], [4]]},
    "index too short": GOOD | {"source_index": []},
    "index out of range": GOOD | {"source_index": [1]},
    "index negative": GOOD | {"source_index": [-1]},
    "mask of another count": GOOD | {"target_mask": []},
    "mask of another length": GOOD | {"target_mask": [[1]]},
    "source mask of another length": GOOD | {"source_mask": [[1]]},
    "decoder inputs of another length": GOOD | {"decoder_input_ids": [[1]]},
    "decoder inputs and a start": GOOD
    | {"decoder_input_ids": [[1, 2]], "decoder_start_token_id": 3},
    "start ids of another count": GOOD | {"decoder_start_token_id": [1, 2]},
    "prefixes of another count": GOOD | {"prefix_length": [1, 2]},
    "negative prefix": GOOD | {"prefix_length": -1},
    "token types of another shape": GOOD | {"token_type_ids": [[0]]},
    "timeout without end": GOOD | {"timeout_ms": "Infinity"},
    "token types": GOOD | {"token_type_ids": [[0, 1]]},
    "pad id out of range": GOOD | {"pad_token_id": VOCABULARY_SIZE},
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_wrong_field_is_named(name: str, service: Any, engine: FakeEngine) -> None:
    response = service.post("/loss", json=WRONG_FIELDS[name])
    problem = assert_problem(response, 422, "invalid_request")
    assert problem["errors"]
    assert all(fault["detail"] for fault in problem["errors"])
    assert not engine.batches
    assert_alive(service)


def test_a_misspelt_field_is_called_by_its_name(service: Any) -> None:
    response = service.post("/loss", json=GOOD | {"label_smothing": 0.1})
    (fault,) = response.json()["errors"]
    assert fault["loc"] == ["label_smothing"]
    assert "label_smothing" in fault["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 500, b'{"source_ids": [[1]]} {}'])
def test_what_is_not_json_is_a_400(body: bytes, service: Any) -> None:
    assert_problem(service.post("/loss", content=body, headers=JSON), 400, "malformed_body")
    assert_alive(service)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_media_types_are_a_415(content_type: str, service: Any) -> None:
    response = service.post(
        "/loss", content=json.dumps(GOOD), headers={"Content-Type": content_type}
    )
    assert_problem(response, 415, "unsupported_media_type")


COMPRESSORS = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstandard.compress}


@pytest.mark.parametrize("encoding", COMPRESSORS)
def test_compressed_bodies_are_read_and_broken_ones_refused(encoding: str, service: Any) -> None:
    headers = JSON | {"Content-Encoding": encoding}
    body = COMPRESSORS[encoding](json.dumps(GOOD).encode())
    assert service.post("/loss", content=body, headers=headers).status_code == 200
    twice = body + COMPRESSORS[encoding](b" " * 10)
    assert service.post("/loss", content=twice, headers=headers).status_code == 200
    long_body = COMPRESSORS[encoding](json.dumps(GOOD).encode() + b" " * 9_000)
    for broken in (body[:-3], long_body[:-8], body + b"x", b"nonsense", b""):
        response = service.post("/loss", content=broken, headers=headers)
        assert_problem(response, 400, "malformed_body")
    many = COMPRESSORS[encoding](b" ") * 101
    problem = assert_problem(
        service.post("/loss", content=many, headers=headers), 400, "malformed_body"
    )
    assert "compress it as one" in problem["detail"]
    bomb = COMPRESSORS[encoding](b" " * 50_000_000)
    assert len(bomb) < 60_000
    small_bomb = COMPRESSORS[encoding](b" " * 1_000_000)
    assert len(small_bomb) < 20_000
    response = service.post("/loss", content=small_bomb, headers=headers)
    assert_problem(response, 413, "request_too_large")
    assert_alive(service)


@pytest.mark.parametrize("field", ["source_ids", "source_mask", "source_index", "unknown"])
def test_a_million_wrong_entries_cost_no_more_than_one(field: str, make_client: Any) -> None:
    """Counted by what is listed: each of them would be an object and a line of the reply."""
    service = make_client()
    entries = b",".join([b'""'] * 1_000_000)
    wrong = {
        "source_ids": b'"source_ids":[[%b]],"target_ids":[[1]]' % entries,
        "source_mask": b'"source_ids":[[1]],"target_ids":[[1]],"source_mask":[[%b]]' % entries,
        "source_index": b'"source_ids":[[1]],"target_ids":[[1]],"source_index":[%b]' % entries,
        "unknown": b",".join(b'"field%d":1' % number for number in range(100_000)),
    }[field]
    response = service.post("/loss", content=b"{%b}" % wrong, headers=JSON)
    assert response.status_code == 422
    assert len(response.json()["errors"]) <= 3
    assert len(response.content) < 2_000


def test_more_lists_than_a_request_may_have_are_not_even_parsed(service: Any) -> None:
    body = b'{"source_ids":[%b],"target_ids":[[1]]}' % b",".join([b"[]"] * 6_000)
    problem = assert_problem(
        service.post("/loss", content=body, headers=JSON), 413, "request_too_large"
    )
    assert "100 sources or targets" in problem["detail"]


def test_more_sources_than_a_request_may_have_are_a_413(service: Any) -> None:
    body = {"source_ids": [[3]] * 101, "target_ids": [[5]], "source_index": [0]}
    assert_problem(service.post("/loss", json=body), 413, "request_too_large")


def test_an_unknown_encoding_is_a_415(service: Any) -> None:
    headers = JSON | {"Content-Encoding": "br"}
    response = service.post("/loss", content=b"x", headers=headers)
    problem = assert_problem(response, 415, "unsupported_media_type")
    assert "zstd" in problem["detail"]


def test_a_large_body_is_refused_by_its_length_and_while_it_streams(service: Any) -> None:
    body = json.dumps(GOOD).encode() + b" " * 20_000
    response = service.post("/loss", content=body, headers=JSON)
    assert_problem(response, 413, "request_too_large")

    def chunks() -> Any:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    response = service.post("/loss", content=chunks(), headers=JSON)
    assert_problem(response, 413, "request_too_large")
    assert_alive(service)


def test_too_many_pairs_are_a_413(service: Any) -> None:
    body = {"source_ids": [[3]], "target_ids": [[5]] * 101, "source_index": [0] * 101}
    assert_problem(service.post("/loss", json=body), 413, "request_too_large")


def test_a_request_above_the_whole_queue_is_a_413(make_client: Any) -> None:
    service = make_client(max_queue_tokens=5)
    body = {"source_ids": [[3, 4, 5]], "target_ids": [[5, 6, 7]]}
    problem = assert_problem(service.post("/loss", json=body), 413, "request_too_large")
    assert "split it" in problem["detail"]


def test_unknown_models_paths_and_methods(service: Any) -> None:
    response = service.post("/loss", json=GOOD | {"model": "other"})
    assert "served are: fake" in assert_problem(response, 404, "unknown_model")["detail"]
    assert_problem(service.get("/models/other"), 404, "unknown_model")
    assert_problem(service.get("/nothing"), 404, "not_found")
    assert_problem(service.post("/loss/", json=GOOD), 404, "not_found")
    assert_problem(service.get("/loss"), 405, "method_not_allowed")
    assert_alive(service)


def test_several_models_must_be_named(make_client: Any) -> None:
    engines = [FakeEngine(), FakeEngine()]
    bundles = {"one": fake_bundle(), "two": fake_bundle()}
    service = make_client(bundles, load=lambda *_: engines.pop())
    problem = assert_problem(service.post("/loss", json=GOOD), 422, "invalid_request")
    assert "one, two" in problem["detail"]
    for name in bundles:
        response = service.post("/loss", json=GOOD | {"model": name})
        assert response.json()["model"] == name


# ---------------------------------------------------------------- faults of the model


def poisoned(label: int, value: float) -> FakeEngine:
    """An engine that says `value` of one label's tokens, wherever they stand."""
    honest = FakeEngine()

    def before(batch: Batch) -> TokenTerms:
        terms = honest.score(batch)
        wrong = batch.labels[batch.counted] == label
        logprobs = np.where(wrong, np.float32(value), terms.target_logprob)
        return TokenTerms(logprobs, terms.mean_logprob)

    return FakeEngine(before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_result_that_is_not_finite_fails_its_pair_alone(value: float, make_client: Any) -> None:
    service = make_client(engine=poisoned(13, value))
    body = {"source_ids": [[3], [4]], "target_ids": [[13, 2], [5, 2]]}
    problem = assert_problem(service.post("/loss", json=body), 500, "non_finite")
    assert [(fault["index"], fault["code"]) for fault in problem["errors"]] == [(0, "non_finite")]
    reply = service.post("/loss", json=body | {"on_error": "partial"}).json()
    assert reply["losses"][0] is None
    assert reply["losses"][1] == pytest.approx(fake_nll([4], START, 5) + fake_nll([4], 5, 2))
    assert [(fault["index"], fault["code"]) for fault in reply["errors"]] == [(0, "non_finite")]
    assert_alive(service)


def test_masks_of_booleans_and_of_bits_are_the_same(service: Any) -> None:
    body = {"source_ids": [[3, 4]], "target_ids": [[5, 6, 2]]}
    bits = service.post("/loss", json=body | {"target_mask": [[1, 0, 1]]}).json()
    booleans = service.post("/loss", json=body | {"target_mask": [[True, False, True]]}).json()
    expected = fake_nll([3, 4], START, 5) + fake_nll([3, 4], 6, 2)
    assert bits["losses"] == booleans["losses"] == pytest.approx([expected])


def test_what_is_too_long_is_cut_only_where_that_was_asked_for(service: Any) -> None:
    body = {"source_ids": [TOO_MANY, [3]], "target_ids": [[5], [*TOO_MANY, 6]], "truncation": True}
    reply = service.post("/loss", json=body | {"return": ["token_losses"]}).json()
    assert reply["num_truncated_source_tokens"] == [1, 0]
    assert reply["num_truncated_target_tokens"] == [0, 2]
    assert reply["num_tokens"] == [1, MAX_TOKENS]
    assert [value is None for value in reply["token_losses"][1]] == [False] * MAX_TOKENS + [
        True
    ] * 2
    assert "num_truncated_source_tokens" not in service.post("/loss", json=GOOD).json()


def test_pad_ids_are_padding_only_where_that_was_asked_for(service: Any) -> None:
    body = {"source_ids": [[3, PAD, PAD]], "target_ids": [[5, PAD, 6, PAD]]}
    plain = service.post("/loss", json=body).json()
    assert plain["num_tokens"] == [4]
    asked = service.post(
        "/loss", json=body | {"pad_token_id": PAD, "return": ["token_losses"]}
    ).json()
    # Not counted, but fed: the token after it has it as its decoder input.
    expected = [fake_nll([3], START, 5), None, fake_nll([3], PAD, 6), None]
    assert asked["token_losses"][0] == pytest.approx(expected)
