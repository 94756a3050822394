"""The service against transformers, family by family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import (
    MAIN_FAMILIES,
    MAX_POSITIONS,
    RECIPES,
    VOCABULARY_SIZE,
    make_model,
    save_checkpoint,
)
from conftest import on_every_engine
from numeric.reference import random_pairs, reference
from seqloss.bundle.manifest import EngineName
from seqloss.bundle.reader import open_bundle
from seqloss.export.exporter import ExportOptions, export_checkpoint

TOLERANCE = 2e-5

pytestmark = on_every_engine


def scored(client: Any, request: dict[str, Any], **changes: Any) -> dict[str, Any]:
    response = client.post("/loss", json=request | changes)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def largest_difference(rows: list[list[float]], expected: list[np.ndarray]) -> float:
    return max(
        float(np.abs(np.array(row) - want).max()) for row, want in zip(rows, expected, strict=True)
    )


@pytest.fixture
def case(
    family: str, device: str, bundle_of: Any, make_client: Any
) -> tuple[Any, dict[str, Any], list[Any]]:
    """A service of the family, a request, and what transformers says of each of its targets."""
    model = make_model(family)
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    absent = pad if RECIPES[family].pads_are_padding else None
    request = random_pairs(5, VOCABULARY_SIZE, MAX_POSITIONS, absent=absent, start=start, pad=pad)
    expected = [
        reference(model, request["source_ids"][index], [start, *target[:-1]], target)
        for index, target in zip(request["source_index"], request["target_ids"], strict=True)
    ]
    return make_client({family: bundle_of(family)}, device=device), request, expected


def test_all_terms_match_transformers(case: Any) -> None:
    client, request, expected = case
    reply = scored(client, request, **{"return": ["token_nlls", "token_ranks", "token_entropies"]})
    assert largest_difference(reply["token_nlls"], [one.nll for one in expected]) <= TOLERANCE
    assert largest_difference(reply["token_entropies"], [one.entropy for one in expected]) <= (
        TOLERANCE
    )
    for ranks, one in zip(reply["token_ranks"], expected, strict=True):
        assert (ranks >= one.least_rank).all()
        assert (ranks <= one.largest_rank).all()
    # With all the probability spread, the loss is the mean over the classes.
    reply = scored(client, request, label_smoothing=1.0, **{"return": ["token_losses"]})
    means = [one.negative_mean_logprob for one in expected]
    assert largest_difference(reply["token_losses"], means) <= TOLERANCE


def test_the_random_models_are_peaked_and_biased(case: Any, family: str) -> None:
    """Flat models hide errors: the ones used here are sure of themselves, and often wrong."""
    _, _, expected = case
    entropy = np.concatenate([one.entropy for one in expected])
    nll = np.concatenate([one.nll for one in expected])
    assert entropy.mean() < 0.7 * np.log(VOCABULARY_SIZE)
    assert nll.mean() > 2
    bias = getattr(make_model(family), "final_logits_bias", None)
    assert bias is None or bias.abs().max() > 0.5


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_given_start_ids_and_decoder_inputs_are_used(
    family: str, bundle_of: Any, make_client: Any
) -> None:
    model = make_model(family)
    client = make_client({family: bundle_of(family)})
    request = random_pairs(6, VOCABULARY_SIZE, 12, pad=model.config.pad_token_id)
    sources = [request["source_ids"][index] for index in request["source_index"]]
    targets = request["target_ids"]
    starts = [(7 * index) % VOCABULARY_SIZE for index in range(len(targets))]
    inputs = [[start, *target[:-1]] for start, target in zip(starts, targets, strict=True)]
    expected = [reference(model, *one).nll for one in zip(sources, inputs, targets, strict=True)]
    asked = {"return": ["token_nlls"]}
    by_start = scored(client, request, decoder_start_token_id=starts, **asked)
    by_inputs = scored(client, request, decoder_input_ids=inputs, **asked)
    assert by_start["token_nlls"] == by_inputs["token_nlls"]
    assert largest_difference(by_start["token_nlls"], expected) <= TOLERANCE


def test_pad_ids_inside_the_data_are_ids(bundle_of: Any, make_client: Any) -> None:
    """Given ids, M2M100 itself would count positions by `ids != pad`, and so change the losses."""
    model = make_model("m2m_100")
    pad, start = model.config.pad_token_id, model.config.decoder_start_token_id
    source, target = [11, pad, 12, pad, 13], [21, pad, pad, 22]
    expected = reference(model, source, [start, *target[:-1]], target).nll
    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor([source]),
            attention_mask=torch.ones(1, 5, dtype=torch.int64),
            decoder_input_ids=torch.tensor([[start, *target[:-1]]]),
        ).logits[0]
    by_ids = -logits.log_softmax(-1)[range(4), target].numpy()
    assert np.abs(by_ids - expected).max() > 0.1
    client = make_client({"m2m_100": bundle_of("m2m_100")})
    request = {"source_ids": [source], "target_ids": [target], "return": ["token_nlls"]}
    assert largest_difference(scored(client, request)["token_nlls"], [expected]) <= TOLERANCE


def test_separate_vocabularies_and_untied_embeddings(
    tmp_path: Any, make_client: Any, engine_name: EngineName
) -> None:
    """Marian models exist whose source and target vocabularies differ in size."""
    changes = {
        "vocab_size": 90,
        "decoder_vocab_size": VOCABULARY_SIZE,
        "share_encoder_decoder_embeddings": False,
        "tie_word_embeddings": False,
        "pad_token_id": 80,
        "decoder_start_token_id": 80,
    }
    checkpoint = save_checkpoint("marian", tmp_path / "checkpoint", **changes)
    export_checkpoint(str(checkpoint), tmp_path / "bundle", ExportOptions(engines=(engine_name,)))
    bundle = open_bundle(tmp_path / "bundle")
    assert (bundle.manifest.vocabulary.source, bundle.manifest.vocabulary.target) == (90, 101)
    model = make_model("marian", **changes)
    client = make_client({"separate": bundle})
    source, target = [3, 89, 12], [100, 4, 95]
    expected = reference(model, source, [80, *target[:-1]], target).nll
    reply = scored(
        client, {"source_ids": [source], "target_ids": [target], "return": ["token_nlls"]}
    )
    assert largest_difference(reply["token_nlls"], [expected]) <= TOLERANCE
    refused = client.post("/loss", json={"source_ids": [[90]], "target_ids": [target]})
    assert refused.status_code == 422


def test_excluded_classes_leave_the_softmax(
    tmp_path: Any, make_client: Any, engine_name: EngineName
) -> None:
    """Other toolkits drop the pad class from Marian's softmax; a bundle can do so too."""
    model = make_model("marian")
    checkpoint = save_checkpoint("marian", tmp_path / "checkpoint")
    pad = model.config.pad_token_id
    options = ExportOptions(engines=(engine_name,), excluded_classes=((pad, pad),))
    export_checkpoint(str(checkpoint), tmp_path / "bundle", options)
    client = make_client({"without_pad": open_bundle(tmp_path / "bundle")})
    source, target = [3, 4, 5], [6, 7, 8, 0]
    with torch.inference_mode():
        logits = (
            model(
                input_ids=torch.tensor([source]),
                decoder_input_ids=torch.tensor([[pad, *target[:-1]]]),
            )
            .logits[0]
            .double()
        )
    logprobs = logits[:, [index for index in range(VOCABULARY_SIZE) if index != pad]].log_softmax(
        -1
    )
    expected = -logprobs[range(4), target].numpy()  # pad is the last class: the others keep places
    reply = scored(
        client, {"source_ids": [source], "target_ids": [target], "return": ["token_nlls"]}
    )
    assert largest_difference(reply["token_nlls"], [expected]) <= TOLERANCE
    refused = client.post("/loss", json={"source_ids": [source], "target_ids": [[6, pad]]})
    assert refused.status_code == 422
    assert "excludes" in refused.json()["errors"][0]["detail"]
    # Fed and not counted, it is an id like all others.
    masked = {"source_ids": [source], "target_ids": [[pad, 6]], "prefix_length": 1}
    assert client.post("/loss", json=masked).status_code == 200
