"""A packed graph's operators in plain Torch, beyond what kernels are held against."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from numeric.test_kernels import (
    TOLERANCE,
    attended_to,
    largest_error,
    naive_attention,
    random,
    sequences,
)
from seqloss.kernels.modules import AttentionSettings
from seqloss.model import operators


@pytest.mark.parametrize("reach", [None, 4])
def test_plain_attention_pads_no_short_sequence_to_a_long_one(
    reach: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may have one long pair and hundreds of short ones, in which padding would be all."""
    scores = 0
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(queries: Tensor, keys: Tensor, *rest: Any, **named: Any) -> Tensor:
        nonlocal scores
        scores += len(queries) * queries.shape[2] * keys.shape[2]
        return attend(queries, keys, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    queries, keys = [500, *[3, 4, 5, 7] * 100], [400, *[4, 4, 7, 6] * 100]
    bias = None if reach is None else random(2, 2 * reach + 1, seed=3)
    parts = attended_to(sum(queries), sum(keys), 32)
    how = AttentionSettings(bias, 2, 0.25, causal=False, dtype=torch.float32)
    bounds = sequences(queries, keys)
    found = operators.attention(*parts, *bounds, *how)
    assert largest_error(found, naive_attention(parts, bounds, how)) <= TOLERANCE
    needed = sum(num * of for num, of in zip(queries, keys, strict=True))
    assert needed <= scores <= 1.5 * needed
