"""A compact encoder-decoder for scoring: packed sequences, fused projections, sources once.

N source tokens and M target tokens stand in one row after the other, without padding. The residual
stream is float32; matrix products have the dtype of their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from seqloss.model import operators as _  # noqa: F401 - defines what `_OPS` names

_OPS: Any = torch.ops.seqloss


@dataclass(frozen=True, slots=True)
class Side:
    """The sizes of an encoder or a decoder.

    Attributes:
        layers: how many.
        heads: of each attention.
        embedding_scale: of embeddings, before positions are added.
    """

    layers: int
    heads: int
    embedding_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """What distinguishes the families, beside their sizes, which the weights tell.

    Attributes:
        encoder, decoder: their sizes.
        activation: of feed-forward layers; see `seqloss.model.operators.ACTIVATIONS`.
        norms_first: whether a sublayer's input is normalised, or the sum with its output.
        epsilon: of norms.
        attention_scale: of scores.
        output_scale: of the hidden states that the output layer is given.
        norms_embedding_alone: whether a decoder's embedding is normalised before positions are
            added to it, and not after, where it is normalised at all.
    """

    encoder: Side
    decoder: Side
    activation: str
    norms_first: bool
    epsilon: float
    attention_scale: float
    output_scale: float = 1.0
    norms_embedding_alone: bool = False


class Linear(nn.Module):
    """A weight in the products' dtype, and a bias in float32 or none."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _frozen(weight.to(dtype))
        self.bias = None if bias is None else _frozen(bias)

    def forward(self, inputs: Tensor, activation: str) -> Tensor:
        """Of the weight's dtype. Shape: (N, inner) to (N, outputs)."""
        outputs: Tensor = _OPS.linear(inputs, self.weight, self.bias, activation, self.weight.dtype)
        return outputs

    def wide(self, inputs: Tensor) -> Tensor:
        """In float32, for attention. Shape: (N, inner) to (N, outputs)."""
        outputs: Tensor = _OPS.linear(inputs, self.weight, self.bias, "none", torch.float32)
        return outputs

    def added_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """`residual` with the outputs added, in float32. Shape: (N, outputs)."""
        total: Tensor = _OPS.linear_add(inputs, self.weight, self.bias, residual)
        return total


class Norm(nn.Module):
    """Layer norm, or RMS norm where there is no bias."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = _frozen(weight)
        self.bias = None if bias is None else _frozen(bias)
        self._epsilon, self._dtype = epsilon, dtype

    def forward(self, stream: Tensor) -> Stream:
        """In float32, and rounded for products. Shapes: (N, D)."""
        return Stream(*_OPS.norm(stream, self.weight, self.bias, self._epsilon, self._dtype))


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream.

    Attributes:
        values: float32. Shape: (N, D).
        inputs: the same as the next products take it.
    """

    values: Tensor
    inputs: Tensor


class Sequences(NamedTuple):
    """Which rows belong together; see `seqloss.model.operators.attention`. Shapes: (B,)."""

    query_starts: Tensor
    query_ends: Tensor
    key_starts: Tensor
    key_ends: Tensor


class _Weights:
    """A part of the weights, by names below a prefix."""

    def __init__(
        self, of: Mapping[str, Tensor], architecture: Architecture, dtype: torch.dtype, prefix: str
    ) -> None:
        self._of, self._prefix = of, prefix
        self.architecture, self.dtype = architecture, dtype

    def below(self, name: str) -> _Weights:
        return _Weights(self._of, self.architecture, self.dtype, f"{self._prefix}{name}.")

    def get(self, name: str) -> Tensor | None:
        return self._of.get(f"{self._prefix}{name}")

    def linear(self, name: str) -> Linear:
        return Linear(
            self._of[f"{self._prefix}{name}.weight"], self.get(f"{name}.bias"), self.dtype
        )

    def norm(self, name: str) -> Norm:
        weight = self._of[f"{self._prefix}{name}.weight"]
        return Norm(weight, self.get(f"{name}.bias"), self.architecture.epsilon, self.dtype)

    def optional_norm(self, name: str) -> Norm | None:
        return None if self.get(f"{name}.weight") is None else self.norm(name)


