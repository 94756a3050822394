"""What is swept: each sweep is a function whose docstring says what it measures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.models import MODELS, Model, marian
from benchmarks.operations import Shape, encoder_operations, target_operations
from benchmarks.pairs import Pairs
from benchmarks.serving.clients import IdLimits, PairStream

_SMALL_MODEL = "tiny"
_LENGTHS = (8, 16, 32, 64, 128, 256, 512)
_CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
_CANDIDATE_TOKENS = 32
_BATCH_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
# Of `Size.tokens`: the largest batches shall be some, and have pairs to choose from.
_TIMES_MORE_FOR_BATCHES = 4
_VOCABULARIES = {
    f"vocabulary-{size}": marian(size, width=256, layers=2, heads=4, ffn_width=1024)
    for size in (2**15, 2**16, 2**17, 2**18)
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured.

    Attributes:
        model: a name in `MODELS`, for the sweeps that do not bring their own.
        tokens: of the sources and of the targets of a point, of each some that many.
        most_pairs: where the sweep over pairs ends.
    """

    model: str
    tokens: int
    most_pairs: int


@dataclass(frozen=True, slots=True)
class Point:
    """One place on the axis; its pairs are made where they are scored, since they may be many.

    Attributes:
        value: on the axis.
        model: what `model_named` knows.
        num_targets: that are scored.
        length: of all sources and targets, in tokens; None for the lengths of sentences.
        num_candidates: targets of each source.
        max_batch_tokens: the setting of that name; None for its default.
    """

    value: int
    model: str
    num_targets: int
    length: int | None = None
    num_candidates: int = 1
    max_batch_tokens: int | None = None

    def pairs(self, limits: IdLimits) -> Pairs:
        """Random ids, the same ones every time; fewer sources than targets, in their order."""
        stream = PairStream(limits)
        if self.length is None:
            return stream.take(self.num_targets)
        num_sources = self.num_targets // self.num_candidates
        sources = stream.rows([self.length] * num_sources)
        return Pairs(sources, stream.rows([self.length] * self.num_targets))

    def operations(self, shape: Shape, pairs: Pairs) -> int:
        """As `useful_operations` counts them, with every source encoded once."""
        sources = pairs.source_lengths
        return sum(encoder_operations(shape, length) for length in sources) + sum(
            target_operations(shape, sources[index // self.num_candidates], length)
            for index, length in enumerate(pairs.target_lengths)
        )


@dataclass(frozen=True, slots=True)
class Sweep:
    """Points along an axis.

    Attributes:
        name: on the command line.
        axis: what `Point.value` is, in words.
        about: what is measured, and how.
        points: in the order of their values.
        counts_sources: whether a token of a source counts where the cost of one is stated; if not,
            those of targets do alone.
        with_float32: whether it is measured in float32 too.
    """

    name: str
    axis: str
    about: str
    points: tuple[Point, ...]
    counts_sources: bool = False
    with_float32: bool = False


def pairs(size: Size) -> Sweep:
    """Tenfold more pairs each time, of 8 tokens on both sides, for the model `tiny`.

    With a model of real size the most pairs would take an hour, and this shall end in minutes. Most
    of the time is what the service does for each pair, and not arithmetic: the cost is that of
    requests, queue and batches, and the share of the limit says little. Up to 2,048 pairs are one
    request, and four requests are under way.
    """
    counts = [10**power for power in range(2, 1 + round(math.log10(size.most_pairs)))]
    return Sweep(
        name="pairs",
        axis="pairs",
        about=_about(pairs),
        points=tuple(
            Point(count, _SMALL_MODEL, num_targets=count, length=min(_LENGTHS)) for count in counts
        ),
    )


def lengths(size: Size) -> Sweep:
    """Sources and targets of one length each, and the same number of tokens at every length.

    Attention grows with the square of the length; short targets are many, and each of them has a
    row of its own in every step of the batching. Lengths beyond what the model takes are left out.
    """
    most = getattr(MODELS[size.model].config(), "max_position_embeddings", None) or math.inf
    return Sweep(
        name="lengths",
        axis="tokens of each source and each target",
        about=_about(lengths),
        points=tuple(
            Point(length, size.model, num_targets=max(1, size.tokens // length), length=length)
            for length in _LENGTHS
            if length <= most
        ),
        counts_sources=True,
        with_float32=True,
    )


def vocabulary(size: Size) -> Sweep:
    """Models of 2 layers and width 256, which differ in the number of their classes alone.

    Pairs have 32 tokens on both sides. The output layer is most of the work, and the logits of all
    tokens would be most of the memory.
    """
    num_targets = max(1, size.tokens // _CANDIDATE_TOKENS)
    return Sweep(
        name="vocabulary",
        axis="classes",
        about=_about(vocabulary),
        points=tuple(
            Point(model.settings["vocab_size"], name, num_targets, _CANDIDATE_TOKENS)
            for name, model in _VOCABULARIES.items()
        ),
        with_float32=True,
    )


def candidates(size: Size) -> Sweep:
    """Targets per source: the targets stay the same in number, so that sources become fewer.

    All have 32 tokens. A source is encoded once for all its targets, and native graphs compute the
    cross-attention's keys and values once too; the limit counts those for every target.
    """
    most = max(_CANDIDATES)
    num_targets = most * max(1, size.tokens // _CANDIDATE_TOKENS // most)
    return Sweep(
        name="candidates",
        axis="targets of each source",
        about=_about(candidates),
        points=tuple(
            Point(count, size.model, num_targets, _CANDIDATE_TOKENS, count) for count in _CANDIDATES
        ),
    )


def batch_tokens(size: Size) -> Sweep:
    """The setting `max_batch_tokens`: padded tokens of a batch, both sides together.

    Pairs have the lengths of sentences. Larger batches do more with each weight that is read, and
    hold more hidden states; where padding would cost more than that brings they are not filled.
    """
    model = MODELS[size.model]
    stream = PairStream(IdLimits(model.config().vocab_size, max_tokens=512))
    wanted = _TIMES_MORE_FOR_BATCHES * 2 * size.tokens
    num_targets = max(1, round(wanted / stream.tokens_per_pair))
    return Sweep(
        name="batch-tokens",
        axis="max_batch_tokens",
        about=_about(batch_tokens),
        points=tuple(
            Point(tokens, size.model, num_targets, max_batch_tokens=tokens)
            for tokens in _BATCH_TOKENS
        ),
    )


SWEEPS: dict[str, Callable[[Size], Sweep]] = {
    "pairs": pairs,
    "lengths": lengths,
    "vocabulary": vocabulary,
    "candidates": candidates,
    "batch-tokens": batch_tokens,
}


def model_named(name: str) -> Model:
    """Of `MODELS`, or one that a sweep brings."""
    return (MODELS | _VOCABULARIES)[name]


def parts(pairs: Pairs, num_candidates: int, most_targets: int) -> Iterator[Pairs]:
    """What one request takes at a time; a source and its targets stay together."""
    num_sources = max(1, most_targets // num_candidates)
    for start in range(0, len(pairs.source_ids), num_sources):
        end = start + num_sources
        targets = pairs.target_ids[start * num_candidates : end * num_candidates]
        yield Pairs(pairs.source_ids[start:end], targets)


def _about(sweep: Callable[[Size], Sweep]) -> str:
    return inspect.cleandoc(sweep.__doc__ or "")
