"""Holds a bundle against a checkpoint, pair by pair, as whoever serves it would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from seqloss.bundle.manifest import EngineName, Graph, Manifest, Precision
from seqloss.bundle.reader import Bundle
from seqloss.engines.base import Engine
from seqloss.engines.loader import open_engine
from seqloss.engines.self_test import token_nlls
from seqloss.errors import CheckpointError
from seqloss.export.graph import embeddings_of
from seqloss.export.huggingface import LoadedCheckpoint, load_checkpoint
from seqloss.export.reference import Reference

_SEED = 20261122
_TARGETS_PER_SOURCE = 4
_LONGEST = 48
_PAIRS_PER_BATCH = 32
_HEADINGS = (
    f"{'engine':6} {'precision':9} {'pairs':6} {'number':>6} {'tokens':>7} {'nll':>7} "
    f"{'max':>8} {'mean':>8} {'max':>8} {'mean':>8}"
)
# More faults than these help nobody.
_MOST_FAULTS = 10


class _Line(BaseModel):
    """A pair, as a line of JSON."""

    model_config = ConfigDict(extra="ignore", strict=True)

    source_ids: list[NonNegativeInt] = Field(min_length=1)
    target_ids: list[NonNegativeInt] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to verify on.

    Attributes:
        device: `auto`, `cpu` or `cuda:N`.
        num_sources: random sources; each gets targets that are drawn from the model.
        pairs: a file of pairs, one JSON object a line with `source_ids` and `target_ids`.
    """

    device: str = "auto"
    num_sources: int = 16
    pairs: Path | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A graph against transformers on some pairs; errors are absolute differences, in nats.

    Attributes:
        engine: whose graph it is.
        precision: of the graph.
        pairs: `drawn` from the model, or `given`.
        num_pairs: how many.
        num_tokens: of their targets.
        mean_nll: per token, as transformers has it; far below ln V where the model is sure of
            itself, and only then do the errors mean much.
        least_nll: of a token, as the graph has it.
        max_token_error: of a token's nll.
        mean_token_error: likewise.
        max_pair_error: of a pair's mean nll.
        mean_pair_error: likewise.
        tolerance: what `max_token_error` may be.
    """

    engine: EngineName
    precision: Precision
    pairs: str
    num_pairs: int
    num_tokens: int
    mean_nll: float
    least_nll: float
    max_token_error: float
    mean_token_error: float
    max_pair_error: float
    mean_pair_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the graph computes what it says; NaN does not."""
        return self.max_token_error <= self.tolerance and self.least_nll >= 0


