"""How much arithmetic a workload needs at the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of an encoder-decoder transformer."""

    vocabulary: int
    width: int
    encoder_layers: int
    decoder_layers: int
    ffn_width: int


def useful_operations(
    shape: Shape, source_lengths: Sequence[int], target_lengths: Sequence[int]
) -> int:
    """Operations of all matrix products, without padding; a multiply-add counts as two.

    With D the model's width, F that of its feed-forward layers, V the vocabulary, S and T the
    lengths of a pair, the multiply-adds are

        encoder layer   S (4 DD + 2 DF)   projections of self-attention, feed-forward
                        2 SS D            scores and weighted sums
        decoder layer   T (4 DD + 2 DF)   as above
                        2 D T(T + 1)/2    the same, causal: position t sees t positions
                        T 2 DD + S 2 DD   projections of cross-attention: queries and outputs for
                                          the target, keys and values for the source
                        2 ST D            its scores and weighted sums
        head            T V D             the output projection

    What is not a matrix product (softmax, layer norms, activations, embeddings) is left out.
    """
    return sum(
        encoder_operations(shape, source) + target_operations(shape, source, target)
        for source, target in zip(source_lengths, target_lengths, strict=True)
    )


def encoder_operations(shape: Shape, source: int) -> int:
    """Of one source, however many targets it has."""
    return (
        2
        * shape.encoder_layers
        * (source * _token_multiply_adds(shape) + 2 * source * source * shape.width)
    )


def target_operations(shape: Shape, source: int, target: int) -> int:
    """Of one target: the decoder, the cross-attention's keys and values included, and the head."""
    return 2 * (_decoder(shape, source, target) + _head(shape, target))


def encode_once_gain(
    shape: Shape, source_tokens: int, target_tokens: int, num_candidates: int
) -> float:
    """Operations where every target's source is encoded, over those where each source is once."""
    encoder = encoder_operations(shape, source_tokens)
    target = target_operations(shape, source_tokens, target_tokens)
    return (encoder + target) / (encoder / num_candidates + target)


def _decoder(shape: Shape, source: int, target: int) -> int:
    causal = shape.width * target * (target + 1)
    cross = 2 * (source + target) * shape.width**2 + 2 * source * target * shape.width
    return shape.decoder_layers * (target * _token_multiply_adds(shape) + causal + cross)


def _head(shape: Shape, target: int) -> int:
    return target * shape.vocabulary * shape.width


def _token_multiply_adds(shape: Shape) -> int:
    """Of one token in one layer: self-attention's projections and the feed-forward layers."""
    return 4 * shape.width**2 + 2 * shape.width * shape.ffn_width
