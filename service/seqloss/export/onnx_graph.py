"""The model with the loss head on top, as an ONNX file that ONNX Runtime alone can run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from seqloss.bundle.manifest import ONNX_GRAPH, ONNX_WEIGHTS, Precision
from seqloss.bundle.onnx_model import check_onnx
from seqloss.engines.onnx_signature import LOSS_INPUTS, LOSS_OUTPUTS
from seqloss.errors import BundleError, CheckpointError
from seqloss.export.graph import Body, traced
from seqloss.export.int8 import quantised
from seqloss.loss.graph_head import GraphHead
from seqloss.loss.head import OutputProjection

# The first one whose attention is an operator, and no product of two dozen others.
_OPSET = 23
# Smaller constants stay inside the graph.
_MIN_EXTERNAL_BYTES = 1024


class LossGraph(nn.Module):
    """From padded inputs to token terms."""

    def __init__(self, body: Body, head: GraphHead) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(  # noqa: PLR0913, PLR0917 - the inputs of the graph
        self,
        source_ids: Tensor,
        source_mask: Tensor,
        source_row: Tensor,
        decoder_input_ids: Tensor,
        token_index: Tensor,
        labels: Tensor,
        full_index: Tensor,
    ) -> tuple[Tensor, ...]:
        """For the inputs see `seqloss.engines.layout.PaddedInputs` and `GraphHead.forward`."""
        hidden = self.body(source_ids, source_mask, source_row, decoder_input_ids, token_index)
        terms: tuple[Tensor, ...] = self.head(hidden, labels, full_index)
        return terms


@dataclass(frozen=True, slots=True)
class Written:
    """What is to be said of a file: see `seqloss.bundle.manifest.Graph`."""

    opset: int
    ir_version: int
    exported_with: str


def loss_graph(
    body: Body, projection: OutputProjection, dtype: torch.dtype, source_multiple: int
) -> onnx_ir.Model:
    """Translates the model and the loss head on top of it.

    Args:
        body: in the precision that its weights have.
        projection: the output projection.
        dtype: of the head's products.
        source_multiple: source lengths are multiples of this, and at least two of them.

    Raises:
        CheckpointError: the model's code fixes sizes, or uses what ONNX does not have.
    """
    module = LossGraph(body, GraphHead(projection, dtype))
    return _converted(traced(module, source_multiple, with_head=True))


def write_onnx(folder: Path, model: onnx_ir.Model, precision: Precision) -> Written:
    """Writes a loss graph and its weights.

    Args:
        folder: is there.
        model: what `loss_graph` makes; in float32 for int8, and not changed.
        precision: of the products.

    Raises:
        CheckpointError: it holds what bundles may not.
    """
    if precision == "int8":
        quantised(model := model.clone())
    return saved(folder, model, f"torch {torch.__version__}, onnxscript {onnxscript.__version__}")


def saved(folder: Path, model: onnx_ir.Model, exported_with: str) -> Written:
    """Writes a loss graph and its weights into the folder, which is there.

    Raises:
        CheckpointError: it holds what bundles may not.
    """
    path = folder / ONNX_GRAPH
    onnx_ir.save(model, path, external_data=ONNX_WEIGHTS, size_threshold_bytes=_MIN_EXTERNAL_BYTES)
    onnx.checker.check_model(str(path))
    weights_bytes = (folder / ONNX_WEIGHTS).stat().st_size
    try:
        found = check_onnx(path.read_bytes(), ONNX_WEIGHTS, weights_bytes)
    except BundleError as error:
        raise CheckpointError(
            "the model's graph holds what bundles may not (see seqloss/bundle/onnx_model.py)",
            error.faults,
        ) from error
    return Written(found.opsets[""], found.ir_version, exported_with)


def _converted(program: torch.export.ExportedProgram) -> onnx_ir.Model:
    _keep_strides(program)
    with _quiet():
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                input_names=LOSS_INPUTS,
                output_names=LOSS_OUTPUTS,
                optimize=False,  # below, and without fusions: T5Gemma's came out wrong
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise CheckpointError(f"the model cannot be written as ONNX: {error}") from error
        if converted is None:  # as its type has it
            raise CheckpointError("the model cannot be written as ONNX")
        onnxscript.optimizer.optimize_ir(converted.model)
    for node in converted.model.graph:
        node.metadata_props.clear()  # a megabyte of lines of code
    return converted.model


def _keep_strides(program: torch.export.ExportedProgram) -> None:
    """Copies what is transposed before it is viewed; ONNX has no strides, and nothing is copied.

    The exporter takes attention apart, and its parts lay results out in another way than the whole
    did: a view that was possible then is not any more.
    """
    aten = torch.ops.aten
    shaping = (aten.view.default, aten.reshape.default)
    for node in program.graph.nodes:
        if node.target not in shaping or node.args[0].target != aten.transpose.int:
            continue
        with program.graph.inserting_before(node):
            copied = program.graph.call_function(
                aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format}
            )
            copied.meta.update(node.args[0].meta)
        node.replace_input_with(node.args[0], copied)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of every step, and of what is missing for models of other kinds."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
