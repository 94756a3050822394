"""Exports a checkpoint: loads, captures, measures, and only then writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from safetensors.torch import save_file
from torch import Tensor

from seqloss.bundle.manifest import (
    WEIGHTS_NAME,
    Checkpoint,
    EngineName,
    Graph,
    Manifest,
    Precision,
)
from seqloss.bundle.writer import refuse_unless_free
from seqloss.errors import CheckpointError
from seqloss.export.bundling import Graphs, Origin, vocabulary_of, write_bundle
from seqloss.export.graph import (
    Body,
    capture,
    capture_packed,
    distinct,
    embeddings_of,
    projection_of,
    softcap_of,
)
from seqloss.export.huggingface import LoadedCheckpoint, load_checkpoint
from seqloss.export.onnx_graph import loss_graph, write_onnx
from seqloss.export.precision import lowered
from seqloss.export.reference import Reference, make_self_test
from seqloss.model.families import NativeModel, native_model
from seqloss.model.transformer import PackedTransformer

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
        generic: whether Torch graphs are transformers' own model also where there is a native one.
        force: whether a bundle at the output is replaced.
    """

    engines: tuple[EngineName, ...] = ("torch",)
    precisions: tuple[Precision, ...] | None = ("float32",)
    excluded_classes: tuple[tuple[int, int], ...] = ()
    decoder_start: int | None = None
    unsafe_float16: bool = False
    generic: bool = False
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


# Tensors of inference mode, which the caller may be in, cannot be traced.
@torch.inference_mode(False)
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
    model, special_ids = checkpoint.model, checkpoint.special_ids
    vocabulary = vocabulary_of(
        source=embeddings_of(model.get_encoder()).num_embeddings,
        target=embeddings_of(model.get_decoder()).num_embeddings,
        classes=checkpoint.family.output_layer(model).weight.shape[0],
        excluded=options.excluded_classes,
        decoder_start=special_ids.decoder_start,
    )
    excluded = [int(index) for index in np.flatnonzero(vocabulary.excluded)]
    origin = Origin(
        family=checkpoint.model_type,
        checkpoint=Checkpoint(name=checkpoint.name, digest=checkpoint.digest),
        vocabulary=vocabulary,
        special_ids=special_ids,
        languages=checkpoint.languages,
        max_positions=checkpoint.max_positions,
        softcap=softcap_of(model),
        text=checkpoint.text,
    )
    return write_bundle(
        output,
        origin,
        make_self_test(
            Reference(model, special_ids.decoder_start, excluded), vocabulary, origin.max_positions
        ),
        lambda folder: _write_graphs(folder, checkpoint, excluded, options),
        force=options.force,
    )


def _refuse_overflow(checkpoint: LoadedCheckpoint, options: ExportOptions) -> None:
    precisions = {precision for _, precision in options.graphs}
    unsafe = "float16" in precisions and not checkpoint.family.safe_in_float16
    if unsafe and not options.unsafe_float16:
        raise CheckpointError(
            f"{checkpoint.family.name} is known to overflow in float16, which ends at 65,504: use "
            "bfloat16, or --unsafe-float16 if this checkpoint was trained in it"
        )


def _write_graphs(
    folder: Path, checkpoint: LoadedCheckpoint, excluded: list[int], options: ExportOptions
) -> Graphs:
    """Writes the graphs and their weights."""
    projection = projection_of(checkpoint.model, excluded)
    native = None if options.generic else native_model(checkpoint.model)
    body = Body(checkpoint.model)
    originals = body.state_dict() if native is None else _packed(native, torch.float32).state_dict()
    state: dict[str, Tensor] = {
        "output.weight": projection.weight,
        "output.bias": projection.bias,
        "output.mean_weight": projection.mean_weight,
        "output.mean_bias": projection.mean_bias,
    }
    graphs = []
    onnx_models: dict[torch.dtype, onnx_ir.Model] = {}
    for engine, precision in options.graphs:
        is_packed = engine == "torch" and native is not None
        graph = _new_graph(checkpoint, engine, precision, is_packed=is_packed)
        place = folder / graph.folder
        place.mkdir(parents=True)
        # int8 graphs are made of float32 ones.
        dtype = getattr(torch, precision) if precision != "int8" else torch.float32
        as_computed = lowered(body, dtype, widen=checkpoint.family.widens)
        if engine == "onnx":
            if dtype not in onnx_models:
                onnx_models.clear()  # no more than one is kept: it holds weights
                with as_computed:
                    onnx_models[dtype] = loss_graph(body, projection, dtype, graph.source_multiple)
            written = write_onnx(place, onnx_models[dtype], precision)
            graphs.append(graph.model_copy(update=asdict(written)))
            continue
        if native is None:
            with as_computed:
                captured = capture(body, graph.source_multiple)
        else:
            captured = capture_packed(_packed(native, dtype))
        (folder / graph.path).write_bytes(captured.archive)
        # Weights of every precision are cast from the checkpoint's own when they are loaded.
        state |= {key: originals.get(key, made) for key, made in captured.state.items()}
        graphs.append(graph)
    if "torch" not in options.engines:
        return Graphs(graphs, {})
    stored, aliases = distinct(state)
    save_file(stored, folder / WEIGHTS_NAME)
    # safetensors makes it private; whoever may read the bundle may read all of it.
    (folder / WEIGHTS_NAME).chmod(0o644)
    return Graphs(graphs, aliases)


def _packed(native: NativeModel, dtype: torch.dtype) -> PackedTransformer:
    return PackedTransformer(native.architecture, native.weights, dtype)


def _new_graph(
    checkpoint: LoadedCheckpoint, engine: EngineName, precision: Precision, *, is_packed: bool
) -> Graph:
    """One whose errors were not measured yet."""
    return Graph(
        engine=engine,
        precision=precision,
        layout="packed" if is_packed else "padded",
        source_multiple=checkpoint.family.source_multiple(checkpoint.model.config),
        folder=f"graphs/{engine}-{precision}",
        exported_with=f"torch {torch.__version__}",
        max_error=0.0,
        mean_error=0.0,
        tolerance=1.0,
        mean_tolerance=1.0,
    )
