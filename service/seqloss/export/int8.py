"""Matrix products of an ONNX graph in 8 bits: an approximation, and the fastest there is on a CPU.

Weights have a scale per output.  Inputs have a scale and a middle per row, so per token: what a
token is rounded to does not depend on the tokens beside it, and integer sums are exact, so that
batch-mates change nothing.  The runtime's own dynamic quantisation has one scale for all tokens.

With `x = m + s a` for a row x of middle m and half-width s, rounded to `a ~ q / 127`, and
`W ~ Wq t` per column, the product is

    x W ~ s (q Wq) t / 127 + m (1 W)

The second term is a number per row times a vector that is made here, and saves the bit that
activations which are hardly ever negative would lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from seqloss.export.int8_copies import unshare

_CONTRIB = "com.microsoft"
_LEVELS = 127
# The runtime multiplies unsigned by signed bytes.
_ZERO = 128
# Half-widths of rows of one value are no divisors.
_LEAST = 1e-30
# Narrower products cost little.
_MIN_COLUMNS = 8
_NORMALISATIONS = ("LayerNormalization", "RMSNormalization")


def quantised(model: onnx_ir.Model) -> None:
    """Replaces, in place, every product with a constant float32 matrix."""
    model.opset_imports[_CONTRIB] = 1
    graph = model.graph
    rows = _Rows(graph)
    for node in list(graph):
        if node.op_type != "MatMul" or node.domain:
            continue
        inputs, weight = node.inputs
        if inputs is None or weight is None or not _is_matrix(weight):
            continue
        product = rows.product(inputs, weight, node)
        node.outputs[0].replace_all_uses_with(product)
        graph.remove(node, safe=True)
        if not weight.uses() and weight.name:
            del graph.initializers[weight.name]
    unshare(model)


def _is_matrix(weight: onnx_ir.Value) -> bool:
    tensor = weight.const_value
    return (
        tensor is not None
        and tensor.dtype == onnx_ir.DataType.FLOAT
        and tensor.numpy().ndim == 2
        and tensor.numpy().shape[1] >= _MIN_COLUMNS
    )


def _needs_middle(inputs: onnx_ir.Value, weight: onnx_ir.Value) -> bool:
    """Whether inputs may lie to one side of zero, and outputs are few enough to correct.

    It takes two more passes over outputs, which is cheap where they are no wider than the inputs:
    so it is behind activations and attention, and a head has outputs of another order of magnitude.
    """
    assert weight.const_value is not None  # noqa: S101 - it was asked for
    num_inputs, num_outputs = weight.const_value.numpy().shape
    producer = inputs.producer()
    is_normalised = producer is not None and producer.op_type in _NORMALISATIONS
    return num_outputs <= num_inputs and not is_normalised


class _Rows:
    """Rounds each input and each weight once, however many products share it."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._rounded: dict[tuple[onnx_ir.Value, bool], tuple[onnx_ir.Value, ...]] = {}
        self._weights: dict[tuple[onnx_ir.Value, bool], tuple[onnx_ir.Value, ...]] = {}
        self._scale = self._constant("int8.scale", np.array(1 / _LEVELS, np.float32))
        self._zero = self._constant("int8.zero", np.array(_ZERO, np.uint8))
        self._least = self._constant("int8.least", np.array(_LEAST, np.float32))
        self._half = self._constant("int8.half", np.array(0.5, np.float32))
        self._last = self._constant("int8.last", np.array([-1], np.int64))

    def product(
        self, inputs: onnx_ir.Value, weight: onnx_ir.Value, node: onnx_ir.Node
    ) -> onnx_ir.Value:
        """What stands in for the node's output."""
        has_middle = _needs_middle(inputs, weight)
        if (inputs, has_middle) not in self._rounded:
            self._rounded[inputs, has_middle] = self._round(inputs, has_middle=has_middle)
        rounded, width, *middle = self._rounded[inputs, has_middle]
        if (weight, has_middle) not in self._weights:
            self._weights[weight, has_middle] = self._round_weight(weight, has_middle=has_middle)
        integers, steps, *sums = self._weights[weight, has_middle]
        new = _Nodes()
        scaled = new.add(
            "MatMulIntegerToFloat",
            [rounded, integers, self._scale, steps, self._zero],
            domain=_CONTRIB,
        )
        product = new.add("Mul", [scaled, width])
        if has_middle:
            product = new.add("Add", [product, new.add("Mul", [*middle, *sums])])
        product.shape, product.dtype = node.outputs[0].shape, onnx_ir.DataType.FLOAT
        self._graph.insert_before(node, new.nodes)
        return product

    def _round_weight(
        self, weight: onnx_ir.Value, *, has_middle: bool
    ) -> tuple[onnx_ir.Value, ...]:
        """Bytes and steps of each column, and its sum where inputs have a middle.

        Shapes: (K, N), (N,) and (N,).
        """
        assert weight.const_value is not None  # noqa: S101 - it was asked for
        whole: NDArray[Any] = weight.const_value.numpy()
        steps = np.abs(whole).max(axis=0) / _LEVELS
        steps[steps == 0] = 1.0
        integers = np.rint(whole / steps).astype(np.int8)
        constants = [("", integers), (".steps", steps.astype(np.float32))]
        if has_middle:
            sums = integers.sum(axis=0, dtype=np.float64) * steps
            constants.append((".sums", sums.astype(np.float32)))
        name = f"{weight.name}.int8" + (".middle" if has_middle else "")
        return tuple(self._constant(f"{name}{suffix}", array) for suffix, array in constants)

    def _round(self, inputs: onnx_ir.Value, *, has_middle: bool) -> tuple[onnx_ir.Value, ...]:
        """Bytes and half-width of each row, and its middle where that is not 0.

        Shapes: (..., K), (..., 1) and (..., 1).
        """
        new = _Nodes()
        highest = new.add("ReduceMax", [inputs, self._last], keepdims=1)
        lowest = new.add("ReduceMin", [inputs, self._last], keepdims=1)
        middle: list[onnx_ir.Value] = []
        if has_middle:
            middle = [new.add("Mul", [new.add("Add", [highest, lowest]), self._half])]
            width = new.add("Mul", [new.add("Sub", [highest, lowest]), self._half])
            width = new.add("Max", [width, self._least])
            relative = new.add("Div", [new.add("Sub", [inputs, *middle]), width])
        else:
            width = new.add("Max", [highest, new.add("Neg", [lowest]), self._least])
            relative = new.add("Div", [inputs, width])
        rounded = new.add("QuantizeLinear", [relative, self._scale, self._zero])
        producer = inputs.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], new.nodes)
        else:
            self._graph.insert_after(producer, new.nodes)
        return rounded, width, *middle

    def _constant(self, name: str, array: NDArray[Any]) -> onnx_ir.Value:
        tensor = onnx_ir.Tensor(array, name=name)
        value = onnx_ir.Value(
            name=name,
            shape=tensor.shape,
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value


class _Nodes:
    """New nodes, in order."""

    def __init__(self) -> None:
        self.nodes: list[onnx_ir.Node] = []

    def add(
        self, operator: str, inputs: Sequence[onnx_ir.Value], *, domain: str = "", **attributes: int
    ) -> onnx_ir.Value:
        """Its output."""
        node = onnx_ir.node(operator, inputs, attributes=attributes, domain=domain)
        self.nodes.append(node)
        return node.outputs[0]
