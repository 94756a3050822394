"""Makes a loss graph of an encoder and a decoder that others exported as ONNX.

Logits come out of such a decoder for every token of a batch, and the head here starts from them.
Four matrices as large as these exist at once, while ranks and entropies are computed (measured on a
CPU): `seqloss.runtime.token_budget` reckons with them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx_ir import DataType, Value
from onnx_ir.passes import common as passes
from onnx_ir.tape import Tape

from seqloss.bundle.manifest import Precision
from seqloss.engines.onnx_signature import LOSS_INPUTS, LOSS_OUTPUTS
from seqloss.errors import CheckpointError
from seqloss.export.int8_copies import unshare
from seqloss.export.onnx_files import ENCODED, ENCODED_MASK, HIDDEN, IDS, LOGITS, MASK, OnnxFiles
from seqloss.loss.head import ABSENT

# The first one in which all operators of the head mean what they mean today.
_LEAST_OPSET = 13
# As `engines.layout.PaddedInputs` has them.
_SHAPES = ("US", "US", "B", "BT", "K", "K", "E")
_PRECISIONS: dict[DataType, Precision] = {
    DataType.FLOAT: "float32",
    DataType.FLOAT16: "float16",
    DataType.BFLOAT16: "bfloat16",
    DataType.INT8: "int8",
    DataType.UINT8: "int8",
}
# From the most exact to the least, and the one that names a mixture.
_BY_LOSS: tuple[Precision, ...] = ("float32", "float16", "bfloat16", "int8")
# Their one scale is that of a whole batch.
_BATCH_SCALED = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul")


def merged(files: OnnxFiles, excluded: np.ndarray[Any, np.dtype[np.bool_]]) -> onnx_ir.Model:
    """The loss graph: inputs and outputs are those of `seqloss.engines.onnx_signature`.

    Args:
        files: encoder and decoder.
        excluded: which classes are kept out of the softmax. Shape: (V,).

    Raises:
        CheckpointError: a part cannot be brought to the other's opset, or 13; or an operator mixes
            the pairs of a batch.
    """
    # It has something to say of every tensor that it drops.
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)
    encoder, decoder = _with_one_opset(files.encoder, files.decoder)
    inputs = [_input(*one) for one in zip(LOSS_INPUTS, _SHAPES, strict=True)]
    given = dict(zip(LOSS_INPUTS, inputs, strict=True))
    graph = onnx_ir.Graph(
        inputs,
        [],
        nodes=[],
        opset_imports=decoder.opset_imports | encoder.opset_imports,
        name="loss",
    )
    encoded = _moved(
        graph,
        encoder.graph,
        "encoder",
        {IDS: given["source_ids"], MASK: given["source_mask"]},
    )
    tape, row = Tape(graph), given["source_row"]
    decoded = _moved(
        graph,
        decoder.graph,
        "decoder",
        {
            IDS: given["decoder_input_ids"],
            ENCODED_MASK: _rows(tape, given["source_mask"], row),
            ENCODED: _rows(tape, encoded[HIDDEN], row),
        },
    )
    terms = _Head(tape, excluded).terms(
        decoded[LOGITS], given["token_index"], given["labels"], given["full_index"]
    )
    graph.outputs.extend(terms)
    model = onnx_ir.Model(graph, ir_version=max(encoder.ir_version, decoder.ir_version))
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.DeduplicateHashedInitializersPass(),  # embeddings that both parts have
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        tidy(model)
    unshare(model)
    _refuse_mixing(model)
    return model


def precision_of(model: onnx_ir.Model) -> Precision:
    """By what its matrices are stored in.

    Raises:
        CheckpointError: in something that no bundle has.
    """
    kinds = {
        value.dtype
        for value in model.graph.initializers.values()
        if value.shape is not None and len(value.shape) >= 2
        if value.dtype not in (DataType.INT64, DataType.INT32, DataType.BOOL)
    }
    unknown = sorted(str(kind) for kind in kinds if kind not in _PRECISIONS)
    if unknown:
        raise CheckpointError(
            f"its weights are of {', '.join(unknown)}, and bundles have {', '.join(_BY_LOSS)}"
        )
    return max((_PRECISIONS[kind] for kind in kinds if kind), key=_BY_LOSS.index)


def _input(name: str, dimensions: str) -> Value:
    kind = onnx_ir.TensorType(DataType.INT64)
    return Value(name=name, shape=onnx_ir.Shape(list(dimensions)), type=kind)


def _with_one_opset(*paths: Path) -> list[onnx_ir.Model]:
    models = [onnx_ir.load(path) for path in paths]
    opset = max(_LEAST_OPSET, *map(_opset, models))
    for number, path in enumerate(paths):
        if _opset(models[number]) != opset:
            models[number] = _converted(path, opset)
        passes.InlinePass()(models[number])
        passes.RemoveInitializersFromInputsPass()(models[number])
    return models


def _opset(model: onnx_ir.Model) -> int:
    return model.opset_imports.get("", 1)


def _converted(path: Path, opset: int) -> onnx_ir.Model:
    try:
        return onnx_ir.from_proto(onnx.version_converter.convert_version(onnx.load(path), opset))
    # Its errors are those of C++ behind it, and have no common class but this one.
    except Exception as error:
        raise CheckpointError(
            f"{path.name} cannot be brought to opset {opset}: {error}; export it again with that "
            "one or a later one"
        ) from error


def _moved(
    graph: onnx_ir.Graph, part: onnx_ir.Graph, prefix: str, given: dict[str, Value]
) -> dict[str, Value]:
    """Moves a part into the graph; returns its outputs by the names they had.

    Args:
        graph: takes it in.
        part: is empty afterwards.
        prefix: of all its names.
        given: what its inputs are, by their names.
    """
    for value in part.inputs:
        value.replace_all_uses_with(_cast(Tape(graph), given[str(value.name)], value.dtype))
    outputs = {str(value.name): value for value in part.outputs}
    part.outputs.clear()
    for value in list(part.initializers.values()):
        del part.initializers[str(value.name)]
        value.name = f"{prefix}.{value.name}"
        graph.register_initializer(value)
    for number, node in enumerate(part.all_nodes()):  # in branches, too
        node.name = f"{prefix}.{node.name or number}"
        for value in node.outputs:
            value.name = f"{prefix}.{value.name}" if value.name else value.name
            # Sizes of both parts may be called alike, and what equals what is planned by names.
            value.shape = None
    nodes = list(part)
    part.remove(nodes)
    graph.extend(nodes)
    return outputs


def _rows(tape: Tape, value: Value, index: Value) -> Value:
    gathered = tape.op("Gather", [value, index])
    gathered.type = value.type
    return gathered


def _cast(tape: Tape, value: Value, kind: DataType | None) -> Value:
    if kind is None or value.dtype == kind:
        return value
    return tape.op("Cast", [value], {"to": kind.value})


def _refuse_mixing(model: onnx_ir.Model) -> None:
    found = sorted({node.op_type for node in model.graph.all_nodes()} & set(_BATCH_SCALED))
    if found:
        raise CheckpointError(
            f"it rounds by one scale for all tokens of a batch ({', '.join(found)}), so that a "
            "pair's loss depends on others: export it in float32"
        )


class _Head:
    """Token terms from logits; for the definitions see `seqloss.loss.head.LossHead`.

    The target's logit is subtracted first: `log_softmax` of `z - z_y` has at y
    `-log(1 + the others' sum of exp(z - z_y))`, which is never positive, and the class's own part
    of the entropy is exact.
    """

    def __init__(self, tape: Tape, excluded: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        self._tape = tape
        self._excluded = excluded
        self._num_constants = 0

    def terms(
        self, logits: Value, token_index: Value, labels: Value, full_index: Value
    ) -> list[Value]:
        """Outputs of the graph, for inputs as `seqloss.loss.graph_head.GraphHead` takes them.

        Args:
            logits: Shape: (B, T, V).
            token_index: Shape: (K,).
            labels: Shape: (K,).
            full_index: Shape: (E,).
        """
        op, kept = self._tape.op, ~self._excluded
        rows = self._constant(np.array([-1, len(kept)]))
        last = self._constant(np.array([-1]))
        counted = op("Gather", [op("Reshape", [logits, rows]), token_index])  # (K, V)
        counted.type = logits.type
        counted = _cast(self._tape, counted, DataType.FLOAT)
        own = op("Unsqueeze", [labels, last])  # (K, 1)
        shifted = op("Sub", [counted, op("GatherElements", [counted, own], {"axis": 1})])
        share = self._constant((kept / kept.sum()).astype(np.float32)[:, None])
        mean = op("Squeeze", [op("MatMul", [shifted, share]), last])  # (K,)
        if self._excluded.any():
            absent = self._constant(np.array(ABSENT, np.float32))
            shifted = op("Where", [self._constant(kept), shifted, absent])
        logprobs = op("LogSoftmax", [shifted], {"axis": -1})
        target = op("Squeeze", [op("GatherElements", [logprobs, own], {"axis": 1}), last])
        ahead = op(
            "Greater",
            [op("Gather", [shifted, full_index]), self._constant(np.array(0, np.float32))],
        )  # (E, V)
        ahead = op("Cast", [ahead], {"to": DataType.INT32.value})
        rank = op("ReduceSum", [ahead, last], {"keepdims": 0})  # (E,)
        logprobs = op("Gather", [logprobs, full_index])
        weighted = op("Mul", [op("Exp", [logprobs]), logprobs])
        entropy = op("Neg", [op("ReduceSum", [weighted, last], {"keepdims": 0})])
        terms = [target, op("Add", [mean, target]), rank, entropy]
        for name, dimension, value in zip(LOSS_OUTPUTS, "KKEE", terms, strict=True):
            value.name = name
            value.shape = onnx_ir.Shape([dimension])
            value.dtype = DataType.INT32 if name == "rank" else DataType.FLOAT
        return terms

    def _constant(self, array: np.ndarray[Any, Any]) -> Value:
        self._num_constants += 1
        return self._tape.initializer(
            onnx_ir.tensor(array, name=f"head.constant_{self._num_constants}")
        )
