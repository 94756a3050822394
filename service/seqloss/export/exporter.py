"""Exports a checkpoint: loads, captures, measures, and only then writes."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from seqloss import __version__
from seqloss.bundle.manifest import (
    SCHEMA_VERSION,
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
from seqloss.engines.loader import open_engine
from seqloss.engines.self_test import require_limits, self_test_errors
from seqloss.errors import CheckpointError
from seqloss.export.graph import Body, capture, distinct, embeddings_of, projection_of, softcap_of
from seqloss.export.huggingface import LoadedCheckpoint, load_checkpoint
from seqloss.export.onnx_graph import write_onnx
from seqloss.export.precision import lowered
from seqloss.export.reference import make_self_test

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

# What each engine's graphs may be in; the first are exported unless something else is asked for.
_PRECISIONS: dict[EngineName, tuple[Precision, ...]] = {
    "torch": ("float32", "bfloat16", "float16"),
    "onnx": ("float32", "int8", "bfloat16", "float16"),
}
_DEFAULT_PRECISIONS: dict[EngineName, tuple[Precision, ...]] = {
    "torch": ("float32", "bfloat16"),
    "onnx": ("float32",),
}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        engines: whose graphs; the first one is preferred by whoever serves the bundle.
        precisions: of the graphs' arithmetic, one graph each, of each engine that has them; None
            for what each engine is best at.
        excluded_classes: first and last of ranges of classes to keep out of the softmax.
        decoder_start: instead of the configuration's decoder_start_token_id.
        unsafe_float16: whether float16 is allowed for families that are known to overflow in it.
        force: whether a bundle at the output is replaced.
    """

    engines: tuple[EngineName, ...] = ("torch",)
    precisions: tuple[Precision, ...] | None = ("float32",)
    excluded_classes: tuple[tuple[int, int], ...] = ()
    decoder_start: int | None = None
    unsafe_float16: bool = False
    force: bool = False

    @property
    def graphs(self) -> list[tuple[EngineName, Precision]]:
        """All of them, in order.

        Raises:
            CheckpointError: no engine has a precision that is asked for.
        """
        for precision in self.precisions or ():
            if not any(precision in _PRECISIONS[engine] for engine in self.engines):
                having = " or ".join(name for name, has in _PRECISIONS.items() if precision in has)
                raise CheckpointError(
                    f"{' and '.join(self.engines)} graphs do not come in {precision}; use --engine "
                    f"{having}, or another --precision"
                )
        return [
            (engine, precision)
            for engine in self.engines
            for precision in self.precisions or _DEFAULT_PRECISIONS[engine]
            if precision in _PRECISIONS[engine]
        ]


def export_checkpoint(name: str, output: Path, options: ExportOptions) -> Manifest:
    """Writes a bundle of the checkpoint, measured against transformers.

    Args:
        name: a local folder or a hub name.
        output: the bundle's folder; made whole or not at all.
        options: engine, precisions, excluded classes.

    Raises:
        CheckpointError: the checkpoint cannot be exported; all faults at once.
        BundleError: the output exists.
    """
    refuse_unless_free(output, force=options.force)
    checkpoint = load_checkpoint(name, options.decoder_start)
    _refuse_overflow(checkpoint, options)
    vocabulary = _vocabulary(checkpoint, options)
    self_test = make_self_test(checkpoint, vocabulary)
    with new_bundle(output, force=options.force) as folder:
        graphs, aliases = _write_graphs(folder, checkpoint, vocabulary, options)
        _copy_tokenizer(folder, checkpoint)

        def manifest_of(graphs: list[Graph], files: dict[str, File]) -> Manifest:
            return _manifest(checkpoint, vocabulary, self_test, aliases, graphs, files)

        seal(folder, partial(manifest_of, graphs))
        measured = [_measured(folder, graph) for graph in graphs]
        return seal(folder, partial(manifest_of, measured))


def _refuse_overflow(checkpoint: LoadedCheckpoint, options: ExportOptions) -> None:
    precisions = {precision for _, precision in options.graphs}
    unsafe = "float16" in precisions and not checkpoint.family.safe_in_float16
    if unsafe and not options.unsafe_float16:
        raise CheckpointError(
            f"{checkpoint.family.name} is known to overflow in float16, which ends at 65,504: use "
            "bfloat16, or --unsafe-float16 if this checkpoint was trained in it"
        )