@dataclass(frozen=True, slots=True)
class Verification:
    """All of a bundle's graphs against a checkpoint.

    Attributes:
        same_checkpoint: whether the bundle was exported from this very checkpoint.
        device: where the bundle ran.
        comparisons: one per graph and kind of pairs.
    """

    same_checkpoint: bool
    device: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether all graphs compute what they say."""
        return all(comparison.passed for comparison in self.comparisons)

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs; null for what is not finite."""
        comparisons = [
            {key: _number(value) for key, value in asdict(one).items()} for one in self.comparisons
        ]
        return asdict(self) | {"comparisons": comparisons, "passed": self.passed}

    def as_text(self) -> str:
        """A table for people."""
        lines = [
            f"on {self.device}, against transformers in float32 on the CPU; in nats",
            f"{'':38} {'mean':>7} {'token error':>17} {'pair mean error':>17}",
            _HEADINGS,
        ]
        for row in self.comparisons:
            fault = "" if row.passed else f"  FAILED: {row.tolerance:.1e} is allowed"
            lines.append(
                f"{row.engine:6} {row.precision:9} {row.pairs:6} {row.num_pairs:6} "
                f"{row.num_tokens:7} {row.mean_nll:7.3f} {row.max_token_error:8.1e} "
                f"{row.mean_token_error:8.1e} {row.max_pair_error:8.1e} "
                f"{row.mean_pair_error:8.1e}{fault}"
            )
        if not self.same_checkpoint:
            lines.append("the bundle was exported from a checkpoint with other weights")
        return "\n".join(lines)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pairs of one kind, with what transformers says of them."""

    kind: str
    sources: list[list[int]]
    targets: list[list[int]]
    nlls: list[list[float]]


def verify_bundle(bundle: Bundle, checkpoint_name: str, options: VerifyOptions) -> Verification:
    """Compares every graph of a bundle with transformers in float32.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or the pairs' file is wrong.
        ConfigurationError: there is no such device.
    """
    manifest = bundle.manifest
    checkpoint = load_checkpoint(checkpoint_name, manifest.special_ids.decoder_start)
    _refuse_another_size(checkpoint, manifest)
    excluded = [int(index) for index in np.flatnonzero(manifest.vocabulary.excluded)]
    reference = Reference(checkpoint.model, manifest.special_ids.decoder_start, excluded)
    kinds = [_drawn(reference, checkpoint, manifest, options.num_sources)]
    if options.pairs is not None:
        kinds.append(_given(reference, manifest, options.pairs))
    comparisons = []
    device = ""
    for graph in manifest.graphs:
        engine = open_engine(bundle, graph, options.device)
        device = engine.info.device
        comparisons += [_compare(engine, graph, manifest, pairs) for pairs in kinds]
        engine.close()
    return Verification(checkpoint.digest == manifest.checkpoint.digest, device, tuple(comparisons))


def _refuse_another_size(checkpoint: LoadedCheckpoint, manifest: Manifest) -> None:
    model, vocabulary = checkpoint.model, manifest.vocabulary
    sizes = (
        ("source ids", embeddings_of(model.get_encoder()).num_embeddings, vocabulary.source),
        ("target ids", embeddings_of(model.get_decoder()).num_embeddings, vocabulary.target),
        ("classes", len(checkpoint.family.output_layer(model).weight), vocabulary.classes),
        ("source positions", checkpoint.max_positions[0], manifest.max_source_tokens),
        ("target positions", checkpoint.max_positions[1], manifest.max_target_tokens),
    )
    if faults := [
        f"{what}: {found}, and the bundle has {expected}"
        for what, found, expected in sizes
        if found != expected
    ]:
        raise CheckpointError(f"{checkpoint.name} is another model than the bundle's", faults)


def _drawn(
    reference: Reference, checkpoint: LoadedCheckpoint, manifest: Manifest, num_sources: int
) -> _Pairs:
    generator = np.random.default_rng(_SEED)
    longest = [min(_LONGEST, limit or _LONGEST) for limit in checkpoint.max_positions]
    sources, targets = [], []
    for _ in range(num_sources):
        source_length, target_length = (int(generator.integers(1, most + 1)) for most in longest)
        source = generator.integers(manifest.vocabulary.source, size=source_length).tolist()
        sources += [source] * _TARGETS_PER_SOURCE
        targets += reference.draw(source, target_length, generator, _TARGETS_PER_SOURCE)
    return _referred(reference, "drawn", sources, targets)


def _given(reference: Reference, manifest: Manifest, path: Path) -> _Pairs:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    pairs, faults = [], []
    for number, line in enumerate(lines, start=1):
        try:
            pair = _Line.model_validate_json(line)
            faults += [f"line {number}: {fault}" for fault in _range_faults(pair, manifest)]
            pairs.append(pair)
        except ValidationError as error:
            faults += [f"line {number}: {fault['loc']}: {fault['msg']}" for fault in error.errors()]
    if faults or not pairs:
        raise CheckpointError(
            f"{path} is not a file of pairs: each line is a JSON object with source_ids and "
            "target_ids",
            faults[:_MOST_FAULTS],
        )
    return _referred(
        reference, "given", [pair.source_ids for pair in pairs], [pair.target_ids for pair in pairs]
    )


def _range_faults(pair: _Line, manifest: Manifest) -> Iterator[str]:
    for side, ids, size, longest in (
        ("source", pair.source_ids, manifest.vocabulary.source, manifest.max_source_tokens),
        ("target", pair.target_ids, manifest.vocabulary.target, manifest.max_target_tokens),
    ):
        if max(ids) >= size:
            yield f"the {side} has the id {max(ids)}, and there are {size}"
        if longest is not None and len(ids) > longest:
            yield f"the {side} has {len(ids)} ids, and {longest} are possible"
    for index in pair.target_ids:
        if any(first <= index <= last for first, last in manifest.vocabulary.excluded_classes):
            yield f"the target has the id {index}, which the bundle excludes from its classes"


def _referred(
    reference: Reference, kind: str, sources: list[list[int]], targets: list[list[int]]
) -> _Pairs:
    nlls = [reference.nlls(*pair) for pair in zip(sources, targets, strict=True)]
    return _Pairs(kind, sources, targets, nlls)


def _compare(engine: Engine, graph: Graph, manifest: Manifest, pairs: _Pairs) -> Comparison:
    start = manifest.special_ids.decoder_start
    scored = np.concatenate(
        [
            token_nlls(engine, pairs.sources[batch], pairs.targets[batch], start)
            for first in range(0, len(pairs.targets), _PAIRS_PER_BATCH)
            for batch in [slice(first, first + _PAIRS_PER_BATCH)]
        ]
    )
    expected = np.concatenate(pairs.nlls)
    lengths = np.array([len(target) for target in pairs.targets])
    begins = np.cumsum(lengths) - lengths
    token_error = np.abs(scored - expected)
    pair_error = np.abs(np.add.reduceat(scored - expected, begins) / lengths)
    return Comparison(
        engine=graph.engine,
        precision=graph.precision,
        pairs=pairs.kind,
        num_pairs=len(lengths),
        num_tokens=len(scored),
        mean_nll=float(expected.mean()),
        least_nll=float(scored.min()),
        max_token_error=float(token_error.max()),
        mean_token_error=float(token_error.mean()),
        max_pair_error=float(pair_error.max()),
        mean_pair_error=float(pair_error.mean()),
        tolerance=graph.tolerance,
    )
