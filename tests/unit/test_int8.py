"""Products in bytes: near those in float32, row by row, whatever shares a weight or an input."""

from __future__ import annotations

import numpy as np
import pytest

onnx_ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from seqloss.export.int8 import quantised  # noqa: E402 - it needs both

WIDTH = 32


def model_of(weight: np.ndarray) -> onnx_ir.Model:
    """`tanh(x W) W + x W`: one weight in two products, and one input in two places."""
    inputs = onnx_ir.Value(
        name="x",
        shape=onnx_ir.Shape(["N", WIDTH]),
        type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
    )
    shared = onnx_ir.Value(name="w", const_value=onnx_ir.tensor(weight, name="w"))
    shared.shape, shared.dtype = onnx_ir.Shape(weight.shape), onnx_ir.DataType.FLOAT
    first = onnx_ir.node("MatMul", [inputs, shared])
    bent = onnx_ir.node("Tanh", first.outputs)
    second = onnx_ir.node("MatMul", [bent.outputs[0], shared])
    third = onnx_ir.node("MatMul", [inputs, shared])
    total = onnx_ir.node("Add", [second.outputs[0], third.outputs[0]])
    total.outputs[0].name = "y"
    total.outputs[0].dtype = onnx_ir.DataType.FLOAT
    graph = onnx_ir.Graph(
        [inputs],
        total.outputs,
        nodes=[first, bent, second, third, total],
        initializers=[shared],
        opset_imports={"": 23},
        name="test",
    )
    return onnx_ir.Model(graph, ir_version=10)


def test_products_are_near_and_rows_do_not_know_each_other() -> None:
    generator = np.random.default_rng(5)
    weight = generator.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    weight[:, 3] = 0
    model = model_of(weight)
    quantised(model)
    operators = [node.op_type for node in model.graph]
    assert operators.count("MatMulIntegerToFloat") == 3
    assert "MatMul" not in operators
    assert "w" not in model.graph.initializers
    # A copy of the bytes for each, and two inputs to round.
    kinds = [value.dtype for value in model.graph.initializers.values()]
    assert kinds.count(onnx_ir.DataType.INT8) == 3
    assert operators.count("QuantizeLinear") == 2

    content = onnx_ir.to_proto(model).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # as the engine has it
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    # Rows of very different sizes, one that is never negative, and one of a single value.
    rows = generator.normal(size=(6, WIDTH)) * np.array([[1e-3], [1], [1e3], [1], [1], [1]])
    rows[3], rows[4], rows[5] = np.abs(rows[3]) + 4, 2.5, 0
    given = rows.astype(np.float32)
    (found,) = session.run(None, {"x": given})
    exact = np.tanh(given @ weight) @ weight + given @ weight
    scale = np.abs(exact).max(axis=1, keepdims=True) + 1e-6
    assert (np.abs(found - exact) / scale).max() < 0.03
    for index in range(len(given)):
        (alone,) = session.run(None, {"x": given[index : index + 1]})
        np.testing.assert_array_equal(alone[0], found[index])
