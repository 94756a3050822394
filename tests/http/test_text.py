"""POST /loss/text: the ids that a model gets for texts, and what the reply says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_bad_requests import JSON, assert_alive, assert_problem
from test_service import metric
from tokenizers import Tokenizer

from fake_texts import GERMAN, TOKENIZER_PATH, fake_text_bundle
from fakes import EOS, MAX_TOKENS, START, VOCABULARY_SIZE, FakeEngine, fake_bundle, fake_nll
from seqloss.bundle.manifest import File, Languages, sha256_of
from seqloss.bundle.reader import Bundle
from seqloss.demo import CHECKPOINT

FRENCH = 41


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


MakeBundle = Callable[..., Bundle]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """The fake model with a tokenizer: `w7` has the id 7, and texts end in `</s>`."""
    return partial(fake_text_bundle, tmp_path)


@pytest.fixture
def service(make_client: Any, make_bundle: MakeBundle, engine: FakeEngine) -> Any:
    return make_client(
        {"fake": make_bundle()},
        load=lambda *_: engine,
        max_body_bytes=2_000_000,
        max_pairs_per_request=100,
    )


def loss_of(source: list[int], target: list[int], start: int = START) -> float:
    fed = [start, *target[:-1]]
    return sum(fake_nll(source, *one) for one in zip(fed, target, strict=True))


# ---------------------------------------------------------------- what is scored


def test_losses_are_those_of_the_ids_of_the_texts(service: Any) -> None:
    body = {
        "sources": ["w3 w4", "w5"],
        "targets": ["w6", "w7 w8", "w9"],
        "source_index": [1, 0, 1],
        "return": ["token_losses"],
    }
    response = service.post("/loss/text", json=body)
    assert response.status_code == 200, response.text
    reply = response.json()
    expected = [
        loss_of([5, EOS], [6, EOS]),
        loss_of([3, 4, EOS], [7, 8, EOS]),
        loss_of([5, EOS], [9, EOS]),
    ]
    assert reply["losses"] == pytest.approx(expected)
    assert reply["num_tokens"] == [2, 3, 2]
    assert reply["source_tokens"] == [["w3", "w4", "</s>"], ["w5", "</s>"]]
    assert reply["source_offsets"] == [[[0, 2], [3, 5], None], [[0, 2], None]]
    assert reply["target_tokens"] == [["w6", "</s>"], ["w7", "w8", "</s>"], ["w9", "</s>"]]
    assert reply["target_offsets"][1] == [[0, 2], [3, 5], None]
    assert [len(row) for row in reply["token_losses"]] == [2, 3, 2]
    assert reply["usage"]["source_tokens"] == 5


def test_tokens_are_left_out_on_request(service: Any) -> None:
    body = {"sources": ["w3"], "targets": ["w6"], "tokens": False}
    reply = service.post("/loss/text", json=body).json()
    assert reply["losses"] == pytest.approx([loss_of([3, EOS], [6, EOS])])
    assert not {"source_tokens", "source_offsets", "target_tokens", "target_offsets"} & set(reply)


def test_offsets_are_of_characters_and_not_of_bytes(service: Any) -> None:
    text = "🦊🦊 w3 ü w4"
    reply = service.post("/loss/text", json={"sources": [text], "targets": [text]}).json()
    (spans,) = reply["source_offsets"]
    assert [text[slice(*span)] for span in spans[:-1]] == ["🦊🦊", "w3", "ü", "w4"]
    assert reply["source_tokens"] == [["<unk>", "w3", "<unk>", "w4", "</s>"]]


LANGUAGES: dict[str, tuple[Any, list[int], list[int], int, int]] = {
    # The places, then what the model should see of `w3` and `w6`, from French into German.
    "first, first": (("first", "first"), [FRENCH, 3, EOS], [GERMAN, 6, EOS], START, 1),
    "last, first": (("last", "first"), [3, EOS, FRENCH], [GERMAN, 6, EOS], START, 1),
    "last, start": (("last", "decoder_start"), [3, EOS, FRENCH], [6, EOS], GERMAN, 0),
    "none, tag": (("none", "first_of_source"), [GERMAN, 3, EOS], [6, EOS], START, 0),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_languages_go_where_the_model_learnt_them(
    name: str, make_client: Any, make_bundle: MakeBundle, engine: FakeEngine
) -> None:
    (source, target), source_ids, target_ids, start, prefix = LANGUAGES[name]
    languages = Languages(ids={"de": GERMAN, "fr": FRENCH}, source=source, target=target)
    service = make_client({"fake": make_bundle(languages=languages)}, load=lambda *_: engine)
    body = {
        "sources": ["w3"],
        "targets": ["w6"],
        "source_language": None if source == "none" else "fr",
        "target_language": "de",
        "return": ["token_nlls"],
    }
    response = service.post("/loss/text", json=body)
    assert response.status_code == 200, response.text
    fed = [start, *target_ids[:-1]]
    nlls = [fake_nll(source_ids, *one) for one in zip(fed, target_ids, strict=True)]
    reply = response.json()
    assert reply["token_nlls"] == [[*[None] * prefix, *map(pytest.approx, nlls[prefix:])]]
    assert reply["num_tokens"] == [len(target_ids) - prefix]

    def names(ids: list[int]) -> list[str]:
        return ["</s>" if i == EOS else ">>de<<" if i == GERMAN else f"w{i}" for i in ids]

    assert reply["source_tokens"] == [names(source_ids)]
    assert reply["target_tokens"] == [names(target_ids)]
    stands_for = [(0, 2) if index == 3 else None for index in source_ids]
    assert reply["source_offsets"] == [[span and list(span) for span in stands_for]]
    assert len(reply["target_offsets"][0]) == len(target_ids)


def test_a_tag_may_be_in_the_text_and_not_in_both_places(
    make_client: Any, make_bundle: MakeBundle, engine: FakeEngine
) -> None:
    languages = Languages(ids={"de": GERMAN}, source="none", target="first_of_source")
    service = make_client({"fake": make_bundle(languages=languages)}, load=lambda *_: engine)
    body = {"sources": ["w9", ">>de<< w3"], "targets": ["w6", "w6"]}
    reply = service.post("/loss/text", json=body).json()
    assert reply["losses"][1] == pytest.approx(loss_of([GERMAN, 3, EOS], [6, EOS]))
    response = service.post("/loss/text", json=body | {"target_language": "de"})
    problem = assert_problem(response, 422, "invalid_request")
    assert [fault["loc"] for fault in problem["errors"]] == [["sources", 1]]
    assert "give one of the two" in problem["detail"]


def test_the_demo_scores_the_example_of_its_documentation(
    make_client: Any, bundle_of: Callable[[str], Bundle]
) -> None:
    service = make_client({"demo": bundle_of("demo")})
    document = service.get("/openapi.json").json()
    schema = document["paths"]["/loss/text"]["post"]["requestBody"]["content"]["application/json"]
    (example,) = schema["schema"]["examples"]
    response = service.post("/loss/text", json=example | {"reproducible": True})
    assert response.status_code == 200, response.text
    right, wrong = response.json()["losses"]
    assert right < 1
    assert wrong > 5
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    by_ids = service.post(
        "/loss",
        json={
            "source_ids": [tokenizer.encode(f">>de<< {example['sources'][0]}").ids],
            "target_ids": [tokenizer.encode(target).ids for target in example["targets"]],
            "source_index": [0, 0],
            "reproducible": True,
        },
    )
    assert by_ids.json()["losses"] == [right, wrong]
    # As a tag in the text.
    tagged = {"sources": [f">>de<< {example['sources'][0]}"], "targets": example["targets"][:1]}
    assert service.post("/loss/text", json=tagged).json()["losses"] == pytest.approx([right])


def test_requests_are_timed(service: Any) -> None:
    response = service.post("/loss/text", json={"sources": ["w3"], "targets": ["w6"]})
    assert "parse;dur=" in response.headers["server-timing"]
    assert metric(service, "seqloss_parse_duration_seconds_count", format="text") == 1
    assert metric(service, "seqloss_parse_duration_seconds_count", format="json") == 0


# ---------------------------------------------------------------- what cannot be scored


def test_a_text_of_no_tokens_is_empty_and_one_that_only_ends_is_not(
    service: Any, make_client: Any, make_bundle: MakeBundle, engine: FakeEngine
) -> None:
    reply = service.post("/loss/text", json={"sources": [""], "targets": [" "]}).json()
    assert reply["losses"] == pytest.approx([loss_of([EOS], [EOS])])
    assert reply["source_tokens"] == reply["target_tokens"] == [["</s>"]]
    endless = make_client({"fake": make_bundle(ends=False)}, load=lambda *_: engine)
    body = {"sources": ["", "w3", "w3"], "targets": ["w6", "", "w6"]}
    problem = assert_problem(endless.post("/loss/text", json=body), 422, "invalid_request")
    assert [(fault["index"], fault["code"], fault["loc"]) for fault in problem["errors"]] == [
        (0, "empty_source", ["sources", 0]),
        (1, "empty_target", ["targets", 1]),
    ]
    response = endless.post("/loss/text", json=body | {"on_error": "partial"})
    assert response.status_code == 200, response.text
    reply = response.json()
    assert reply["losses"] == [None, None, pytest.approx(loss_of([3], [6]))]
    assert [fault["code"] for fault in reply["errors"]] == ["empty_source", "empty_target"]
    assert reply["target_tokens"] == [["w6"], [], ["w6"]]


def test_texts_over_the_limit_are_faults_or_cut(service: Any) -> None:
    long = " ".join(["w7"] * MAX_TOKENS)
    body = {"sources": [long, "w3"], "targets": ["w6", long], "return": ["token_losses"]}
    problem = assert_problem(service.post("/loss/text", json=body), 422, "invalid_request")
    assert [(fault["code"], fault["loc"]) for fault in problem["errors"]] == [
        ("source_too_long", ["sources", 0]),
        ("target_too_long", ["targets", 1]),
    ]
    reply = service.post("/loss/text", json=body | {"truncation": True}).json()
    assert reply["num_truncated_source_tokens"] == [1, 0]
    assert reply["num_truncated_target_tokens"] == [0, 1]
    # Tokens are those of the text as sent, and the one that was cut has no loss.
    assert len(reply["target_tokens"][1]) == len(reply["token_losses"][1]) == MAX_TOKENS + 1
    assert reply["token_losses"][1][-1] is None


def test_a_token_that_the_model_has_not_is_a_fault_of_its_text(service: Any) -> None:
    body = {"sources": ["w3", "w3"], "targets": ["w6", f"w6 w{VOCABULARY_SIZE}"]}
    problem = assert_problem(service.post("/loss/text", json=body), 422, "invalid_request")
    assert [(fault["code"], fault["loc"]) for fault in problem["errors"]] == [
        ("token_out_of_range", ["targets", 1])
    ]


NEEDS_BOTH = Languages(ids={"de": GERMAN, "fr": FRENCH}, source="first", target="first")
NEEDS_NONE = Languages(ids={"de": GERMAN}, source="none", target="first_of_source")
WRONG_LANGUAGES: dict[str, tuple[Languages | None, dict[str, str], list[tuple[str, str]]]] = {
    "missing": (
        NEEDS_BOTH,
        {},
        [("missing_language", "source_language"), ("missing_language", "target_language")],
    ),
    "unknown": (
        NEEDS_BOTH,
        {"source_language": "fr", "target_language": "deu" * 1000},
        [("unknown_language", "target_language")],
    ),
    "not told": (
        NEEDS_NONE,
        {"source_language": "de", "target_language": "de"},
        [("unknown_language", "source_language")],
    ),
    "no languages": (
        None,
        {"target_language": "de"},
        [("unknown_language", "target_language")],
    ),
}


@pytest.mark.parametrize("name", WRONG_LANGUAGES)
def test_wrong_languages_are_a_422_that_names_those_that_exist(
    name: str, make_client: Any, make_bundle: MakeBundle, engine: FakeEngine
) -> None:
    languages, given, faults = WRONG_LANGUAGES[name]
    service = make_client({"fake": make_bundle(languages=languages)}, load=lambda *_: engine)
    body = {"sources": ["w3"], "targets": ["w6"]} | given
    problem = assert_problem(service.post("/loss/text", json=body), 422, "invalid_request")
    assert [(fault["code"], fault["loc"]) for fault in problem["errors"]] == [
        (code, [field]) for code, field in faults
    ]
    assert ("de, fr" in problem["detail"]) == (languages is NEEDS_BOTH)
    assert len(problem["detail"]) < 500
    assert not engine.batches


def test_a_bundle_without_tokenizer_is_a_422_that_says_how_to_get_one(
    make_client: Any, engine: FakeEngine
) -> None:
    service = make_client(engine=engine)
    response = service.post("/loss/text", json={"sources": ["w3"], "targets": ["w6"]})
    problem = assert_problem(response, 422, "no_tokenizer")
    assert "seqloss export" in problem["detail"]
    assert service.get("/models/fake").json()["text"] is False
    assert_alive(service)


def test_a_tokenizer_that_was_changed_is_not_used(
    make_client: Any, make_bundle: MakeBundle, engine: FakeEngine
) -> None:
    bundle = make_bundle()
    service = make_client({"fake": bundle}, load=lambda *_: engine)
    path = bundle.folder / TOKENIZER_PATH
    path.write_text(path.read_text().replace('"w3"', '"w03"'))
    response = service.post("/loss/text", json={"sources": ["w3"], "targets": ["w6"]})
    assert_problem(response, 500, "internal_error")
    assert_alive(service)


def test_a_tokenizer_that_does_not_load_is_a_422_that_says_why(
    make_client: Any, make_bundle: MakeBundle, engine: FakeEngine
) -> None:
    bundle = make_bundle()
    path = bundle.folder / TOKENIZER_PATH
    path.write_text('{"version": "7.0"}')
    listed = {TOKENIZER_PATH: File(sha256=sha256_of(path), num_bytes=path.stat().st_size)}
    changed = Bundle(
        bundle.folder, bundle.manifest.model_copy(update={"files": listed}), bundle.digest
    )
    service = make_client({"fake": changed}, load=lambda *_: engine)
    response = service.post("/loss/text", json={"sources": ["w3"], "targets": ["w6"]})
    problem = assert_problem(response, 422, "no_tokenizer")
    assert TOKENIZER_PATH in problem["detail"]


WRONG_FIELDS: dict[str, dict[str, Any]] = {
    "ids": {"sources": [[3]]},
    "a number": {"sources": [3]},
    "one text": {"sources": "w3"},
    "null": {"targets": [None]},
    "a mask": {"target_mask": [[1]]},
    "a start": {"decoder_start_token_id": 3},
    "a misspelt field": {"label_smothing": 0.1},
    "counts differ": {"sources": ["w3", "w4"]},
    "index too short": {"source_index": []},
    "index out of range": {"source_index": [1]},
    "languages": {"target_language": ["de"]},
    "tokens": {"tokens": 1},
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_wrong_fields_are_a_422_that_names_them(name: str, service: Any) -> None:
    body = {"sources": ["w3"], "targets": ["w6"]} | WRONG_FIELDS[name]
    problem = assert_problem(service.post("/loss/text", json=body), 422, "invalid_request")
    (fault,) = problem["errors"]
    assert fault["loc"][0] in {*WRONG_FIELDS[name], "source_index"}


@pytest.mark.parametrize(
    "text", [r"\ud800", r"a\udfffb", r"\ud83d\u0041", r"\u0000", r"a\u0000b", r"\uffff\ufffe"]
)
def test_texts_that_are_hardly_text_break_nothing(text: str, service: Any) -> None:
    content = f'{{"sources": ["w3 {text}"], "targets": ["{text}"]}}'.encode()
    response = service.post("/loss/text", content=content, headers=JSON)
    if r"\ud" in text:
        assert_problem(response, 400, "malformed_body")
    else:
        assert response.status_code == 200, response.text
        json.loads(response.content)
    assert_alive(service)


def test_too_many_texts_are_a_413(service: Any) -> None:
    for body in (
        {"sources": ["w3"], "targets": ["w6"] * 101, "source_index": [0] * 101},
        {"sources": ["w3"] * 101, "targets": ["w6"], "source_index": [0]},
    ):
        problem = assert_problem(service.post("/loss/text", json=body), 413, "request_too_large")
        assert "at most 100" in problem["detail"]


def test_an_endless_text_is_a_413(service: Any) -> None:
    """Before it is encoded, which takes a thousand times the memory."""
    body = {"sources": ["w3", "w" * 600_000], "targets": ["w6", "w6"]}
    problem = assert_problem(service.post("/loss/text", json=body), 413, "request_too_large")
    assert [fault["loc"] for fault in problem["errors"]] == [["sources", 1]]


def test_several_models_are_named_and_unknown_ones_refused(
    make_client: Any, make_bundle: MakeBundle, engine: FakeEngine
) -> None:
    bundles = {"one": make_bundle(), "two": fake_bundle()}
    service = make_client(bundles, load=lambda *_: FakeEngine())
    body = {"sources": ["w3"], "targets": ["w6"]}
    assert_problem(service.post("/loss/text", json=body), 422, "invalid_request")
    assert_problem(service.post("/loss/text", json=body | {"model": "x"}), 404, "unknown_model")
    assert service.post("/loss/text", json=body | {"model": "one"}).json()["model"] == "one"
    assert_problem(service.post("/loss/text", json=body | {"model": "two"}), 422, "no_tokenizer")


# ---------------------------------------------------------------- what a process loads


PROGRAM = """
import sys
from prometheus_client import CollectorRegistry
from fastapi.testclient import TestClient
from pathlib import Path
from seqloss.bundle.reader import open_bundle
from seqloss.http.app import create_app
from seqloss.settings import Settings

