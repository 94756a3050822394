"""The losses that this project grew from, as people write them in PyTorch and Keras.

Each is computed on materialised logits by the library itself, and by us: on the loss alone in
float64 tolerance, and through the service in float32.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from checkpoints import VOCABULARY_SIZE, make_model
from seqloss.demo import CHECKPOINT
from seqloss.loss.head import LossHead, output_projection
from seqloss.loss.reduce import LabelSmoothing, smoothed_loss
from seqloss.records import TokenTerms

TOLERANCE = 2e-5
SOURCES = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 13, 0]]
TARGETS = [[21, 22, 0], [31, 32, 33, 34, 0], [41, 0]]


def keras_cross_entropy(onehot: np.ndarray, logits: np.ndarray, smoothing: float) -> np.ndarray:
    loss = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=smoothing, reduction="none"
    )
    values: np.ndarray = loss(onehot, logits).numpy()
    return values


def padded(rows: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


@pytest.fixture
def tutorial(bundle_of: Any, make_client: Any) -> tuple[Any, Tensor, Tensor, int]:
    """A service, and for the same padded targets y the logits that a training loop would have."""
    model = make_model("marian")
    pad = model.config.pad_token_id
    x, y = padded(SOURCES, pad), padded(TARGETS, pad)
    inputs = torch.cat([torch.full((len(y), 1), pad), y[:, :-1]], dim=1)
    with torch.inference_mode():
        logits = model(
            input_ids=x, attention_mask=(x != pad).long(), decoder_input_ids=inputs
        ).logits
    return make_client({"marian": bundle_of("marian")}), logits, y, pad


def ask(client: Any, pad: int, **changes: Any) -> dict[str, Any]:
    body = {
        "source_ids": padded(SOURCES, pad).tolist(),
        "target_ids": padded(TARGETS, pad).tolist(),
        "pad_token_id": pad,
        "return": ["token_losses"],
    }
    response = client.post("/loss", json=body | changes)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def assert_same(reply: dict[str, Any], loss: Tensor, mask: Tensor) -> None:
    """Every counted token, nothing where the mask says so, and the masked mean."""
    for row, expected, counts in zip(reply["token_losses"], loss, mask, strict=True):
        assert [value is not None for value in row] == counts.tolist()
        counted = [value for value in row if value is not None]
        assert counted == pytest.approx(expected[counts].tolist(), abs=TOLERANCE, rel=0)
    masked_mean = ((loss * mask).sum() / mask.sum()).item()
    assert reply["aggregate"]["mean_loss"] == pytest.approx(masked_mean, abs=TOLERANCE)
    assert reply["aggregate"]["num_tokens"] == int(mask.sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pytorch_cross_entropy_with_a_padding_mask(tutorial: Any, smoothing: float) -> None:
    client, logits, y, pad = tutorial
    loss = cross_entropy(logits.transpose(1, 2), y, reduction="none", label_smoothing=smoothing)
    assert_same(ask(client, pad, label_smoothing=smoothing), loss, y != pad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_keras_categorical_cross_entropy_with_a_padding_mask(
    tutorial: Any, smoothing: float
) -> None:
    client, logits, y, pad = tutorial
    onehot = torch.nn.functional.one_hot(y, VOCABULARY_SIZE).float()
    loss = torch.from_numpy(keras_cross_entropy(onehot.numpy(), logits.numpy(), smoothing))
    assert_same(ask(client, pad, label_smoothing=smoothing), loss, y != pad)


def test_ignore_index_counts_as_pytorch_counts_it(tutorial: Any) -> None:
    client, logits, y, pad = tutorial
    labels = y.masked_fill(y == pad, -100)
    expected = cross_entropy(logits.transpose(1, 2), labels).item()
    reply = ask(
        client,
        pad,
        target_ids=labels.tolist(),
        pad_token_id=None,
        source_mask=[
            [int(identifier != pad) for identifier in row] for row in padded(SOURCES, pad).tolist()
        ],
    )
    assert reply["aggregate"]["mean_loss"] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_alone_equals_both_libraries(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(30, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    bias = torch.randn(50, generator=generator)
    labels = torch.randint(0, 50, (30,), generator=generator)
    logits = hidden.double() @ weight.double().T + bias.double()
    terms = LossHead(output_projection(weight, bias, [])).terms(hidden, labels)
    ours = smoothed_loss(
        TokenTerms(*(term.numpy() for term in terms)), LabelSmoothing(smoothing), 50
    )
    pytorch = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    onehot = torch.nn.functional.one_hot(labels, 50).double()
    keras = keras_cross_entropy(onehot.numpy(), logits.numpy(), smoothing)
    np.testing.assert_allclose(ours, pytorch.numpy(), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ours, keras, rtol=0, atol=TOLERANCE)


def test_a_collators_body_is_taken_as_it_is(bundle_of: Any, make_client: Any) -> None:
    """What transformers' DataCollatorForSeq2Seq makes, sent unchanged, has the model's own loss."""
    model = make_model("marian")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(CHECKPOINT / "tokenizer.json"), pad_token="<pad>"
    )
    tokenizer.pad_token_id = model.config.pad_token_id
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    rows = [
        {"input_ids": source, "labels": target}
        for source, target in zip(SOURCES, TARGETS, strict=True)
    ]
    batch = collate(rows)
    with torch.inference_mode():
        expected = model(**batch).loss.item()
    client = make_client({"marian": bundle_of("marian")})
    response = client.post("/loss", json={name: rows.tolist() for name, rows in batch.items()})
    assert response.status_code == 200, response.text
    assert set(batch) == {"input_ids", "attention_mask", "labels", "decoder_input_ids"}
    assert response.json()["aggregate"]["mean_loss"] == pytest.approx(expected, abs=TOLERANCE)
