"""Filters for OpusFilter 3: the loss of a pair, and the dual cross-entropy of two models.

In the configuration they are named with their module:

    - LossFilter:
        url: http://localhost:8000
        threshold: 2.5
      module: seqloss_client.opusfilter

The first file of a step's inputs has the sources, the second one the targets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import opusfilter
from numpy.typing import NDArray
from opusfilter.util import grouper

from seqloss_client import Chunk, LossClient
from seqloss_client.filtering.formula import adequacy
from seqloss_client.filtering.losses import Direction

logger = logging.getLogger(__name__)

PairOfTexts: TypeAlias = Sequence[str]

# Enough of them for requests to overlap, few enough to be held.
_REQUESTS_AT_A_TIME = 16


def mean_losses(
    direction: Direction, pairs: Sequence[PairOfTexts], pairs_per_request: int
) -> NDArray[np.float64]:
    """The mean nll per token of every pair, NaN of those that cannot be scored."""
    means = []
    with LossClient(direction.url, model=direction.model, timeout=direction.timeout) as client:
        chunks = (_chunk(direction, part) for part in grouper(pairs, pairs_per_request))
        for result in client.score_chunks(chunks, **direction.options()):
            means.append(result.mean_losses)
            if result.errors:
                logger.warning(
                    "%d of %d pairs cannot be scored and are rejected; the first: %s",
                    len(result.errors),
                    len(result),
                    result.errors[0].detail,
                )
    return np.concatenate(means)


def _chunk(direction: Direction, pairs: Sequence[PairOfTexts]) -> Chunk:
    first, second = map(list, zip(*pairs, strict=True))
    return Chunk(second, first) if direction.is_backward else Chunk(first, second)


class _ServiceFilter(opusfilter.FilterABC):  # type: ignore[misc]
    """Scores many pairs with one request, where OpusFilter's own class asks for one at a time."""

    def __init__(self, pairs_per_request: int, name: str | None, workdir: str) -> None:
        super().__init__(name=name, workdir=workdir)
        self.pairs_per_request = pairs_per_request

    def _scores(self, pairs: Sequence[PairOfTexts]) -> NDArray[np.float64]:
        raise NotImplementedError

    def _scored(self, pairs: Iterable[PairOfTexts]) -> Iterator[tuple[PairOfTexts, float]]:
        for part in grouper(pairs, self.pairs_per_request * _REQUESTS_AT_A_TIME):
            for pair in part:
                if len(pair) != 2:
                    raise opusfilter.ConfigurationError(
                        f"{type(self).__name__} takes two files, a source and a target; "
                        f"the step has {len(pair)}"
                    )
            yield from zip(part, self._scores(part).tolist(), strict=True)

    def score(self, pairs: Iterable[PairOfTexts]) -> Iterator[float]:
        """Yields a score for each pair: an infinitely bad one where it cannot be scored."""
        for _, score in self._scored(pairs):
            yield score

    def filter(self, pairs: Iterable[PairOfTexts]) -> Iterator[PairOfTexts]:
        """Yields the accepted pairs."""
        return (pair for pair, score in self._scored(pairs) if self.accept(score))

    def filterfalse(self, pairs: Iterable[PairOfTexts]) -> Iterator[PairOfTexts]:
        """Yields the rejected pairs."""
        return (pair for pair, score in self._scored(pairs) if not self.accept(score))


class LossFilter(_ServiceFilter):
    """Accepts pairs whose mean nll per target token is below a threshold.

    Args:
        threshold: in nats per token.
        pairs_per_request: how many pairs a request has.
        service: the parameters of `filtering.Direction`, such as `url` and `model`.
        name, workdir: OpusFilter's own.
    """

    score_direction = opusfilter.CLEAN_LOW
    accept_threshold = math.inf
    reject_threshold = 0.0

    def __init__(
        self,
        threshold: float,
        pairs_per_request: int = 2000,
        name: str | None = None,
        workdir: str = "",
        **service: Any,
    ) -> None:
        super().__init__(pairs_per_request, name, workdir)
        self.threshold = threshold
        self.direction = Direction(**service)

    def _scores(self, pairs: Sequence[PairOfTexts]) -> NDArray[np.float64]:
        means = mean_losses(self.direction, pairs, self.pairs_per_request)
        return np.where(np.isnan(means), math.inf, means)

    def accept(self, score: float) -> bool:
        """Whether the score is below the threshold."""
        return score < self.threshold


class DualLossFilter(_ServiceFilter):
    """Accepts pairs on which two models agree: see `filtering.adequacy`.

    Args:
        threshold: between 0 and 1.
        forward: the parameters of `filtering.Direction` for the model from source to target.
        backward: the same for the model from target to source.
        pairs_per_request: how many pairs a request has.
        name, workdir: OpusFilter's own.
    """

    score_direction = opusfilter.CLEAN_HIGH
    accept_threshold = 0.0
    reject_threshold = 1 + 10**-6

    def __init__(
        self,
        threshold: float,
        forward: dict[str, Any],
        backward: dict[str, Any],
        pairs_per_request: int = 2000,
        name: str | None = None,
        workdir: str = "",
    ) -> None:
        super().__init__(pairs_per_request, name, workdir)
        self.threshold = threshold
        self.directions = (Direction(**forward), Direction(**backward, is_backward=True))

    def _scores(self, pairs: Sequence[PairOfTexts]) -> NDArray[np.float64]:
        forward, backward = (
            mean_losses(direction, pairs, self.pairs_per_request) for direction in self.directions
        )
        scores = adequacy(forward, backward)
        return np.where(np.isnan(scores), -math.inf, scores)

    def accept(self, score: float) -> bool:
        """Whether the score reaches the threshold."""
        return score >= self.threshold
