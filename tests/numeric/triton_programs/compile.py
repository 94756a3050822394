"""Compiles the kernels for GPUs that need not be there; prints what came of it, as JSON."""

from __future__ import annotations

import json
from typing import Any

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqloss.loss import triton_head
from seqloss.loss.triton_kernels import finish_terms, fold_classes

_ARCHITECTURES = (80, 90)
_THREADS_OF_A_WARP = 32
# How Triton writes down that a pointer, or a number, is a multiple of 16.
_ALIGNED = [["tt.divisibility", 16]]


def main() -> None:
    """One line."""
    print(json.dumps([found for target in _ARCHITECTURES for found in compiled(target)]))


def compiled(architecture: int) -> list[dict[str, Any]]:
    """Both kernels, with and without ranks and entropies, in all tiles that fit."""
    tiles = {"fp32": [triton_head._FLOAT32], "bf16": [triton_head._16_BITS]}
    if architecture == 90:
        tiles["bf16"].append(triton_head._WIDE_16_BITS)
    found = []
    for all_terms in (False, True):
        found += [
            _fold(architecture, dtype, cut, all_terms) for dtype in tiles for cut in tiles[dtype]
        ]
        found.append(_finish(architecture, all_terms))
    return found


def _fold(architecture: int, dtype: str, tiles: Any, all_terms: bool) -> dict[str, Any]:
    types = {"states": f"*{dtype}", "weight": f"*{dtype}", "bias": "*fp32", "labels": "*i64"}
    types |= {"label_logits": "*fp32", "partials": "*fp32", "num_tokens": "i32"}
    constants = {
        "WIDTH": 1024,
        "TOKENS": tiles.tokens,
        "CLASSES": tiles.classes,
        "INNER": tiles.inner,
        "TILES": triton_head._CLASSES_OF_A_PROGRAM // tiles.classes,
        "ALL_TERMS": all_terms,
        "UPCASTS": False,
    }
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return _compile(fold_classes, types | {"num_classes": "i32"}, constants, architecture, options)


def _finish(architecture: int, all_terms: bool) -> dict[str, Any]:
    pointers = ("partials", "label_logits", "mean_logits", "terms")
    types = dict.fromkeys(pointers, "*fp32") | {"ranks": "*i32"}
    types |= {"num_tokens": "i32", "num_splits": "i32"}
    constants = {"TOKENS": triton_head._TOKENS_AT_ONCE, "ALL_TERMS": all_terms}
    return _compile(finish_terms, types, constants, architecture, {})


def _compile(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    architecture: int,
    options: dict[str, int],
) -> dict[str, Any]:
    pointers = [
        place
        for place, (name, kind) in enumerate(types.items())
        if kind.startswith("*") and name != "labels"  # which begin anywhere
    ]
    source = ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constants,
        {(place,): _ALIGNED for place in pointers},
    )
    target = GPUTarget("cuda", architecture, _THREADS_OF_A_WARP)
    made = compile_kernel(source, target=target, options=options)
    return {
        "kernel": kernel.__name__,
        "architecture": architecture,
        "types": types,
        "shared_bytes": made.metadata.shared,
        "products": [name for name in ("wgmma", "mma.sync") if name in made.asm["ptx"]],
    }


if __name__ == "__main__":
    main()
