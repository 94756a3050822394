"""What /openapi.json promises, held against the service by requests that schemathesis makes up."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import schemathesis
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from schemathesis.config import SchemathesisConfig
from schemathesis.openapi import from_dict
from starlette.types import Receive, Scope, Send

from fake_texts import fake_text_bundle
from fakes import EOS, MAX_TOKENS, VOCABULARY_SIZE, FakeEngine
from seqloss.http.app import create_app
from seqloss.settings import Settings

CONFIG = {
    # Each run makes up the same requests: a fault that was found is found again.
    "generation": {"deterministic": True, "max-examples": 300},
    "checks": {
        # It takes 1.0 for an integer, as JSON Schema does, and every integer for an id that the
        # model has. Here ids are strict integers within a vocabulary, and 422 is the right answer.
        "positive_data_acceptance": {"enabled": False},
        # 504 is what a request asks for whose `timeout_ms` nobody can keep.
        "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "504"]},
    },
}


# Whose tokenizer is read when the first text comes.
FOLDER = tempfile.TemporaryDirectory()


class Service:
    """A new application for each test: schemathesis shuts it down after one, for good."""

    def __init__(self) -> None:
        self.app = self._new()

    @staticmethod
    def _new() -> FastAPI:
        return create_app(
            {"fake": fake_text_bundle(Path(FOLDER.name))},
            Settings(warm_up=False),
            registry=CollectorRegistry(),
            load=lambda *_: FakeEngine(),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.app = self._new()
        else:
            await self.app.state.loading
        await self.app(scope, receive, send)


SERVICE = Service()


def promised(**generation: Any) -> Any:
    """The schema as schemathesis reads it; it makes up what fits and what does not."""
    config = CONFIG | {"generation": CONFIG["generation"] | generation}
    schema = from_dict(SERVICE.app.openapi(), config=SchemathesisConfig.from_dict(config))
    schema.app = SERVICE
    return schema


ANY = promised()
FITTING = promised(mode="positive").include(path="/loss", method="POST")
FITTING_TEXTS = promised(mode="positive").include(path="/loss/text", method="POST")


@ANY.parametrize()
def test_every_answer_is_one_that_the_schema_promises(case: schemathesis.Case) -> None:
    case.call_and_validate()


@FITTING.parametrize()
def test_answers_to_ids_that_the_model_has_are_promised_too(case: schemathesis.Case) -> None:
    """Numbers made up are hardly ever ids of the model: all else would hide behind that."""
    case.body |= ids_of_the_model(case.body)
    case.body.pop("model", None)
    case.call_and_validate()


KEPT = ("return", "label_smoothing", "smoothing", "on_error", "truncation", "priority")


@FITTING.parametrize()
def test_what_contradicts_nothing_is_scored(case: schemathesis.Case) -> None:
    case.body = ids_of_the_model(case.body) | {
        name: case.body[name] for name in KEPT if name in case.body
    }
    response = case.call_and_validate()
    assert response.status_code == 200, response.text


@FITTING_TEXTS.parametrize()
def test_texts_that_contradict_nothing_are_scored(case: schemathesis.Case) -> None:
    num_pairs = min(len(case.body["sources"]), len(case.body["targets"]))
    case.body = {
        side: [" ".join(text.split()[: MAX_TOKENS - 1]) for text in case.body[side][:num_pairs]]
        for side in ("sources", "targets")
    } | {name: case.body[name] for name in (*KEPT, "tokens") if name in case.body}
    response = case.call_and_validate()
    assert response.status_code == 200, response.text


def ids_of_the_model(body: dict[str, Any]) -> dict[str, Any]:
    """As many sources as targets, none empty or too long, a third of the targets' ids ignored."""
    sources, targets = (
        [[int(number) % VOCABULARY_SIZE for number in row[: MAX_TOKENS - 1]] for row in body[side]]
        for side in ("source_ids", "target_ids")
    )
    num_pairs = min(len(sources), len(targets))
    return {
        "source_ids": [[*row, EOS] for row in sources[:num_pairs]],
        "target_ids": [
            [*(number if number % 3 else -100 for number in row), EOS]
            for row in targets[:num_pairs]
        ],
    }


def test_a_model_is_described_as_promised() -> None:
    case = ANY["/models/{name}"]["GET"].Case(path_parameters={"name": "fake"})
    assert case.call_and_validate().status_code == 200
