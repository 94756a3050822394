"""Makes a bundle of graphs: writes, measures, and only then lets it be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from seqloss import __version__
from seqloss.bundle.manifest import (
    SCHEMA_VERSION,
    TOKENIZER_FOLDER,
    Checkpoint,
    File,
    Graph,
    Languages,
    Manifest,
    Precision,
    SelfTest,
    SpecialIds,
    Vocabulary,
)
from seqloss.bundle.reader import open_bundle
from seqloss.bundle.writer import new_bundle, seal
from seqloss.engines.loader import open_engine
from seqloss.engines.self_test import require_limits, self_test_errors
from seqloss.errors import CheckpointError
from seqloss.export.texts import StoredText

# A device may be off by a few times what was measured here: it sums in another order.
_TOLERANCE_FACTOR = 4


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Of errors of token nlls, in nats.

    Attributes:
        refused: beyond this the graph is not the model.
        least_tolerance: what a device may always be off by.
    """

    refused: float
    least_tolerance: float


# In 16 bits a token of a T5 with large logits may be off by tenths of a nat and still be right.
_BOUNDS: dict[Precision, _Bounds] = {
    "float32": _Bounds(refused=1e-3, least_tolerance=2e-5),
    "bfloat16": _Bounds(refused=1.0, least_tolerance=0.1),
    "float16": _Bounds(refused=1.0, least_tolerance=0.02),
    "int8": _Bounds(refused=1.0, least_tolerance=0.1),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a bundle says of the model that it was made of; see `seqloss.bundle.manifest`.

    Attributes:
        family: transformers' name of it.
        checkpoint: its name and digest.
        vocabulary: its sizes.
        special_ids: ids with a meaning.
        languages: how it is told the languages of a pair, where it is.
        max_positions: the longest source and target, where they are bounded.
        softcap: the bound of its logits, where it has one.
        text: what makes ids of texts, where there is a tokenizer.
    """

    family: str
    checkpoint: Checkpoint
    vocabulary: Vocabulary
    special_ids: SpecialIds
    languages: Languages | None
    max_positions: tuple[int | None, int | None]
    softcap: float | None
    text: StoredText | None


@dataclass(frozen=True, slots=True)
class Graphs:
    """What was written: the graphs, and the names that share a tensor of Torch graphs' weights."""

    graphs: list[Graph]
    weight_aliases: dict[str, str]


def vocabulary_of(
    source: int, target: int, classes: int, excluded: Sequence[tuple[int, int]], decoder_start: int
) -> Vocabulary:
    """The sizes, held against one another.

    Args:
        source: ids of the encoder.
        target: ids of the decoder.
        classes: of the logits.
        excluded: first and last of ranges of classes to keep out of the softmax.
        decoder_start: what the decoder is fed first.

    Raises:
        CheckpointError: they contradict one another.
    """
    for first, last in excluded:
        if not first <= last < classes:
            raise CheckpointError(
                f"classes {first}-{last} cannot be excluded: there are {classes}, from 0"
            )
    vocabulary = Vocabulary(
        source=source, target=target, classes=classes, excluded_classes=list(excluded)
    )
    if decoder_start >= target:
        raise CheckpointError(
            f"the decoder cannot start with {decoder_start}: there are {target} ids, from 0"
        )
    if vocabulary.num_classes < 1:
        raise CheckpointError("every class is excluded, and nothing is left to predict")
    return vocabulary


def write_bundle(
    output: Path,
    origin: Origin,
    self_test: SelfTest,
    write_graphs: Callable[[Path], Graphs],
    *,
    force: bool,
) -> Manifest:
    """Writes a bundle whose errors are measured, whole or not at all.

    Args:
        output: the bundle's folder.
        origin: what it is made of.
        self_test: what its graphs are held against.
        write_graphs: writes them into the folder that it is given; errors are measured afterwards.
        force: whether a bundle at the output is replaced.

    Raises:
        BundleError: the output exists.
        CheckpointError: a graph computes something else than the self-test says.
    """
    with new_bundle(output, force=force) as folder:
        written = write_graphs(folder)
        _write_tokenizers(folder, origin.text)

        def manifest_of(graphs: list[Graph], files: dict[str, File]) -> Manifest:
            return _manifest(origin, self_test, Graphs(graphs, written.weight_aliases), files)

        seal(folder, partial(manifest_of, written.graphs))
        measured = [_measured(folder, graph) for graph in written.graphs]
        return seal(folder, partial(manifest_of, measured))


def _write_tokenizers(folder: Path, stored: StoredText | None) -> None:
    if stored is not None:
        (folder / TOKENIZER_FOLDER).mkdir()
        for path, content in stored.files.items():
            (folder / path).write_bytes(content)


def _manifest(
    origin: Origin, self_test: SelfTest, written: Graphs, files: dict[str, File]
) -> Manifest:
    max_source_tokens, max_target_tokens = origin.max_positions
    return Manifest(
        schema_version=SCHEMA_VERSION,
        seqloss_version=__version__,
        family=origin.family,
        checkpoint=origin.checkpoint,
        vocabulary=origin.vocabulary,
        special_ids=origin.special_ids,
        languages=origin.languages,
        text=None if origin.text is None else origin.text.text,
        max_source_tokens=max_source_tokens,
        max_target_tokens=max_target_tokens,
        softcap=origin.softcap,
        weight_aliases=written.weight_aliases,
        graphs=written.graphs,
        self_test=self_test,
        files=files,
    )


def _measured(folder: Path, graph: Graph) -> Graph:
    """The graph with the error that the written bundle, opened again, has on this CPU."""
    bundle = open_bundle(folder)
    engine = open_engine(bundle, graph, "cpu")
    require_limits(engine, bundle.manifest)
    errors = self_test_errors(engine, bundle.manifest)
    engine.close()
    largest, mean = float(errors.max()), float(errors.mean())
    bounds = _BOUNDS[graph.precision]
    if not largest <= bounds.refused:
        raise CheckpointError(
            f"the written graph in {graph.precision} is off by {largest:.3g} nats per token from "
            f"{bundle.manifest.self_test.described}, and {bounds.refused:g} is allowed: the model "
            "computes something that the graph does not, or pairs depend on others in their batch"
        )
    return graph.model_copy(
        update={
            "max_error": largest,
            "mean_error": mean,
            "tolerance": min(1.0, max(bounds.least_tolerance, _TOLERANCE_FACTOR * largest)),
            "mean_tolerance": min(1.0, max(bounds.least_tolerance / 2, _TOLERANCE_FACTOR * mean)),
        }
    )
