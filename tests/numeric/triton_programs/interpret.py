"""Runs `TritonHead` on the CPU, in Triton's interpreter: from a file of cases to one of terms."""

from __future__ import annotations

import os
import sys

# Triton looks when it is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch

from seqloss.loss.head import OutputProjection
from seqloss.loss.triton_head import TritonHead


def main() -> None:
    """Terms of each case, in order."""
    cases, terms = sys.argv[1:]
    torch.save([terms_of(*case) for case in torch.load(cases)], terms)


def terms_of(
    projection: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    all_terms: bool,
) -> tuple[torch.Tensor, ...]:
    head = TritonHead(OutputProjection(*projection), dtype)
    head.try_out()
    return head.terms(hidden, labels, with_ranks_and_entropies=all_terms)


if __name__ == "__main__":
    main()
