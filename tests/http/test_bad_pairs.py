"""Bad pairs beside good ones with a real model, on every engine: none reaches it or spoils it."""

from __future__ import annotations

from typing import Any

import pytest

from bad_pairs import BAD_PAIRS
from checkpoints import save_checkpoint
from conftest import on_every_engine
from fakes import MAX_TOKENS, PAD, START, VOCABULARY_SIZE
from seqloss.bundle.manifest import EngineName
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.export.exporter import ExportOptions, export_checkpoint

pytestmark = on_every_engine


@pytest.fixture(scope="module")
def bundle(engine_name: EngineName, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A Marian model with the limits of the fake one, for which the bad pairs are written."""
    folder = tmp_path_factory.mktemp("small")
    checkpoint = save_checkpoint(
        "marian",
        folder / "checkpoint",
        vocab_size=VOCABULARY_SIZE,
        pad_token_id=PAD,
        decoder_start_token_id=START,
        max_position_embeddings=MAX_TOKENS,
    )
    export_checkpoint(str(checkpoint), folder / "bundle", ExportOptions(engines=(engine_name,)))
    return open_bundle(folder / "bundle")


@pytest.fixture
def service(bundle: Bundle, make_client: Any) -> Any:
    return make_client({"small": bundle}, device="cpu")


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_has_its_reason_and_the_others_their_losses(name: str, service: Any) -> None:
    changes, code, loc = BAD_PAIRS[name]
    body = {"source_ids": [[3], [4], [5]], "target_ids": [[5], [6], [7]]} | changes
    refused = service.post("/loss", json=body)
    assert refused.status_code == 422, refused.text
    faults = refused.json()["errors"]
    assert [(fault["index"], fault["code"], fault["loc"]) for fault in faults] == [(1, code, loc)]
    reply = service.post("/loss", json=body | {"on_error": "partial"}).json()
    assert [(fault["index"], fault["code"]) for fault in reply["errors"]] == [(1, code)]
    assert reply["losses"][1] is None
    keep = {
        field: [value[0], value[2]] if isinstance(value, list) else value
        for field, value in body.items()
    }
    alone = service.post("/loss", json=keep)
    assert alone.status_code == 200, alone.text
    others = [reply["losses"][0], reply["losses"][2]]
    assert others == pytest.approx(alone.json()["losses"], abs=2e-5)
    assert all(loss > 0 for loss in others)