if {blocked}:
    sys.modules["tokenizers"] = None
bundle = open_bundle(Path({folder!r}))
app = create_app({{"demo": bundle}}, Settings(warm_up=False), registry=CollectorRegistry())
with TestClient(app) as client:
    while client.get("/health/ready").status_code != 200:
        pass
    by_ids = client.post("/loss", json={{"source_ids": [[1, 2]], "target_ids": [[3, 4]]}})
    before = "tokenizers" in sys.modules and not {blocked}
    by_texts = client.post("/loss/text", json={{"sources": ["a"], "targets": ["b"]}})
    print(by_ids.status_code, before, by_texts.status_code)
    print(by_texts.json().get("detail"))
    print(*{{name.partition(".")[0] for name in sys.modules}})
"""


@pytest.mark.parametrize("blocked", [False, True])
def test_tokenizers_are_loaded_with_the_first_text_and_missed_by_texts_alone(
    blocked: bool, bundle_of: Callable[[str], Bundle]
) -> None:
    program = PROGRAM.format(blocked=blocked, folder=str(bundle_of("demo").folder))
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    statuses, detail, modules = done.stdout.splitlines()[-3:]
    assert statuses == f"200 False {422 if blocked else 200}"
    assert ("pip install 'seqloss[text]'" in detail) == blocked
    assert "transformers" not in modules.split()
