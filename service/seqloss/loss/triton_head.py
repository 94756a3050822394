"""The loss head on an NVIDIA GPU: logits never leave a multiprocessor; needs Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqloss.errors import BundleError
from seqloss.loss.head import OutputProjection
from seqloss.loss.triton_kernels import finish_terms, fold_classes

# Of `finish_terms`.
_TOKENS_AT_ONCE = 128
# Of one program of `fold_classes`: so few that a single tile of tokens is spread over all of a GPU,
# so many that what programs leave behind is small beside a matrix of logits.
_CLASSES_OF_A_PROGRAM = 2048


class _Tiles(NamedTuple):
    """How `fold_classes` cuts a product; see there.

    They do not depend on how many tokens there are, and so neither does the order of the sums over
    classes.
    """

    tokens: int
    classes: int
    inner: int
    warps: int
    stages: int


# Takes 144 KiB of shared memory, which Hopper and the large Blackwells have, and registers as they
# have them for products; the other 16 bits take 32 KiB.
_WIDE_16_BITS = _Tiles(tokens=128, classes=256, inner=64, warps=8, stages=3)
_16_BITS = _Tiles(tokens=128, classes=128, inner=32, warps=8, stages=3)
_FLOAT32 = _Tiles(tokens=64, classes=64, inner=32, warps=4, stages=2)

# Compute capabilities, the first number of them.
_WITH_ROOM = (9, 10)


class TritonHead:
    """Token terms in one pass over the classes; see `seqloss.loss.head.LossHead`.

    Products have float32 sums, and nothing rounds them. The host is never made to wait. A softcap
    has no kernel.
    """

    def __init__(self, projection: OutputProjection, dtype: torch.dtype) -> None:
        """Makes a copy of the weight where it is of another dtype.

        Args:
            projection: the output projection on its device, without a softcap.
            dtype: of the products: float32, or 16 bits.
        """
        classes, width = projection.weight.shape
        expected = ((classes,), (width,), ())
        if tuple(tuple(one.shape) for one in projection[1:4]) != expected:
            raise BundleError("the output projection has sizes that do not belong together")
        self._projection = projection
        self._weight = projection.weight.to(dtype).contiguous()
        self._tiles = _tiles(dtype, self._weight.device)

    def terms(
        self, hidden: Tensor, labels: Tensor, *, with_ranks_and_entropies: bool = False
    ) -> tuple[Tensor, ...]:
        """See `seqloss.loss.head.LossHead.terms`."""
        weight, bias, mean_weight, mean_bias, _ = self._projection
        # Kernels read as much memory as they are told; the states are a stranger's graph's.
        if hidden.shape != (len(labels), weight.shape[1]) or hidden.dtype != torch.float32:
            raise BundleError("a graph ends with states that are not the output projection's")
        label_logits = (hidden * weight.index_select(0, labels)).sum(-1)
        label_logits += bias.index_select(0, labels)
        mean_logits = (hidden * mean_weight).sum(-1) + mean_bias
        partials = self._partials(hidden, labels, label_logits, with_ranks_and_entropies)
        num_tokens = len(hidden)
        terms = hidden.new_empty(3 if with_ranks_and_entropies else 2, num_tokens)
        ranks = torch.empty_like(labels, dtype=torch.int32)
        finish_terms[triton.cdiv(num_tokens, _TOKENS_AT_ONCE),](
            partials,
            label_logits,
            mean_logits,
            terms,
            ranks,
            num_tokens,
            len(partials),
            TOKENS=_TOKENS_AT_ONCE,
            ALL_TERMS=with_ranks_and_entropies,
        )
        if not with_ranks_and_entropies:
            return tuple(terms)
        target_logprob, mean_logprob, entropy = terms
        return target_logprob, mean_logprob, ranks, entropy

    def try_out(self) -> None:
        """Has all kernels compiled, and run once."""
        hidden = self._weight.new_zeros(1, self._weight.shape[1], dtype=torch.float32)
        label = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        for all_terms in (False, True):
            terms = self.terms(hidden, label, with_ranks_and_entropies=all_terms)
            torch.stack([term.float() for term in terms]).cpu()

    def _partials(
        self, hidden: Tensor, labels: Tensor, label_logits: Tensor, all_terms: bool
    ) -> Tensor:
        """What `fold_classes` leaves behind. Shape: (splits, 2 or 4, K), float32."""
        (num_tokens, width), num_classes = hidden.shape, len(self._weight)
        tiles = self._tiles
        splits = triton.cdiv(num_classes, _CLASSES_OF_A_PROGRAM)
        partials = hidden.new_empty(splits, 4 if all_terms else 2, num_tokens)
        fold_classes[triton.cdiv(num_tokens, tiles.tokens), splits](
            hidden.to(self._weight.dtype).contiguous(),
            self._weight,
            self._projection.bias,
            labels,
            label_logits,
            partials,
            num_tokens,
            num_classes,
            WIDTH=width,
            TOKENS=tiles.tokens,
            CLASSES=tiles.classes,
            INNER=tiles.inner,
            TILES=_CLASSES_OF_A_PROGRAM // tiles.classes,
            ALL_TERMS=all_terms,
            UPCASTS=_is_interpreted(),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return partials


def _tiles(dtype: torch.dtype, device: torch.device) -> _Tiles:
    """The largest that the device has room for."""
    if dtype == torch.float32:
        return _FLOAT32
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return _WIDE_16_BITS if major in _WITH_ROOM else _16_BITS


def _is_interpreted() -> bool:
    knobs: Any = triton.knobs
    return bool(knobs.runtime.interpret)
