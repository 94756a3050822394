"""What the head asks of Triton, and what it refuses to give to it; prints it as JSON."""

from __future__ import annotations

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from seqloss.errors import BundleError
from seqloss.loss.head import output_projection
from seqloss.loss.triton_head import TritonHead
from seqloss.loss.triton_kernels import fold_classes

_COUNTS = (1, 2, 3, 16, 17, 4096)


def main() -> None:
    """One line."""
    print(json.dumps({"variants": _variants(), "refusal": _refusal()}))


def _variants() -> int:
    """Of `fold_classes`, as Triton tells one from another, over all batches that may come."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(fold_classes.signature, fold_classes.params, backend)
    own = torch.zeros(64)
    states = own.bfloat16()
    variants = set()
    for count in _COUNTS:
        # Labels are the last part of one copy, so that what they follow says where they begin.
        for before in range(17):
            labels = torch.zeros(before + count, dtype=torch.int64)[before:]
            _, asked_for, _ = bind(
                *(states, states, own, labels, own, own, count, 58101),
                WIDTH=512,
                TOKENS=128,
                CLASSES=256,
                INNER=64,
                TILES=8,
                ALL_TERMS=False,
                UPCASTS=False,
            )
            variants.add(repr(asked_for))
    return len(variants)


def _refusal() -> str:
    """Of a projection that has no mean of its biases, to which a pointer would lead nowhere."""
    projection = output_projection(torch.ones(3, 16), None, [])
    try:
        TritonHead(projection._replace(mean_bias=torch.zeros(0)), torch.float32)
    except BundleError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
