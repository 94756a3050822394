"""From terms to losses; expected values are sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from seqloss.loss.reduce import (
    LabelSmoothing,
    aggregate,
    mean_losses,
    perplexities,
    reduce_terms,
    smoothed_loss,
)
from seqloss.records import Ragged, TokenTerms

NO_SMOOTHING = LabelSmoothing()


def terms_of(*logprobs: float, means: list[float] | None = None) -> TokenTerms:
    return TokenTerms(
        np.array(logprobs, np.float32),
        np.array(means if means is not None else [-5.0] * len(logprobs), np.float32),
    )


def full_distribution(seed: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of 6 tokens over all classes, and their labels."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(6, classes)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs, generator.integers(classes, size=6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("convention", ["uniform", "uniform_excluding_target"])
def test_smoothed_loss_is_the_cross_entropy_with_the_smoothed_distribution(
    epsilon: float, convention: str
) -> None:
    classes = 11
    logprobs, labels = full_distribution(3, classes)
    onehot = np.eye(classes)[labels]
    spread = {
        "uniform": np.full((6, classes), 1 / classes),
        "uniform_excluding_target": (1 - onehot) / (classes - 1),
    }[convention]
    expected = -(((1 - epsilon) * onehot + epsilon * spread) * logprobs).sum(-1)
    terms = TokenTerms(logprobs[range(6), labels], logprobs.mean(-1))
    loss = smoothed_loss(terms, LabelSmoothing(epsilon, convention), classes)  # type: ignore[arg-type]
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_losses_are_summed_by_target_and_put_where_they_belong() -> None:
    # Three targets of 2, 0 and 3 tokens; the middle token of the last one does not count.
    scores = reduce_terms(
        terms_of(-1.0, -2.0, -0.25, -4.0),
        np.array([0, 1, 2, 4]),
        np.array([0, 2, 2, 5]),
        NO_SMOOTHING,
        10,
    )
    np.testing.assert_array_equal(scores.losses, [3.0, np.nan, 4.25])
    np.testing.assert_array_equal(scores.num_tokens, [2, 0, 2])
    np.testing.assert_array_equal(scores.token_losses.row(2), np.float32([0.25, np.nan, 4.0]))
    np.testing.assert_array_equal(mean_losses(scores), [1.5, np.nan, 2.125])


def test_a_token_that_is_not_finite_takes_its_own_pair_alone() -> None:
    scores = reduce_terms(
        terms_of(-1.0, -np.inf, -2.0, -3.0, means=[-5, -5, np.nan, -5]),
        np.array([0, 1, 2, 3]),
        np.array([0, 1, 2, 3, 4]),
        LabelSmoothing(0.1),
        10,
    )
    np.testing.assert_array_equal(scores.num_tokens, [1, 0, 0, 1])
    assert np.isnan(scores.losses[1:3]).all()
    assert np.isfinite(scores.losses[[0, 3]]).all()


def test_sums_are_float64() -> None:
    """A million tokens of 0.1 nats: float32 sums would be off by a hundred."""
    count = 1_000_000
    scores = reduce_terms(
        TokenTerms(np.full(count, -0.1, np.float32), np.zeros(count, np.float32)),
        np.arange(count),
        np.array([0, count]),
        NO_SMOOTHING,
        10,
    )
    assert scores.losses[0] == pytest.approx(count * float(np.float32(0.1)), rel=1e-10)


def test_the_aggregate_keeps_sums_and_counts_apart() -> None:
    scores = reduce_terms(
        terms_of(-1.0, -2.0, -6.0), np.arange(3), np.array([0, 2, 2, 3]), NO_SMOOTHING, 10
    )
    total = aggregate(scores)
    assert (total.loss, total.nll, total.num_tokens, total.num_pairs) == (9.0, 9.0, 3, 2)
    assert total.mean_loss == 3.0
    assert total.mean_pair_loss == (1.5 + 6.0) / 2
    assert total.perplexity == pytest.approx(math.exp(3.0))


def test_the_aggregate_of_nothing_divides_by_nothing() -> None:
    scores = reduce_terms(terms_of(), np.array([], int), np.array([0, 0]), NO_SMOOTHING, 10)
    total = aggregate(scores)
    assert (total.loss, total.num_tokens, total.num_pairs) == (0.0, 0, 0)
    assert total.mean_loss is None
    assert total.mean_pair_loss is None
    assert total.perplexity is None


def test_a_perplexity_beyond_float64_is_not_a_number() -> None:
    values = perplexities(np.array([1.0, 7100.0, np.nan]), np.array([1, 10, 0]))
    np.testing.assert_allclose(values, [math.e, np.nan, np.nan])


def test_ranks_and_entropies_have_gaps_where_nothing_counts() -> None:
    terms = TokenTerms(
        np.float32([-1, -2]), np.float32([-3, -3]), np.int32([4, 0]), np.float32([0.5, 0.25])
    )
    scores = reduce_terms(terms, np.array([0, 2]), np.array([0, 3]), NO_SMOOTHING, 10)
    assert isinstance(scores.token_ranks, Ragged)
    assert isinstance(scores.token_entropies, Ragged)
    np.testing.assert_array_equal(scores.token_ranks.values, [4, -1, 0])
    np.testing.assert_array_equal(scores.token_entropies.values, np.float32([0.5, np.nan, 0.25]))
