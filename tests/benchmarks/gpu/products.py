"""Matrix products alone, and the loss head alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.gpu.results import HeadRun, ProductRate
from benchmarks.gpu.timing import measured
from benchmarks.operations import Shape
from seqloss.loss.head import LossHead, OutputProjection, output_projection

_DTYPE = torch.bfloat16
# As the engine has them on a GPU.
_TOKEN_BLOCK, _CLASS_BLOCK = 4096, 8192


class ProductsTask:
    """In a worker process, whose end gives all memory back."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def warm_up(self, size: int) -> ProductRate:
        """A large square."""
        return self._rate("square", size, size, size)

    @torch.inference_mode()
    def run(self, shape: Shape, num_tokens: int) -> tuple[list[ProductRate], list[HeadRun]]:
        """Products and heads of a model's sizes."""
        width, inner = shape.width, shape.attention_width
        sizes = {
            "queries, keys, values": (3 * inner, width),
            "attention's output": (width, inner),
            "feed-forward": (shape.ffn_width, width),
            "feed-forward's output": (width, shape.ffn_width),
            "output layer": (shape.vocabulary, width),
        }
        rates = [self._rate(name, num_tokens, *size) for name, size in sizes.items()]
        return rates, list(self._heads(shape, num_tokens))

    def close(self) -> None:
        """Nothing was started."""

    @torch.inference_mode()
    def _rate(self, name: str, rows: int, columns: int, inner: int) -> ProductRate:
        """Written as a linear layer's: its weight is transposed."""
        values = torch.randn(rows, inner, device=self._device, dtype=_DTYPE)
        weight = torch.randn(columns, inner, device=self._device, dtype=_DTYPE)
        product = torch.empty(rows, columns, device=self._device, dtype=_DTYPE)
        time = measured(lambda: torch.matmul(values, weight.t(), out=product), self._device)
        return ProductRate(name, rows, columns, inner, time.seconds)

    def _heads(self, shape: Shape, num_tokens: int) -> Iterator[HeadRun]:
        generator = torch.Generator(self._device).manual_seed(0)
        size = (shape.vocabulary, shape.width)
        weight = torch.randn(*size, generator=generator, device=self._device) / shape.width**0.5
        hidden = torch.randn(num_tokens, shape.width, generator=generator, device=self._device)
        labels = torch.randint(
            shape.vocabulary, (num_tokens,), generator=generator, device=self._device
        )
        made = output_projection(weight.cpu(), None, [])
        tensors = (weight, *(of.to(self._device) for of in made[1:4] if of is not None))
        ways = _ways(OutputProjection(*tensors), hidden, labels)
        for name, work in ways:
            time = measured(work, self._device)
            yield HeadRun(name, time.seconds, time.growth_bytes)


def _ways(
    projection: OutputProjection, hidden: Tensor, labels: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """One after the other, so that none has the weights of another beside its own."""
    yield from _with_logits(hidden.to(_DTYPE), projection.weight.to(_DTYPE), labels)
    if hidden.device.type == "cuda" and find_spec("triton"):
        from seqloss.loss.triton_head import TritonHead  # noqa: PLC0415 - CPUs have no Triton

        yield from _without("seqloss Triton", TritonHead(projection, _DTYPE), hidden, labels)
    chunked = LossHead(
        projection, dtype=_DTYPE, vocabulary_block=_CLASS_BLOCK, token_block=_TOKEN_BLOCK
    )
    yield from _without("seqloss chunked", chunked, hidden, labels)


def _with_logits(
    states: Tensor, weight: Tensor, labels: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "logits alone, written to memory", lambda: states @ weight.t()
    yield (
        "logits and cross_entropy",
        lambda: cross_entropy(states @ weight.t(), labels, reduction="none"),
    )


def _without(
    name: str, head: Any, hidden: Tensor, labels: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    yield name, lambda: head.terms(hidden, labels)
    yield (
        f"{name}, ranks and entropies",
        lambda: head.terms(hidden, labels, with_ranks_and_entropies=True),
    )
