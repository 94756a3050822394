"""From token terms to losses: smoothing, masks and sums, in float64.

Engines know nothing of label smoothing or reductions.  Everything that a request may choose is
applied here, to two numbers per token, so requests that differ in it share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from seqloss.records import BoolArray, Float64Array, Int64Array, Ragged, Scores, TokenTerms

Smoothing = Literal["uniform", "uniform_excluding_target"]


@dataclass(frozen=True, slots=True)
class LabelSmoothing:
    """How much probability the target distribution gives to all classes.

    Attributes:
        epsilon: between 0 and 1; at 0 the loss is the nll.
        convention: `uniform` spreads epsilon over all V classes, the target among them (PyTorch,
            Keras, Hugging Face); `uniform_excluding_target` over the other V - 1 (fairseq).
    """

    epsilon: float = 0.0
    convention: Smoothing = "uniform"


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The losses of a request as one number each; None where there is nothing to divide by."""

    loss: float
    nll: float
    num_tokens: int
    num_pairs: int
    mean_loss: float | None
    mean_pair_loss: float | None
    perplexity: float | None


def smoothed_loss(terms: TokenTerms, smoothing: LabelSmoothing, num_classes: int) -> Float64Array:
    """Equals `-(q * logprobs).sum(-1)` for the smoothed target distribution q.

    `uniform` is `torch.nn.functional.cross_entropy(..., label_smoothing=epsilon)`, with
    q = (1 - epsilon) * onehot(y) + epsilon / V.  `uniform_excluding_target` is fairseq's
    `label_smoothed_nll_loss`, with q_y = 1 - epsilon and epsilon / (V - 1) elsewhere.

    Args:
        terms: of K counted tokens.
        smoothing: epsilon and the convention.
        num_classes: V, the classes of the softmax.

    Returns:
        Shape: (K,), float64, in nats.
    """
    nll = -terms.target_logprob.astype(np.float64)
    epsilon = smoothing.epsilon
    if epsilon == 0.0:
        return nll
    sum_over_classes = -num_classes * terms.mean_logprob.astype(np.float64)
    if smoothing.convention == "uniform":
        return (1 - epsilon) * nll + epsilon / num_classes * sum_over_classes
    return (1 - epsilon) * nll + epsilon / (num_classes - 1) * (sum_over_classes - nll)


def reduce_terms(
    terms: TokenTerms,
    position: Int64Array,
    target_offsets: Int64Array,
    smoothing: LabelSmoothing,
    num_classes: int,
) -> Scores:
    """Puts the counted tokens of a request where they belong and sums them by target.

    Args:
        terms: of K counted tokens.
        position: where each of them stands among all target tokens of the request, ascending.
            Shape: (K,).
        target_offsets: where each target begins among all target tokens. Shape: (N + 1,).
        smoothing: what the request asked for.
        num_classes: V, the classes of the softmax.

    Returns:
        Scores of N targets.  A target with a token that is not finite, or with none that counts,
        is NaN with 0 tokens.
    """
    loss = smoothed_loss(terms, smoothing, num_classes)
    nll = -terms.target_logprob.astype(np.float64)
    num_targets = len(target_offsets) - 1
    target = np.searchsorted(target_offsets, position, side="right") - 1  # (K,)
    finite = _all_finite(np.isfinite(loss) & np.isfinite(nll), target, num_targets)
    num_tokens = np.where(finite, np.bincount(target, minlength=num_targets), 0)

    def per_target(values: Float64Array) -> Float64Array:
        sums = np.bincount(target, weights=values, minlength=num_targets)
        return np.where(num_tokens > 0, sums, np.nan)

    def per_token(values: NDArray[np.generic], dtype: type[np.generic], gap: float) -> Ragged:
        placed = np.full(int(target_offsets[-1]), gap, dtype)
        kept = finite[target]
        placed[position[kept]] = values[kept]
        return Ragged(placed, target_offsets)

    return Scores(
        losses=per_target(loss),
        nlls=per_target(nll),
        num_tokens=num_tokens,
        token_losses=per_token(loss, np.float32, np.nan),
        token_nlls=per_token(nll, np.float32, np.nan),
        token_ranks=None if terms.rank is None else per_token(terms.rank, np.int32, -1),
        token_entropies=(
            None if terms.entropy is None else per_token(terms.entropy, np.float32, np.nan)
        ),
    )


def _all_finite(finite: BoolArray, target: Int64Array, num_targets: int) -> BoolArray:
    """Whether every counted token of a target is finite. Shape: (N,)."""
    num_bad: Int64Array = np.bincount(target[~finite], minlength=num_targets)
    all_finite: BoolArray = num_bad == 0
    return all_finite


def aggregate(scores: Scores) -> Aggregate:
    """Sums over the targets that were scored, in the order of the request, in float64."""
    scored = scores.num_tokens > 0
    loss = float(scores.losses[scored].sum())
    nll = float(scores.nlls[scored].sum())
    num_tokens = int(scores.num_tokens[scored].sum())
    num_pairs = int(scored.sum())
    if num_pairs == 0:
        return Aggregate(0.0, 0.0, 0, 0, None, None, None)
    return Aggregate(
        loss=loss,
        nll=nll,
        num_tokens=num_tokens,
        num_pairs=num_pairs,
        mean_loss=loss / num_tokens,
        mean_pair_loss=float((scores.losses[scored] / scores.num_tokens[scored]).mean()),
        perplexity=_finite_or_none(float(perplexities(np.array(nll), np.array(num_tokens)))),
    )


def perplexities(nlls: Float64Array, num_tokens: Int64Array) -> Float64Array:
    """`exp(nll / num_tokens)`; NaN where nothing counts or a float64 cannot hold it."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        values = np.exp(nlls / num_tokens)
    return np.where(np.isfinite(values), values, np.nan)


def mean_losses(scores: Scores) -> Float64Array:
    """`losses / num_tokens`; NaN where nothing counts. Shape: (N,), float64."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return scores.losses / scores.num_tokens


def _finite_or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
