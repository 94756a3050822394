"""The Open Inference Protocol: the same losses as POST /loss, and every way to send it wrongly."""

from __future__ import annotations

import ast
import gzip
import inspect
import json
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from test_bad_requests import GOOD, assert_alive, assert_problem
from test_service import HeldEngine, metric, occupy, vanish_after_sending

import seqloss
from bad_pairs import BAD_PAIRS
from fakes import MAX_TOKENS, PAD, VOCABULARY_SIZE, FakeEngine, fake_bundle
from seqloss.errors import PAIR_CODES
from seqloss.http.app import create_app
from seqloss.settings import Settings
from tensor_bodies import HEADER_LENGTH, pack, tensor, tensors_of, unpack

INFER = "/v2/models/fake/infer"
EVERYTHING = [
    "loss",
    "nll",
    "mean_loss",
    "num_tokens",
    "error_code",
    "token_losses",
    "token_nlls",
    "token_ranks",
    "token_entropies",
    "num_truncated_source_tokens",
    "num_truncated_target_tokens",
]
PER_TOKEN = ["token_losses", "token_nlls", "token_ranks", "token_entropies"]

PAIRS = {
    "source_ids": [[3, 4, 5], [6], [7, 8]],
    "target_ids": [[9, 2], [10, -100, 11, 2], [12]],
}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def service(make_client: Any, engine: FakeEngine) -> Any:
    return make_client(
        engine=engine, max_body_bytes=20_000, max_pairs_per_request=100, streams=("news",)
    )


def flat(rows: list[list[Any] | None], targets: list[list[int]], gap: float) -> list[Any]:
    """What /loss says per token, as one list; `gap` where it says null."""
    lists = [row or [None] * len(target) for row, target in zip(rows, targets, strict=True)]
    return [gap if value is None else value for value in chain.from_iterable(lists)]


def assert_same_as_loss(
    service: Any, body: dict[str, Any], infer: dict[str, np.ndarray], model: str = "fake"
) -> None:
    """Every output, to the bit."""
    asked = body | {"model": model, "return": PER_TOKEN}
    response = service.post("/loss", json=asked)
    assert response.status_code == 200, response.text
    reply = response.json()
    for name, field in [("loss", "losses"), ("nll", "nlls"), ("mean_loss", "mean_losses")]:
        expected = [np.nan if value is None else value for value in reply[field]]
        np.testing.assert_array_equal(infer[name], np.array(expected, np.float64))
    np.testing.assert_array_equal(infer["num_tokens"], reply["num_tokens"])
    codes = {error["index"]: error["code"] for error in reply["errors"]}
    for index, code in enumerate(infer["error_code"]):
        assert (PAIR_CODES[code - 1] if code else None) == codes.get(index)
    for name in PER_TOKEN:
        gap = -1 if name == "token_ranks" else np.nan
        expected = flat(reply[name], body["target_ids"], gap)
        np.testing.assert_array_equal(infer[name], np.array(expected, infer[name].dtype))
    for name in ("num_truncated_source_tokens", "num_truncated_target_tokens"):
        expected = reply.get(name, [0] * len(reply["losses"]))
        np.testing.assert_array_equal(infer[name], expected)


FORMS: dict[str, dict[str, Any]] = {
    "bytes": {},
    "bytes, 64 bits": {"datatype": "INT64"},
    "bytes, padded": {"padded": True},
    "bytes, padded, 64 bits": {"padded": True, "datatype": "INT64"},
    "JSON": {"binary": False},
    "JSON, 64 bits": {"binary": False, "datatype": "INT64"},
    "JSON, padded": {"binary": False, "padded": True},
    "JSON, padded, nested": {"binary": False, "padded": True, "nested": True},
}

BODIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pairs": (PAIRS, {}),
    "one source for all": (PAIRS | {"source_ids": [[3, 4]], "source_index": [0, 0, 0]}, {}),
    "masks": (
        PAIRS
        | {
            "source_mask": [[1, 1, 0], [1], [1, 1]],
            "target_mask": [[0, 1], [1, 1, 0, 1], [1]],
        },
        {},
    ),
    "decoder inputs": (PAIRS | {"decoder_input_ids": [[1, 2], [3, 4, 5, 6], [7]]}, {}),
    "a start and a prefix for each": (
        PAIRS | {"decoder_start_token_id": [1, 2, 3], "prefix_length": [1, 0, 0]},
        {},
    ),
    "a start and a prefix for all": (
        {"source_ids": [[3], [4]], "target_ids": [[5, 6], [7, 8]]},
        {"decoder_start_token_id": 4, "prefix_length": 1},
    ),
    "smoothed": (PAIRS, {"label_smoothing": 0.1, "smoothing": "uniform_excluding_target"}),
    "padding": (PAIRS | {"source_ids": [[3, PAD], [4], [5]]}, {"pad_token_id": PAD}),
    "too long, cut": (
        PAIRS | {"target_ids": [[5] * (MAX_TOKENS + 3), [6], [7]]},
        {"truncation": True},
    ),
    "no pairs": ({"source_ids": [], "target_ids": []}, {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("binary_output", [True, False])
def test_the_losses_are_those_of_post_loss(
    name: str, form: str, binary_output: bool, service: Any
) -> None:
    body, parameters = BODIES[name]
    options = dict(FORMS[form])
    datatype, padded = options.pop("datatype", "INT32"), options.pop("padded", False)
    tensors = tensors_of(body, datatype, padded=padded)
    request = pack(
        tensors,
        outputs=EVERYTHING,
        parameters=parameters | {"binary_data_output": binary_output},
        **options,
    )
    response = service.post(INFER, **request)
    expected = "application/octet-stream" if binary_output else "application/json"
    assert response.headers["content-type"] == expected
    assert_same_as_loss(service, body | parameters, unpack(response))


def test_a_request_with_both_kinds_of_tensors_has_both_kinds_back(service: Any) -> None:
    request = {
        "id": "mine",
        "inputs": [
            {"name": "target_ids", "datatype": "INT32", "shape": [3], "data": [5, 6, 7]},
            {
                "name": "source_ids",
                "datatype": "INT64",
                "shape": [1],
                "parameters": {"binary_data_size": 8},
            },
            {"name": "source_lengths", "datatype": "INT32", "shape": [1], "data": [1]},
            {
                "name": "target_lengths",
                "datatype": "INT32",
                "shape": [2],
                "parameters": {"binary_data_size": 8},
                "data": None,
            },
            {"name": "source_index", "datatype": "INT32", "shape": [2], "data": [0, 0]},
        ],
        "outputs": [
            {"name": "nll", "parameters": {"binary_data": False}},
            {"name": "loss"},
            {"name": "num_tokens", "parameters": {"binary_data": True}},
        ],
        "parameters": {"binary_data_output": True},
    }
    header = json.dumps(request).encode()
    data = np.array([3], "<i8").tobytes() + np.array([1, 2], "<i4").tobytes()
    response = service.post(INFER, content=header + data, headers={HEADER_LENGTH: str(len(header))})
    described = json.loads(response.content[: int(response.headers[HEADER_LENGTH])])
    assert described["id"] == "mine"
    assert ["data" in output for output in described["outputs"]] == [True, False, False]
    body = {"source_ids": [[3]], "target_ids": [[5], [6, 7]], "source_index": [0, 0]}
    expected = service.post("/loss", json=body).json()
    outputs = unpack(response)
    assert outputs["loss"].tolist() == outputs["nll"].tolist() == expected["losses"]
    assert outputs["num_tokens"].tolist() == [1, 2]


def test_without_outputs_the_usual_ones_come(service: Any) -> None:
    response = service.post(INFER, **pack(tensors_of(PAIRS), binary=False))
    reply = response.json()
    assert [output["name"] for output in reply["outputs"]] == [
        "loss",
        "nll",
        "num_tokens",
        "error_code",
    ]
    assert reply["model_name"] == "fake"
    assert reply["model_version"] == "1"
    assert "id" not in reply
    loss = service.post("/loss", json=PAIRS).json()
    assert json.loads(reply["parameters"]["aggregate"]) == loss["aggregate"]
    assert "errors" not in reply["parameters"]
    for name in ("source_tokens", "target_tokens", "encoded_sources", "batches"):
        assert reply["parameters"][name] == loss["usage"][name]
    assert reply["parameters"].keys() >= {"queue_ms", "compute_ms"}


def test_what_nobody_asks_for_is_not_computed(service: Any, engine: FakeEngine) -> None:
    service.post(INFER, **pack(tensors_of(PAIRS), outputs=["loss", "token_losses"]))
    service.post(INFER, **pack(tensors_of(PAIRS), outputs=["token_entropies"]))
    assert [batch.with_ranks_and_entropies for batch in engine.batches] == [False, True]


def test_no_clients_media_type_is_refused(service: Any) -> None:
    request = pack(tensors_of(PAIRS))
    del request["headers"]["Content-Type"]
    assert service.post(INFER, **request).status_code == 200
    request["headers"]["Content-Type"] = "application/json; charset=utf-8"
    assert service.post(INFER, **request).status_code == 200
    request["headers"]["Content-Type"] = "text/plain"
    problem = assert_problem(service.post(INFER, **request), 415, "unsupported_media_type")
    assert "application/json or application/octet-stream" in problem["detail"]


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", zstandard.compress)],
)
def test_compressed_bodies_are_read(encoding: str, compress: Any, service: Any) -> None:
    request = pack(tensors_of(PAIRS))
    plain = unpack(service.post(INFER, **request))
    request["headers"]["Content-Encoding"] = encoding
    request["content"] = compress(request["content"])
    assert unpack(service.post(INFER, **request))["loss"].tolist() == plain["loss"].tolist()
    request["content"] = request["content"][:-3]
    assert_problem(service.post(INFER, **request), 400, "malformed_body")


def test_large_replies_are_compressed_for_those_who_ask(make_client: Any) -> None:
    service = make_client()
    body = {"source_ids": [[3]], "target_ids": [[5, 6]] * 600, "source_index": [0] * 600}
    request = pack(tensors_of(body), outputs=["loss"], parameters={"binary_data_output": True})
    plain = service.post(
        INFER,
        content=request["content"],
        headers=request["headers"] | {"Accept-Encoding": "deflate"},
    )
    assert "content-encoding" not in plain.headers
    asked = service.post(
        INFER, content=request["content"], headers=request["headers"] | {"Accept-Encoding": "gzip"}
    )
    assert asked.headers["content-encoding"] == "gzip"
    np.testing.assert_array_equal(unpack(asked)["loss"], unpack(plain)["loss"])


# ---------------------------------------------------------------- bad pairs

# No tensor holds an id beyond 64 bits.
BAD = [name for name in BAD_PAIRS if name != "beyond 64 bits"]


def bad_body(name: str) -> tuple[dict[str, Any], str]:
    changes, code, _ = BAD_PAIRS[name]
    body = {"source_ids": [[3], [4], [5]], "target_ids": [[5], [6], [7]]} | changes
    if "attention_mask" in body:
        body["source_mask"] = body.pop("attention_mask")
    return body, code


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_fails_the_request_unless_it_asks_for_the_others(
    name: str, service: Any, engine: FakeEngine
) -> None:
    body, code = bad_body(name)
    scalars = {
        key: value
        for key, value in body.items()
        if key in ("prefix_length", "decoder_start_token_id") and isinstance(value, int)
    }
    tensors = tensors_of(body, "INT64")
    refused = service.post(INFER, **pack(tensors, outputs=EVERYTHING, parameters=scalars))
    problem = assert_problem(refused, 422, "invalid_request")
    assert [(fault["index"], fault["code"]) for fault in problem["errors"]] == [(1, code)]
    assert not engine.batches
    partial = scalars | {"on_error": "partial"}
    response = service.post(
        INFER, **pack(tensors, binary=False, outputs=EVERYTHING, parameters=partial)
    )
    outputs = unpack(response)
    assert outputs["error_code"].tolist() == [0, 1 + PAIR_CODES.index(code), 0]
    assert np.isnan(outputs["loss"]).tolist() == [False, True, False]
    (error,) = json.loads(response.json()["parameters"]["errors"])
    assert (error["index"], error["code"]) == (1, code)
    assert response.json()["outputs"][0]["data"][1] is None
    assert_same_as_loss(service, body | {"on_error": "partial"}, outputs)


def test_every_code_of_a_pair_has_a_number() -> None:
    """Those of the code: a fault with an index concerns a pair, `pad_token_id` the request."""
    root = Path(inspect.getfile(seqloss)).parent
    codes = {
        call.args[0].value
        for path in (*(root / "checking").glob("*.py"), root / "scorer.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "Fault"
        and isinstance(call.args[0], ast.Constant)
    }
    assert codes == set(PAIR_CODES)
    assert len(PAIR_CODES) == len(set(PAIR_CODES))
    # Clients know the numbers: none may ever change.
    assert PAIR_CODES[:8] == (
        "token_out_of_range",
        "empty_source",
        "empty_target",
        "source_too_long",
        "target_too_long",
        "source_mask_not_trailing",
        "non_finite",
        "out_of_memory",
    )


# ---------------------------------------------------------------- hostile requests


def with_tensor(name: str, **changes: Any) -> list[dict[str, Any]]:
    """Good inputs, one of them changed or, without changes, gone."""
    tensors = tensors_of(PAIRS)
    if not changes:
        return [given for given in tensors if given["name"] != name]
    return [given | changes if given["name"] == name else given for given in tensors]


def int32(*values: int) -> np.ndarray:
    return np.array(values, "<i4")


LONGEST = 2**31 - 1
WRONG_TENSORS: dict[str, tuple[list[dict[str, Any]], int, str]] = {
    "no source ids": (with_tensor("source_ids"), 422, "source_ids is missing"),
    "no target lengths": (with_tensor("target_lengths"), 422, "target_lengths is missing"),
    "no inputs": ([], 422, "source_ids is missing"),
    "an unknown input": (
        [*tensors_of(PAIRS), tensor("attention_mask", [1])],
        422,
        "there is no input 'attention_mask'",
    ),
    "an input twice": (
        [*tensors_of(PAIRS), tensor("source_lengths", [3, 1, 2])],
        422,
        "given 2 times",
    ),
    "ids as floats": (
        with_tensor("source_ids", datatype="FP32", data=np.zeros(6, "<f4")),
        422,
        "INT32, INT64",
    ),
    "ids as texts": (with_tensor("source_ids", datatype="BYTES"), 422, "INT32, INT64"),
    "a datatype that nobody has": (with_tensor("source_ids", datatype="INT33"), 422, "'INT33'"),
    "ids as booleans": (
        with_tensor("source_ids", datatype="BOOL", data=np.zeros(6, "?")),
        422,
        "INT32, INT64",
    ),
    "more shape than bytes": (with_tensor("source_ids", shape=[7]), 400, "is 28 bytes"),
    "less shape than bytes": (with_tensor("source_ids", shape=[5]), 400, "is 20 bytes"),
    "half an id": (
        with_tensor("source_ids", data=np.zeros(23, "u1")),
        400,
        "binary_data_size of 23",
    ),
    "a gigantic shape": (
        with_tensor("source_ids", shape=[LONGEST, LONGEST]),
        400,
        "is 18446744056529682436 bytes",
    ),
    "a gigantic empty shape": (
        with_tensor("source_ids", shape=[LONGEST, 0], data=int32()),
        422,
        f"3 entries for {LONGEST} rows",
    ),
    "a dimension beyond 31 bits": (
        with_tensor("source_ids", shape=[2**31]),
        422,
        "less than 2147483648",
    ),
    "a dimension beyond 64 bits": (with_tensor("source_ids", shape=[2**70]), 422, "shape"),
    "a negative shape": (with_tensor("source_ids", shape=[-6]), 422, "greater than or equal"),
    "a shape of fractions": (with_tensor("source_ids", shape=[6.0]), 422, "valid integer"),
    "a shape that is no number": (
        with_tensor("source_ids", shape=[float("nan")]),
        422,
        "valid integer",
    ),
    "a shape of nothing": (with_tensor("source_ids", shape=[]), 422, "at least 1 item"),
    "three dimensions": (with_tensor("source_ids", shape=[1, 2, 3]), 422, "at most 2 items"),
    "a negative length": (
        with_tensor("source_lengths", data=int32(7, -3, 2)),
        422,
        "source_lengths is 7 at 0",
    ),
    "lengths that are too short": (
        with_tensor("source_lengths", data=int32(3, 1, 1)),
        422,
        "make 5 entries together, and source_ids has 6",
    ),
    "a length too few": (
        with_tensor("source_lengths", data=int32(3, 1), shape=[2]),
        422,
        "make 4 entries",
    ),
    "lengths whose sum overflows": (
        [
            *with_tensor("source_lengths"),
            tensor("source_lengths", [2**62, 2**62, 2**62, 2**62, 6], "INT64"),
        ],
        422,
        "source_lengths is 4611686018427387904 at 0",
    ),
    "lengths in two dimensions": (
        with_tensor("source_lengths", shape=[3, 1]),
        422,
        "needs one dimension",
    ),
    "a length beyond its row": (
        [*with_tensor("source_ids"), tensor("source_ids", [[3, 4]] * 3)],
        422,
        "source_lengths is 3 at 0",
    ),
    "rows without lengths": (
        [*with_tensor("source_ids"), tensor("source_ids", [[3, 4, 5]] * 4)],
        422,
        "3 entries for 4 rows",
    ),
    "fewer sources than targets": (
        [
            *tensors_of({"source_ids": [[3]], "target_ids": [[5], [6]]}),
        ],
        422,
        "there are 1 sources and 2 targets",
    ),
    "an index beyond the sources": (
        [*tensors_of(PAIRS), tensor("source_index", [0, 3, 1])],
        422,
        "target 1 names source 3",
    ),
    "a negative index": (
        [*tensors_of(PAIRS), tensor("source_index", [0, 1, -1])],
        422,
        "target 2 names source -1",
    ),
    "an index too few": (
        [*tensors_of(PAIRS), tensor("source_index", [0, 1])],
        422,
        "source_index has the shape (2,) for 3 targets",
    ),
    "a negative prefix": (
        [*tensors_of(PAIRS), tensor("prefix_length", [0, -1, 0])],
        422,
        "prefix_length is negative: -1",
    ),
    "a mask of another shape": (
        [*tensors_of(PAIRS), tensor("target_mask", [1] * 6, "UINT8")],
        422,
        "target_mask has the shape (6,), target_ids has (7,)",
    ),
    "a mask of twos": (
        [*tensors_of(PAIRS), tensor("target_mask", [1, 2] + [1] * 5, "UINT8")],
        422,
        "other entries than 0 and 1",
    ),
    "a boolean of two": (
        [
            *tensors_of(PAIRS),
            tensor("target_mask", [1] * 7, "BOOL") | {"data": np.full(7, 2, "u1")},
        ],
        422,
        "other entries than 0 and 1",
    ),
    "decoder inputs of another shape": (
        [*tensors_of(PAIRS), tensor("decoder_input_ids", [1])],
        422,
        "decoder_input_ids has the shape (1,)",
    ),
    "decoder inputs and a start": (
        [
            *tensors_of(PAIRS),
            tensor("decoder_input_ids", [1] * 7),
            tensor("decoder_start_token_id", [1] * 3),
        ],
        422,
        "give one of the two",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_a_wrong_tensor_is_refused_in_words(name: str, service: Any, engine: FakeEngine) -> None:
    tensors, status, words = WRONG_TENSORS[name]
    response = service.post(INFER, **pack(tensors))
    code = "malformed_body" if status == 400 else "invalid_request"
    problem = assert_problem(response, status, code)
    texts = " ".join([problem["detail"], *(fault["detail"] for fault in problem["errors"])])
    assert words in texts, texts
    assert not engine.batches
    assert_alive(service)


def json_tensor(data: Any, shape: list[int], datatype: str = "INT32") -> dict[str, Any]:
    return {"name": "source_ids", "datatype": datatype, "shape": shape, "data": data}


WRONG_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "fractions": (json_tensor([3, 4.0, 5], [3]), "other entries than integers"),
    "booleans among integers": (json_tensor([3, True, 5], [3]), "other entries than integers"),
    "texts": (json_tensor(["3", "4"], [2]), "other entries than integers"),
    "null": (json_tensor([3, None], [2]), "other entries than integers"),
    "objects": (json_tensor([{}], [1]), "other entries than integers"),
    "not a number": (json_tensor([float("nan")], [1]), "other entries than integers"),
    "too few": (json_tensor([3], [2]), "has 1 entries for its shape [2]"),
    "too many": (json_tensor([3, 4, 5], [2]), "has 3 entries for its shape [2]"),
    "rows of another length": (json_tensor([[3, 4], [5]], [2, 2]), "rows that are not of its"),
    "more rows": (json_tensor([[3], [4]], [1, 1]), "has 2 entries for its shape [1, 1]"),
    "a row among entries": (json_tensor([3, [4]], [2]), "other entries than integers"),
    "rows in one dimension": (json_tensor([[3]], [1]), "other entries than integers"),
    "rows of rows": (json_tensor([[[3]]], [1, 1]), "other entries than integers"),
    "beyond 32 bits": (json_tensor([2**31], [1]), "entries that INT32 cannot hold"),
    "beyond 64 bits": (json_tensor([2**63], [1], "INT64"), "entries that INT64 cannot hold"),
    "nothing at all": (
        {"name": "source_ids", "datatype": "INT32", "shape": [1]},
        "needs its entries",
    ),
    "JSON and bytes": (
        json_tensor([3], [1]) | {"parameters": {"binary_data_size": 4}},
        "needs its entries",
    ),
    "bytes that never come": (
        {
            "name": "source_ids",
            "datatype": "INT32",
            "shape": [1],
            "parameters": {"binary_data_size": 4},
        },
        "needs 4 bytes, and 0 are left",
    ),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data_is_refused_in_words(name: str, service: Any) -> None:
    wrong, words = WRONG_DATA[name]
    others = tensors_of({"source_ids": [[3]], "target_ids": [[5]]})[1:]
    inputs = [
        wrong,
        *(given | {"data": given["data"].tolist()} for given in others),
    ]
    response = service.post(INFER, content=json.dumps({"inputs": inputs}))  # NaN as Python has it
    problem = assert_problem(response, 400, "malformed_body")
    assert words in problem["detail"]
    assert problem["errors"][0]["loc"] == ["inputs", 0, "source_ids"]
    assert_alive(service)


def test_bytes_must_be_as_many_as_announced(service: Any) -> None:
    request = pack(tensors_of(PAIRS))
    content, headers = request["content"], request["headers"]
    length = int(headers[HEADER_LENGTH])

    def refused(content: bytes, header: str) -> str:
        response = service.post(INFER, content=content, headers=headers | {HEADER_LENGTH: header})
        return str(assert_problem(response, 400, "malformed_body")["detail"])

    assert "bytes follow the JSON" in refused(content + b"x", str(length))
    assert "are left" in refused(content[:-1], str(length))
    assert "and the body has" in refused(content, str(len(content) + 1))
    assert "and the body has" in refused(content, "9999999999")
    for header in ("-1", "1.5", "", "x", "0x10", "٣", "9" * 5000):
        if header.isascii():
            assert "not a number of bytes" in refused(content, header)
    assert "not JSON" in refused(content, str(length - 1))
    assert "not JSON" in refused(content, str(length + 1))
    assert "not JSON" in refused(content, "0")
    assert_alive(service)


WRONG_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt parameter": ({"parameters": {"label_smothing": 0.1}}, "label_smothing"),
    "a sequence": ({"parameters": {"sequence_id": 7}}, "sequence_id"),
    "the start of a sequence": ({"parameters": {"sequence_start": True}}, "sequence_start"),
    "a priority that nobody has": ({"parameters": {"priority": 3}}, "priority"),
    "smoothing beyond 1": ({"parameters": {"label_smoothing": 1.5}}, "label_smoothing"),
    "a negative timeout": ({"parameters": {"timeout": -1}}, "timeout"),
    "an endless timeout": ({"parameters": {"timeout": 10**400}}, "timeout"),
    "a start beyond 64 bits": ({"parameters": {"decoder_start_token_id": 2**64}}, "start_token"),
    "a padding that the model has not": (
        {"parameters": {"pad_token_id": VOCABULARY_SIZE}},
        "pad_token_id 50 is not in the vocabulary",
    ),
    "an unknown output": ({"outputs": [{"name": "logits"}]}, "there is no output 'logits'"),
    "an output twice": ({"outputs": [{"name": "loss"}, {"name": "loss"}]}, "asked for twice"),
    "classes of an output": (
        {"outputs": [{"name": "loss", "parameters": {"classification": 3}}]},
        "classification",
    ),
    "shared memory": (
        {"outputs": [{"name": "loss", "parameters": {"shared_memory_region": "x"}}]},
        "shared_memory_region",
    ),
    "an unknown field": ({"input": []}, "there is no field 'input'"),
    "another model": ({"model_name": "other"}, "'other' in the body and 'fake' in the path"),
    "another version": ({"model_version": "2"}, "'2' in the body and '1' in the path"),
    "a number for an id": ({"id": 7}, "id"),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_wrong_field_is_named(name: str, service: Any, engine: FakeEngine) -> None:
    fields, words = WRONG_FIELDS[name]
    response = service.post(INFER, **pack(tensors_of(PAIRS), **fields))
    problem = assert_problem(response, 422, "invalid_request")
    texts = " ".join([problem["detail"], *(fault["detail"] for fault in problem["errors"])])
    assert words in texts, texts
    assert not engine.batches


def test_a_prefix_is_a_tensor_or_a_parameter(service: Any) -> None:
    tensors = [*tensors_of(PAIRS), tensor("prefix_length", [0, 0, 0])]
    response = service.post(INFER, **pack(tensors, parameters={"prefix_length": 1}))
    problem = assert_problem(response, 422, "invalid_request")
    assert "an input and a parameter" in problem["errors"][0]["detail"]


def test_what_the_protocol_itself_sends_is_taken(service: Any) -> None:
    parameters = {
        "sequence_id": 0,
        "sequence_start": False,
        "sequence_end": False,
        "priority": 0,
        "timeout": 0,
        "binary_data_output": True,
    }
    request = pack(
        tensors_of(PAIRS), parameters=parameters, model_name="fake", model_version="1", outputs=[]
    )
    assert service.post(INFER, **request).status_code == 200


def test_too_much_is_a_413(service: Any) -> None:
    many = {"source_ids": [[3]], "target_ids": [[5]] * 101, "source_index": [0] * 101}
    assert_problem(service.post(INFER, **pack(tensors_of(many))), 413, "request_too_large")
    request = pack(tensors_of(PAIRS))
    request["content"] += b"x" * 20_000
    assert_problem(service.post(INFER, **request), 413, "request_too_large")
    nested = b'{"inputs": [%b]}' % b",".join([b"[]"] * 2_000)
    response = service.post(INFER, content=nested)
    assert_problem(response, 413, "request_too_large")


def test_unknown_models_and_versions_are_a_404(service: Any) -> None:
    request = pack(tensors_of(PAIRS))
    for path in ("/v2/models/other/infer", "/v2/models/fake/versions/2/infer"):
        assert_problem(service.post(path, **request), 404, "unknown_model")
    assert service.post("/v2/models/fake/versions/1/infer", **request).status_code == 200


PLAIN = pack(tensors_of(PAIRS))
PLAIN_HEADER = PLAIN["content"][: int(PLAIN["headers"][HEADER_LENGTH])]
PLAIN_DATA = PLAIN["content"][len(PLAIN_HEADER) :]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, str]:
    """A good body in which something was replaced, cut, or claimed differently."""
    data = bytearray(PLAIN_DATA)
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    request = json.loads(PLAIN_HEADER)
    numbers = st.one_of(
        st.integers(-2, 30), st.sampled_from([2**31, 2**63, -(2**63), 2**70]), st.floats()
    )
    for one in request["inputs"]:
        if draw(st.integers(0, 5)) == 0:
            field = draw(st.sampled_from(["shape", "datatype", "parameters", "name", "data"]))
            one[field] = draw(
                st.one_of(
                    st.lists(numbers, max_size=3),
                    numbers,
                    st.none(),
                    st.sampled_from(["INT32", "INT64", "BOOL", "FP64", "source_mask"]),
                    st.builds(lambda number: {"binary_data_size": number}, numbers),
                    st.lists(st.lists(numbers, max_size=2), max_size=3),
                )
            )
    request["parameters"] = {"on_error": "partial"}
    if draw(st.booleans()):
        name = draw(st.sampled_from(["pad_token_id", "prefix_length", "priority", "timeout"]))
        request["parameters"][name] = draw(numbers)
    header = json.dumps(request).encode()
    length = len(header) + draw(st.sampled_from([0] * 20 + [-1, 1, 10**6]))
    content = header + bytes(data[: draw(st.sampled_from([None] * 5 + [0, 1, 5]))])
    return content, str(length)


@pytest.fixture(scope="module")
def robust() -> Any:
    """A service that lives through all examples."""
    app = create_app(
        {"fake": fake_bundle()},
        Settings(warm_up=False),
        registry=CollectorRegistry(),
        load=lambda *_: FakeEngine(),
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/v2/health/ready").status_code != 200:
            pass
        yield client


@settings(max_examples=400)
@given(mutated())
def test_whatever_comes_is_answered_or_refused(robust: Any, made: tuple[bytes, str]) -> None:
    content, length = made
    response = robust.post(INFER, content=content, headers={HEADER_LENGTH: length})
    # 504 is what a timeout of some microseconds asks for.
    assert response.status_code in (200, 400, 413, 422, 429, 504), response.text
    if response.status_code == 200:
        assert len(unpack(response)["loss"]) == len(unpack(response)["error_code"])
    else:
        assert response.json()["error"]


@settings(max_examples=200)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 250)))
def test_any_bytes_are_refused(robust: Any, content: bytes, length: int | None) -> None:
    headers = {} if length is None else {HEADER_LENGTH: str(length)}
    response = robust.post(INFER, content=content, headers=headers)
    assert response.status_code in (400, 413, 422), response.text


# ---------------------------------------------------------------- options, metrics


def test_a_client_that_goes_away_is_forgotten(make_client: Any) -> None:
    held = HeldEngine()
    service = make_client(engine=held)
    body = pack(tensors_of(PAIRS), binary=False)["content"]
    with ThreadPoolExecutor(1) as threads:
        first = occupy(service, held, threads)
        service.portal.call(vanish_after_sending, service.app, INFER, body)
        assert metric(service, "seqloss_cancelled_pairs_total", model="fake") == 3
        held.let_go.set()
        assert first.result().status_code == 200
    assert metric(service, "seqloss_queue_tokens", model="fake") == 0
    assert len(held.batches) == 1, "pairs that nobody waits for were computed"


def test_a_deadline_is_in_microseconds(make_client: Any) -> None:
    service = make_client()
    request = pack(tensors_of(PAIRS), parameters={"timeout": 1})
    assert service.post(INFER, **request).status_code == 504
    request = pack(tensors_of(PAIRS), parameters={"timeout": 60_000_000})
    assert service.post(INFER, **request).status_code == 200


@pytest.mark.parametrize(
    ("number", "priority"), [(0, "interactive"), (1, "interactive"), (2, "bulk")]
)
def test_priorities_have_numbers(number: int, priority: str, service: Any) -> None:
    request = pack(tensors_of(PAIRS), parameters={"priority": number})
    assert service.post(INFER, **request).status_code == 200
    assert metric(service, "seqloss_pairs_total", priority=priority, outcome="scored") == 3


def test_parsing_is_timed_by_format_and_losses_by_stream(service: Any) -> None:
    news = {"X-Seqloss-Stream": "news"}
    for binary in (True, False):
        request = pack(tensors_of(PAIRS), binary=binary)
        response = service.post(
            INFER, content=request["content"], headers=request["headers"] | news
        )
        timings = response.headers["server-timing"]
        assert all(f"{stage};dur=" in timings for stage in ("parse", "queue", "compute"))
    for form in ("binary", "tensors_json"):
        assert metric(service, "seqloss_parse_duration_seconds_count", format=form) == 1
    assert metric(service, "seqloss_pair_mean_nll_count", stream="news") == 6
    assert (
        metric(
            service,
            "seqloss_http_request_duration_seconds_count",
            route="/v2/models/{name}/infer",
            status="200",
        )
        == 2
    )


# ---------------------------------------------------------------- what is served


def test_the_service_says_what_it_speaks(service: Any) -> None:
    assert service.get("/v2/health/live").json() == {"live": True}
    assert service.get("/v2/health/ready").json() == {"ready": True}
    server = service.get("/v2").json()
    assert server["name"] == "seqloss"
    assert server["version"] == seqloss.__version__
    assert {"binary_tensor_data", "model_configuration", "statistics"} <= set(server["extensions"])


@pytest.mark.parametrize("prefix", ["/v2/models/fake", "/v2/models/fake/versions/1"])
def test_a_model_names_its_tensors(prefix: str, service: Any) -> None:
    assert service.get(f"{prefix}/ready").json() == {"name": "fake", "ready": True}
    metadata = service.get(prefix).json()
    assert metadata["versions"] == ["1"]
    assert metadata["platform"] == "seqloss_torch"
    assert [output["name"] for output in metadata["outputs"]] == EVERYTHING
    config = service.get(f"{prefix}/config").json()
    required = {given["name"] for given in config["input"] if not given["optional"]}
    assert required == {"source_ids", "source_lengths", "target_ids", "target_lengths"}
    for described, configured in (("inputs", "input"), ("outputs", "output")):
        assert [
            (given["name"], f"TYPE_{given['datatype']}", given["shape"])
            for given in metadata[described]
        ] == [(given["name"], given["data_type"], given["dims"]) for given in config[configured]]
    assert config["parameters"]["error_codes"]["string_value"].split(",") == list(PAIR_CODES)
    types = {given["name"]: given["datatype"] for given in metadata["outputs"]}
    reply = unpack(service.post(f"{prefix}/infer", **pack(tensors_of(PAIRS), outputs=EVERYTHING)))
    assert {name: values.dtype.str for name, values in reply.items()} == {
        name: {"FP64": "<f8", "FP32": "<f4", "INT32": "<i4"}[datatype]
        for name, datatype in types.items()
    }
    for path in ("", "/ready", "/config", "/stats"):
        assert_problem(service.get(f"/v2/models/other{path}"), 404, "unknown_model")
        assert_problem(service.get(f"/v2/models/fake/versions/2{path}"), 404, "unknown_model")


def test_statistics_count_what_was_scored(service: Any) -> None:
    for _ in range(3):
        assert service.post(INFER, **pack(tensors_of(PAIRS))).status_code == 200
    assert service.post("/loss", json=GOOD).status_code == 200
    (stats,) = service.get("/v2/models/stats").json()["model_stats"]
    assert service.get("/v2/models/fake/stats").json() == {"model_stats": [stats]}
    assert (stats["name"], stats["version"]) == ("fake", "1")
    assert stats["inference_count"] == 10
    assert stats["execution_count"] == 4
    durations = stats["inference_stats"]
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert durations[name]["count"] == 4, name
        assert 0 < durations[name]["ns"] < 60e9, name
    assert durations["queue"]["ns"] + durations["compute_infer"]["ns"] <= durations["success"]["ns"]
    assert durations["cache_hit"] == {"count": 0, "ns": 0}


def test_the_index_lists_models_and_states(service: Any) -> None:
    listed = [{"name": "fake", "version": "1", "state": "READY", "reason": ""}]
    assert service.post("/v2/repository/index").json() == listed
    assert service.post("/v2/repository/index", json={"ready": True}).json() == listed
    assert_problem(service.post("/v2/repository/index", content=b"{"), 400, "malformed_body")


def test_while_it_loads_nothing_is_ready(make_client: Any) -> None:
    let_go = threading.Event()

    def load(*_: object) -> FakeEngine:
        assert let_go.wait(30)
        return FakeEngine()

    service = make_client(wait=False, load=load)
    try:
        assert service.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/fake/ready"):
            assert_problem(service.get(path), 503, "not_ready")
        assert_problem(service.post(INFER, **pack(tensors_of(PAIRS))), 503, "not_ready")
        (model,) = service.post("/v2/repository/index").json()
        assert model["state"] == "LOADING"
        assert model["reason"]
        assert service.post("/v2/repository/index", json={"ready": True}).json() == []
        assert service.get("/v2/models/fake").json()["platform"] == "seqloss"
    finally:
        let_go.set()


# ---------------------------------------------------------------- a real model


def test_reproducible_requests_have_the_same_bits_as_post_loss(
    make_client: Any, bundle_of: Any
) -> None:
    """A real model, more than one batch, both wires: not one bit is different."""
    service = make_client({"demo": bundle_of("demo")}, device="cpu")
    random = np.random.default_rng(7)
    rows = [[*random.integers(3, 500, random.integers(2, 40)).tolist(), 1] for _ in range(240)]
    body = {"source_ids": rows[:120], "target_ids": rows[120:]}
    options = {"label_smoothing": 0.1, "reproducible": True}
    expected = body | options
    for binary in (True, False):
        request = pack(
            tensors_of(body, padded=binary),
            binary=binary,
            outputs=EVERYTHING,
            parameters=options | {"binary_data_output": binary},
        )
        response = service.post("/v2/models/demo/infer", **request)
        assert_same_as_loss(service, expected, unpack(response), "demo")
