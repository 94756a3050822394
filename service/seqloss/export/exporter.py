"""Exports a checkpoint: loads, captures, measures, and only then writes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from seqloss import __version__
from seqloss.bundle.manifest import (
    ALL_TERMS_GRAPH,
    SCHEMA_VERSION,
    TERMS_GRAPH,
    TOKENIZER_FOLDER,
    WEIGHTS_NAME,
    Checkpoint,
    EngineName,
    File,
    Graph,
    Manifest,
    Precision,
    SelfTest,
    Vocabulary,
)
from seqloss.bundle.reader import open_bundle
from seqloss.bundle.writer import new_bundle, refuse_unless_free, seal
from seqloss.engines.self_test import self_test_errors
from seqloss.engines.torch_engine import TorchEngine
from seqloss.errors import CheckpointError
from seqloss.export.graph import LossGraph, capture, weights_of
from seqloss.export.huggingface import LoadedCheckpoint, load_checkpoint
from seqloss.export.reference import make_self_test

# Beyond this, in nats per token, the graph is not the model.
_WORST_ERROR = 1e-3
# float32 sums in another order differ by so much; a device may be off by a few times what was
# measured here.
_LEAST_TOLERANCE = 2e-5
_TOLERANCE_FACTOR = 4


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        engine: whose graph.
        precision: of the graph's arithmetic.
        excluded_classes: first and last of ranges of classes to keep out of the softmax.
        force: whether a bundle at the output is replaced.
    """

    engine: EngineName = "torch"
    precision: Precision = "float32"
    excluded_classes: tuple[tuple[int, int], ...] = ()
    force: bool = False


def export_checkpoint(name: str, output: Path, options: ExportOptions) -> Manifest:
    """Writes a bundle of the checkpoint, measured against transformers.

    Args:
        name: a local folder or a hub name.
        output: the bundle's folder; made whole or not at all.
        options: engine, precision, excluded classes.

    Raises:
        CheckpointError: the checkpoint cannot be exported; all faults at once.
        BundleError: the output exists.
    """
    refuse_unless_free(output, force=options.force)
    checkpoint = load_checkpoint(name)
    vocabulary = _vocabulary(checkpoint, options)
    self_test = make_self_test(checkpoint, vocabulary)
    graph = Graph(
        engine=options.engine,
        precision=options.precision,
        layout="padded",
        folder=f"graphs/{options.engine}-{options.precision}",
        exported_with=f"torch {torch.__version__}",
        max_error=0.0,
        mean_error=0.0,
        tolerance=1.0,
    )
    with new_bundle(output, force=options.force) as folder:
        aliases = _write_files(folder, checkpoint, graph, vocabulary)

        def manifest_of(graph: Graph, files: dict[str, File]) -> Manifest:
            return _manifest(checkpoint, vocabulary, self_test, aliases, graph, files)

        seal(folder, partial(manifest_of, graph))
        return seal(folder, partial(manifest_of, _measured(folder, graph)))


def _vocabulary(checkpoint: LoadedCheckpoint, options: ExportOptions) -> Vocabulary:
    model = checkpoint.model
    classes = model.get_output_embeddings().weight.shape[0]
    for first, last in options.excluded_classes:
        if not first <= last < classes:
            raise CheckpointError(
                f"classes {first}-{last} cannot be excluded: there are {classes}, from 0"
            )
    vocabulary = Vocabulary(
        source=model.get_encoder().get_input_embeddings().num_embeddings,
        target=model.get_decoder().get_input_embeddings().num_embeddings,
        classes=classes,
        excluded_classes=list(options.excluded_classes),
    )
    if vocabulary.num_classes < 1:
        raise CheckpointError("every class is excluded, and nothing is left to predict")
    return vocabulary


def _write_files(
    folder: Path, checkpoint: LoadedCheckpoint, graph: Graph, vocabulary: Vocabulary
) -> dict[str, str]:
    """Writes all but the manifest; returns the weights' aliases."""
    (folder / graph.folder).mkdir(parents=True)
    excluded = [int(index) for index in np.flatnonzero(vocabulary.excluded)]
    aliases: dict[str, str] = {}
    for name, all_terms in ((TERMS_GRAPH, False), (ALL_TERMS_GRAPH, True)):
        module = LossGraph(checkpoint.model, excluded, with_ranks_and_entropies=all_terms)
        if not all_terms:
            stored, aliases = weights_of(module)
            save_file(stored, folder / WEIGHTS_NAME)
            # safetensors makes it private; whoever may read the bundle may read all of it.
            (folder / WEIGHTS_NAME).chmod(0o644)
        (folder / graph.folder / name).write_bytes(capture(module))
    if checkpoint.tokenizer_files:
        (folder / TOKENIZER_FOLDER).mkdir()
        for path in checkpoint.tokenizer_files:
            shutil.copyfile(path, folder / TOKENIZER_FOLDER / path.name)
    return aliases


def _manifest(
    checkpoint: LoadedCheckpoint,
    vocabulary: Vocabulary,
    self_test: SelfTest,
    aliases: dict[str, str],
    graph: Graph,
    files: dict[str, File],
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        seqloss_version=__version__,
        family=checkpoint.family,
        checkpoint=Checkpoint(name=checkpoint.name, digest=checkpoint.digest),
        vocabulary=vocabulary,
        special_ids=checkpoint.special_ids,
        max_source_tokens=checkpoint.max_positions,
        max_target_tokens=checkpoint.max_positions,
        weight_aliases=aliases,
        graphs=[graph],
        self_test=self_test,
        files=files,
    )


def _measured(folder: Path, graph: Graph) -> Graph:
    """The graph with the error that the written bundle, opened again, has on this CPU."""
    bundle = open_bundle(folder)
    engine = TorchEngine(bundle, graph, "cpu")
    errors = self_test_errors(engine, bundle.manifest)
    engine.close()
    largest = float(errors.max())
    if not largest <= _WORST_ERROR:
        raise CheckpointError(
            f"the exported graph is off by {largest:.3g} nats per token from transformers, and "
            f"{_WORST_ERROR:g} is allowed: this family computes something that the graph does not"
        )
    return graph.model_copy(
        update={
            "max_error": largest,
            "mean_error": float(errors.mean()),
            "tolerance": max(_LEAST_TOLERANCE, _TOLERANCE_FACTOR * largest),
        }
    )
