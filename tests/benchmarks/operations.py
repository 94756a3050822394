"""How much arithmetic a workload needs at the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of an encoder-decoder transformer.

    Attributes:
        vocabulary: classes of the output layer.
        width: of the model.
        encoder_layers, decoder_layers: how many.
        ffn_width: of the feed-forward layers inside.
        heads_width: of all heads of an attention together; None where it is the model's.
        ffn_matrices: of one feed-forward layer: 2, or 3 where it is gated.
    """

    vocabulary: int
    width: int
    encoder_layers: int
    decoder_layers: int
    ffn_width: int
    heads_width: int | None = None
    ffn_matrices: int = 2

    @property
    def attention_width(self) -> int:
        """What scores are summed over, all heads together."""
        return self.width if self.heads_width is None else self.heads_width


def useful_operations(
    shape: Shape, source_lengths: Sequence[int], target_lengths: Sequence[int]
) -> int:
    """Operations of all matrix products, without padding; a multiply-add counts as two.

    With D the model's width, A that of all heads of an attention, F that of the M matrices of a
    feed-forward layer, V the vocabulary, S and T the lengths of a pair, the multiply-adds are

        encoder layer   S (4 DA + M DF)   projections of self-attention, feed-forward
                        2 SS A            scores and weighted sums
        decoder layer   T (4 DA + M DF)   as above
                        2 A T(T + 1)/2    the same, causal: position t sees t positions
                        T 2 DA + S 2 DA   projections of cross-attention: queries and outputs for
                                          the target, keys and values for the source
                        2 ST A            its scores and weighted sums
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
        * (source * _token_multiply_adds(shape) + 2 * source * source * shape.attention_width)
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
    inner = shape.attention_width
    causal = inner * target * (target + 1)
    cross = 2 * (source + target) * shape.width * inner + 2 * source * target * inner
    return shape.decoder_layers * (target * _token_multiply_adds(shape) + causal + cross)


def _head(shape: Shape, target: int) -> int:
    return target * shape.vocabulary * shape.width


def _token_multiply_adds(shape: Shape) -> int:
    """Of one token in one layer: self-attention's projections and the feed-forward layers."""
    feed_forward = shape.ffn_matrices * shape.ffn_width
    return shape.width * (4 * shape.attention_width + feed_forward)
