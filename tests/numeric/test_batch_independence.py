"""The same pair has the same loss, whoever it shares a batch with and however it was sent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from checkpoints import VOCABULARY_SIZE
from conftest import on_every_engine
from numeric.reference import random_pairs

TOLERANCE = 2e-5

pytestmark = on_every_engine


@pytest.fixture
def client(family: str, device: str, bundle_of: Any, make_client: Any) -> Any:
    return make_client({"model": bundle_of(family)}, device=device, max_batch_tokens=512)


@pytest.fixture
def pairs() -> tuple[list[list[int]], list[list[int]]]:
    """Sources and targets, one for one."""
    request = random_pairs(11, VOCABULARY_SIZE, 30, pad=7, eos=9)
    return [request["source_ids"][index] for index in request["source_index"]], request[
        "target_ids"
    ]


def losses(client: Any, sources: Any, targets: Any, **changes: Any) -> np.ndarray:
    body = {"source_ids": sources, "target_ids": targets, **changes}
    response = client.post("/loss", json=body)
    assert response.status_code == 200, response.text
    return np.array(response.json()["losses"])


def test_a_pair_has_the_same_loss_in_any_company(client: Any, pairs: Any) -> None:
    sources, targets = pairs
    alone = np.concatenate(
        [
            losses(client, [source], [target])
            for source, target in zip(sources, targets, strict=True)
        ]
    )
    together = losses(client, sources, targets)
    num_tokens = np.array(list(map(len, targets)))
    assert np.abs((together - alone) / num_tokens).max() <= TOLERANCE
    order = np.random.default_rng(1).permutation(len(targets))
    shuffled = losses(client, [sources[i] for i in order], [targets[i] for i in order])
    assert np.abs((shuffled - alone[order]) / num_tokens[order]).max() <= TOLERANCE
    repeated = losses(client, sources * 3, targets * 3)
    assert np.abs((repeated - np.tile(alone, 3)) / np.tile(num_tokens, 3)).max() <= TOLERANCE


def test_a_reproducible_request_has_the_same_bits_in_any_company(client: Any, pairs: Any) -> None:
    sources, targets = pairs
    alone = losses(client, sources, targets, reproducible=True)
    with ThreadPoolExecutor(3) as others:
        company = [
            others.submit(losses, client, sources[first:], targets[first:]) for first in range(9)
        ]
        again = [losses(client, sources, targets, reproducible=True) for _ in range(2)]
    assert all(len(one.result()) for one in company)
    for found in again:
        np.testing.assert_array_equal(found, alone)


def test_shared_sources_equal_repeated_sources(client: Any, pairs: Any) -> None:
    sources, targets = pairs
    index = [0] * len(targets)
    shared = losses(client, [sources[0]], targets, source_index=index)
    repeated = losses(client, [sources[0]] * len(targets), targets)
    np.testing.assert_allclose(shared, repeated, rtol=0, atol=TOLERANCE * 30)


def test_padded_equals_ragged(client: Any, pairs: Any) -> None:
    sources, targets = pairs
    ragged = losses(client, sources, targets)

    def padded(rows: list[list[int]], value: int) -> list[list[int]]:
        return [row + [value] * (40 - len(row)) for row in rows]

    def mask(rows: list[list[int]]) -> list[list[int]]:
        return [[1] * len(row) + [0] * (40 - len(row)) for row in rows]

    by_masks = losses(
        client,
        padded(sources, 3),
        padded(targets, 3),
        source_mask=mask(sources),
        target_mask=mask(targets),
    )
    by_ignore_index = losses(
        client, padded(sources, 3), padded(targets, -100), source_mask=mask(sources)
    )
    np.testing.assert_allclose(by_masks, ragged, rtol=0, atol=TOLERANCE * 30)
    np.testing.assert_allclose(by_ignore_index, ragged, rtol=0, atol=TOLERANCE * 30)


def test_masked_tokens_are_the_only_difference(client: Any, pairs: Any) -> None:
    """A masked loss is the loss of the kept tokens: the others are still fed."""
    sources, targets = pairs
    body = {"source_ids": sources, "target_ids": targets, "return": ["token_losses"]}
    full = client.post("/loss", json=body).json()["token_losses"]
    generator = np.random.default_rng(2)
    mask = [[1, *generator.integers(0, 2, len(target) - 1).tolist()] for target in targets]
    masked = losses(client, sources, targets, target_mask=mask)
    expected = [np.dot(row, keep) for row, keep in zip(full, mask, strict=True)]
    np.testing.assert_allclose(masked, expected, rtol=0, atol=TOLERANCE * 30)
    prefixed = losses(client, sources, targets, prefix_length=[len(row) // 2 for row in targets])
    expected = [sum(row[len(row) // 2 :]) for row in full]
    np.testing.assert_allclose(prefixed, expected, rtol=0, atol=TOLERANCE * 30)