class SelfAttention(nn.Module):
    """Queries, keys and values of one product."""

    def __init__(self, weights: _Weights, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.qkv, self.output = weights.linear("qkv"), weights.linear("output")
        bias = weights.get("distance_bias")
        self.distance_bias = None if bias is None else _frozen(bias)
        self._heads, self._causal = heads, causal
        self._scale = weights.architecture.attention_scale

    def forward(self, stream: Stream, sequences: Sequences) -> Tensor:
        """The stream with what was attended to. Shape: (N, D)."""
        queries, keys, values = self.qkv.wide(stream.inputs).chunk(3, dim=1)
        attended = _OPS.attention(
            queries,
            keys,
            values,
            *sequences,
            self.distance_bias,
            self._heads,
            self._scale,
            self._causal,
            stream.inputs.dtype,
        )
        return self.output.added_to(stream.values, attended)


class CrossAttention(nn.Module):
    """Keys and values of each source once, however many targets attend to it."""

    def __init__(self, weights: _Weights, heads: int) -> None:
        super().__init__()
        self.query, self.kv = weights.linear("query"), weights.linear("kv")
        self.output = weights.linear("output")
        self._heads, self._scale = heads, weights.architecture.attention_scale

    def forward(self, stream: Stream, encoded: Tensor, sequences: Sequences) -> Tensor:
        """The stream with what was attended to. Shape: (M, D)."""
        keys, values = self.kv.wide(encoded).chunk(2, dim=1)
        attended = _OPS.attention(
            self.query.wide(stream.inputs),
            keys,
            values,
            *sequences,
            None,
            self._heads,
            self._scale,
            False,
            stream.inputs.dtype,
        )
        return self.output.added_to(stream.values, attended)


class FeedForward(nn.Module):
    """Two linear layers, or three where one gates the other."""

    def __init__(self, weights: _Weights) -> None:
        super().__init__()
        self.inner, self.output = weights.linear("inner"), weights.linear("output")
        self.gated = None if weights.get("gated.weight") is None else weights.linear("gated")
        self._activation = weights.architecture.activation

    def forward(self, stream: Stream) -> Tensor:
        """The stream with the outputs. Shape: (N, D)."""
        inner = self.inner(stream.inputs, self._activation)
        if self.gated is not None:
            inner = inner * self.gated(stream.inputs, "none")
        return self.output.added_to(stream.values, inner)


class Layer(nn.Module):
    """An encoder's layer, or a decoder's, which also attends to the encoder's output."""

    def __init__(self, weights: _Weights, heads: int, *, decodes: bool) -> None:
        super().__init__()
        self._norms_first = weights.architecture.norms_first
        self.attention = SelfAttention(weights.below("attention"), heads, causal=decodes)
        self.attention_norm = weights.norm("attention_norm")
        self.cross = CrossAttention(weights.below("cross"), heads) if decodes else None
        self.cross_norm = weights.norm("cross_norm") if decodes else None
        self.feed_forward = FeedForward(weights.below("feed_forward"))
        self.feed_forward_norm = weights.norm("feed_forward_norm")

    def forward(
        self,
        stream: Stream,
        own: Sequences,
        encoded: Tensor | None = None,
        across: Sequences | None = None,
    ) -> Stream:
        """Shapes of the stream: (N, D)."""
        stream = self._sublayer(self.attention, self.attention_norm, stream, own)
        if self.cross is not None and self.cross_norm is not None:
            stream = self._sublayer(self.cross, self.cross_norm, stream, encoded, across)
        return self._sublayer(self.feed_forward, self.feed_forward_norm, stream)

    def _sublayer(self, sublayer: nn.Module, norm: Norm, stream: Stream, *others: object) -> Stream:
        if self._norms_first:
            values = sublayer(Stream(stream.values, norm(stream.values).inputs), *others)
            return Stream(values, stream.inputs)  # the next norm makes its own inputs
        normed: Stream = norm(sublayer(stream, *others))
        return normed


class Stack(nn.Module):
    """An encoder or a decoder, embeddings included."""

    def __init__(
        self, weights: _Weights, side: Side, embeddings: nn.Parameter, decodes: bool
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        positions = weights.get("positions")
        self.positions = None if positions is None else _frozen(positions)
        self.embedding_norm = weights.optional_norm("embedding_norm")
        self.layers = nn.ModuleList(
            Layer(weights.below(f"layers.{index}"), side.heads, decodes=decodes)
            for index in range(side.layers)
        )
        self.final_norm = weights.optional_norm("final_norm")
        self._scale, self._dtype = side.embedding_scale, weights.dtype
        self._norms_alone = decodes and weights.architecture.norms_embedding_alone

    def forward(self, ids: Tensor, positions: Tensor, *sequences: Any) -> Stream:
        """The last layer's outputs. Shapes: (N,) and (N,) to (N, D)."""
        stream: Stream = self._embedded(ids, positions)
        for layer in self.layers:
            stream = layer(stream, *sequences)
        if self.final_norm is not None:
            stream = self.final_norm(stream.values)
        return stream

    def _embedded(self, ids: Tensor, positions: Tensor) -> Stream:
        values = embedding(ids, self.embeddings)
        if self._scale != 1:
            values = values * self._scale
        if self.embedding_norm is not None and self._norms_alone:
            values = self.embedding_norm(values).values
        if self.positions is not None:
            values = values + embedding(positions, self.positions)
        if self.embedding_norm is not None and not self._norms_alone:
            normed: Stream = self.embedding_norm(values)
            return normed
        return Stream(values, values.to(self._dtype))


class PackedTransformer(nn.Module):
    """From packed ids to what the output layer is given, of counted tokens only."""

    def __init__(
        self, architecture: Architecture, weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Takes the weights by the names that `seqloss.model.families` gives them.

        Args:
            architecture: what is not a weight.
            weights: all of them, in float32.
            dtype: of matrix products.
        """
        super().__init__()
        everything = _Weights(weights, architecture, dtype, "")
        # A table that both sides share is one weight of the graph.
        tables = {id(table): _frozen(table) for table in _tables(weights)}
        source, target = (tables[id(table)] for table in _tables(weights))
        self.encoder = Stack(everything.below("encoder"), architecture.encoder, source, False)
        self.decoder = Stack(everything.below("decoder"), architecture.decoder, target, True)
        self._output_scale = architecture.output_scale

    def forward(
        self,
        source_ids: Tensor,
        source_positions: Tensor,
        source_starts: Tensor,
        source_ends: Tensor,
        source_row: Tensor,
        decoder_input_ids: Tensor,
        target_positions: Tensor,
        target_starts: Tensor,
        target_ends: Tensor,
        token_index: Tensor,
    ) -> Tensor:
        """Shape: (K, D), float32; for the inputs see `seqloss.engines.layout.PackedInputs`."""
        sources, targets = (source_starts, source_ends), (target_starts, target_ends)
        encoded = self.encoder(
            source_ids, source_positions, Sequences(*sources, *sources)
        ).inputs  # (N, D)
        seen = [bounds.index_select(0, source_row) for bounds in sources]
        decoded: Tensor = self.decoder(
            decoder_input_ids,
            target_positions,
            Sequences(*targets, *targets),
            encoded,
            Sequences(*targets, *seen),
        ).values  # (M, D)
        hidden = decoded.index_select(0, token_index)  # (K, D)
        return hidden if self._output_scale == 1 else hidden * self._output_scale


def _tables(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return weights["encoder.embeddings"], weights["decoder.embeddings"]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