def _vocabulary(checkpoint: LoadedCheckpoint, options: ExportOptions) -> Vocabulary:
    model = checkpoint.model
    classes = checkpoint.family.output_layer(model).weight.shape[0]
    for first, last in options.excluded_classes:
        if not first <= last < classes:
            raise CheckpointError(
                f"classes {first}-{last} cannot be excluded: there are {classes}, from 0"
            )
    vocabulary = Vocabulary(
        source=embeddings_of(model.get_encoder()).num_embeddings,
        target=embeddings_of(model.get_decoder()).num_embeddings,
        classes=classes,
        excluded_classes=list(options.excluded_classes),
    )
    if checkpoint.special_ids.decoder_start >= vocabulary.target:
        raise CheckpointError(
            f"the decoder cannot start with {checkpoint.special_ids.decoder_start}: there are "
            f"{vocabulary.target} ids, from 0"
        )
    if vocabulary.num_classes < 1:
        raise CheckpointError("every class is excluded, and nothing is left to predict")
    return vocabulary


def _write_graphs(
    folder: Path, checkpoint: LoadedCheckpoint, vocabulary: Vocabulary, options: ExportOptions
) -> tuple[list[Graph], dict[str, str]]:
    """Writes the graphs and their weights; returns the aliases of those that Torch graphs share."""
    excluded = [int(index) for index in np.flatnonzero(vocabulary.excluded)]
    projection = projection_of(checkpoint.model, excluded)
    body = Body(checkpoint.model)
    originals = body.state_dict()
    state: dict[str, Tensor] = {
        "output.weight": projection.weight,
        "output.bias": projection.bias,
        "output.mean_weight": projection.mean_weight,
        "output.mean_bias": projection.mean_bias,
    }
    graphs = []
    for engine, precision in options.graphs:
        graph = _new_graph(checkpoint, engine, precision)
        place = folder / graph.folder
        place.mkdir(parents=True)
        # int8 graphs are made of float32 ones.
        dtype = getattr(torch, precision) if precision != "int8" else torch.float32
        with lowered(body, dtype, widen=checkpoint.family.widens):
            if engine == "onnx":
                written = write_onnx(place, body, projection, precision, graph.source_multiple)
                graph = graph.model_copy(update=asdict(written))
            else:
                captured = capture(body, graph.source_multiple)
                (folder / graph.path).write_bytes(captured.archive)
                # Weights of every precision are cast from the checkpoint's own when they are
                # loaded.
                state |= {key: originals.get(key, made) for key, made in captured.state.items()}
        graphs.append(graph)
    if "torch" not in options.engines:
        return graphs, {}
    stored, aliases = distinct(state)
    save_file(stored, folder / WEIGHTS_NAME)
    # safetensors makes it private; whoever may read the bundle may read all of it.
    (folder / WEIGHTS_NAME).chmod(0o644)
    return graphs, aliases


def _new_graph(checkpoint: LoadedCheckpoint, engine: EngineName, precision: Precision) -> Graph:
    """One whose errors were not measured yet."""
    return Graph(
        engine=engine,
        precision=precision,
        layout="padded",
        source_multiple=checkpoint.family.source_multiple(checkpoint.model.config),
        folder=f"graphs/{engine}-{precision}",
        exported_with=f"torch {torch.__version__}",
        max_error=0.0,
        mean_error=0.0,
        tolerance=1.0,
        mean_tolerance=1.0,
    )


def _copy_tokenizer(folder: Path, checkpoint: LoadedCheckpoint) -> None:
    if checkpoint.tokenizer_files:
        (folder / TOKENIZER_FOLDER).mkdir()
        for path in checkpoint.tokenizer_files:
            shutil.copyfile(path, folder / TOKENIZER_FOLDER / path.name)


def _manifest(
    checkpoint: LoadedCheckpoint,
    vocabulary: Vocabulary,
    self_test: SelfTest,
    aliases: dict[str, str],
    graphs: list[Graph],
    files: dict[str, File],
) -> Manifest:
    max_source_tokens, max_target_tokens = checkpoint.max_positions
    return Manifest(
        schema_version=SCHEMA_VERSION,
        seqloss_version=__version__,
        family=checkpoint.model_type,
        checkpoint=Checkpoint(name=checkpoint.name, digest=checkpoint.digest),
        vocabulary=vocabulary,
        special_ids=checkpoint.special_ids,
        languages=checkpoint.languages,
        max_source_tokens=max_source_tokens,
        max_target_tokens=max_target_tokens,
        softcap=softcap_of(checkpoint.model),
        weight_aliases=aliases,
        graphs=graphs,
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
            f"the exported graph in {graph.precision} is off by {largest:.3g} nats per token from "
            f"transformers, and {bounds.refused:g} is allowed: this family computes something that "
            "the graph does not"
        )
    return graph.model_copy(
        update={
            "max_error": largest,
            "mean_error": mean,
            "tolerance": min(1.0, max(bounds.least_tolerance, _TOLERANCE_FACTOR * largest)),
            "mean_tolerance": min(1.0, max(bounds.least_tolerance / 2, _TOLERANCE_FACTOR * mean)),
        }
    )
