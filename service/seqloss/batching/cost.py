"""How long a batch takes: an affine model of its work, fitted while the service runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from seqloss.batching.shapes import BatchShape, PaddedShape
from seqloss.records import Float64Array

# Until something was measured: only the ratios matter, and a head makes targets dearer.
_PRIOR = (5e-3, 1e-5, 2e-5, 0.0)
# Keeps the products of the fit near 1.
_SCALE = np.array([1.0, 1e-3, 1e-3, 1e-6])
# What an observation still counts after the next one.
_FORGETTING = 0.98
_RIDGE = 1e-9
# Seconds that each batch takes of the host, wherever the device hides it: of two sizes that are
# equally good for the device the larger one is better.
_LEAST_FIXED = 2e-4


class CostModel:
    """Seconds of a batch, by its work: `a + b_enc encoded + b_dec decoded + c attended`.

    Of a batch that is padded that is `a + b_enc U S + b_dec B T + c (U S^2 + B T (S + T))`. No
    coefficient is negative. Least squares of the relative error over the measured batches, the
    latest of which count most.

    Attributes:
        shapes: how the engine lays batches out.
    """

    def __init__(self, shapes: type[BatchShape] = PaddedShape) -> None:
        self.shapes = shapes
        self._numbers: tuple[float, ...] = _PRIOR
        self._products = np.zeros((4, 4))
        self._moments = np.zeros(4)
        self.is_measured = False

    @property
    def numbers(self) -> tuple[float, ...]:
        """a, b_enc, b_dec and c, in seconds."""
        return self._numbers

    def seconds(self, shape: BatchShape) -> Any:
        """What batches of such shapes take; before the first measurement only ratios hold."""
        return self.seconds_of_work(*shape.work())

    def seconds_of_work(self, encoded: Any, decoded: Any, attended: Any) -> Any:
        """The same of what `BatchShape.work` returns."""
        fixed, by_encoded, by_decoded, by_attended = self._numbers
        if not by_attended:
            return fixed + by_encoded * encoded + by_decoded * decoded
        return fixed + by_encoded * encoded + by_decoded * decoded + by_attended * attended

    @property
    def target_weight(self) -> float:
        """How many tokens of a source cost as much as one that a target is padded with."""
        if not self.shapes.pads:
            return 0.0
        _, source, target, _ = self._numbers
        return min(100.0, max(0.1, target / max(source, 1e-12)))

    def observe(self, shape: BatchShape, seconds: float) -> None:
        """A batch took so long."""
        features = np.array([1.0, *shape.work()]) * _SCALE / max(seconds, 1e-9)
        self._products = _FORGETTING * self._products + np.outer(features, features)
        self._moments = _FORGETTING * self._moments + features
        # Plain numbers: products of them with numbers are ten times as fast as those of arrays.
        fixed, *rest = (self._fitted() * _SCALE).tolist()
        self._numbers = (max(fixed, _LEAST_FIXED), *rest)
        self.is_measured = True

    def _fitted(self) -> Float64Array:
        """Drops one negative coefficient after the other: with four of them that is enough."""
        kept = np.arange(4)
        while True:
            products = self._products[np.ix_(kept, kept)]
            ridge = _RIDGE * np.trace(products) * np.eye(len(kept))
            found = np.linalg.solve(products + ridge, self._moments[kept])
            if (found >= 0).all():
                coefficients = np.zeros(4)
                coefficients[kept] = found
                return coefficients
            kept = np.delete(kept, found.argmin())
