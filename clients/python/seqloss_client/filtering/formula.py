"""Dual conditional cross-entropy: how good a pair is, from the losses of models of both directions.

Junczys-Dowmunt, "Dual Conditional Cross-Entropy Filtering of Noisy Parallel Corpora", 2018,
https://aclanthology.org/W18-6478.  H is there what `mean_nll` is here: nats per target token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]


def adequacy(forward: Losses, backward: Losses) -> Losses:
    """`exp(-(|forward - backward| + (forward + backward) / 2))`.

    Near 1 where both models find the pair likely; small where one or both do not, and where they
    disagree, as they do on pairs whose sides say more or less than each other.

    Args:
        forward: mean nll of the target, given the source.  Shape: (N,).
        backward: mean nll of the source, given the target.  Shape: (N,).

    Returns:
        Between 0 and 1; NaN where a loss is NaN.  Shape: (N,).
    """
    return np.exp(-(np.abs(forward - backward) + (forward + backward) / 2))


def domain_weight(in_domain: Losses, general: Losses) -> Losses:
    """`min(exp(-(in_domain - general)), 1)`: 1 where a model of the domain finds the text likelier.

    Args:
        in_domain: mean nll by a model of the wanted domain.  Shape: (N,).
        general: mean nll by a model of general text.  Shape: (N,).

    Returns:
        Between 0 and 1; NaN where a loss is NaN.  Shape: (N,).
    """
    return np.exp(np.minimum(general - in_domain, 0.0))
