"""Products in bytes: near those in float32, row by row, whatever shares a weight or an input."""

from __future__ import annotations

import numpy as np
import pytest

onnx_ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from seqloss.engines.onnx_options import session_options  # noqa: E402 - they need both
from seqloss.export.int8 import quantised  # noqa: E402
from seqloss.export.int8_copies import unshare  # noqa: E402

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
    session = onnxruntime.InferenceSession(
        content, session_options(2), providers=["CPUExecutionProvider"]
    )
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


def quantised_by_others(weight: np.ndarray) -> onnx_ir.Model:
    """`r(r(x) W) W`, r rounding to bytes: one weight, dequantised once."""
    scale = 4 / 127
    constants = {
        "bytes": np.clip(np.rint(weight / scale), -128, 127).astype(np.int8),
        "scale": np.array(scale, np.float32),
        "signed": np.array(0, np.int8),
        "unsigned": np.array(128, np.uint8),
    }
    text = f"""<ir_version: 10, opset_import: ["": 21]>
        test (float[N, {WIDTH}] x) => (float[N, {WIDTH}] y) {{
            w = DequantizeLinear(bytes, scale, signed)
            x_bytes = QuantizeLinear(x, scale, unsigned)
            x_again = DequantizeLinear(x_bytes, scale, unsigned)
            h = MatMul(x_again, w)
            h_bytes = QuantizeLinear(h, scale, unsigned)
            h_again = DequantizeLinear(h_bytes, scale, unsigned)
            y = MatMul(h_again, w)
        }}"""
    model = onnx_ir.from_onnx_text(text)
    used = {value.name: value for node in model.graph for value in node.inputs if value}
    for name, array in constants.items():
        value = used[name]
        value.const_value = onnx_ir.tensor(array, name=name)
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        model.graph.register_initializer(value)
    return model


def test_each_use_of_bytes_gets_its_own() -> None:
    generator = np.random.default_rng(6)
    weight = generator.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    given = generator.normal(size=(5, WIDTH)).astype(np.float32)
    model = quantised_by_others(weight)

    def computed(level: onnxruntime.GraphOptimizationLevel) -> np.ndarray:
        options = session_options(2)
        options.graph_optimization_level = level
        content = onnx_ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": given})[0]

    exact = computed(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    assert unshare(model)
    constants = model.graph.initializers.values()
    assert [len(one.uses()) for one in constants if one.dtype == onnx_ir.DataType.INT8] == [1] * 4
    found = computed(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    np.testing.assert_allclose(found, exact, atol=1e-5)
    assert not unshare(model)
