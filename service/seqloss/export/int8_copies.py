"""Int8 constants for one user each, as ONNX Runtime wants them on CPUs without VNNI."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import onnx_ir


def unshare(model: onnx_ir.Model) -> bool:
    """Copies, in place, int8 constants that several nodes use, so that each has its own.

    ONNX Runtime 1.32 replaces weights and zero points by unsigned ones where a CPU has no VNNI,
    and fails at those that it meets twice; `seqloss.engines.onnx_options` asks for that. A
    dequantised weight that several products use is dequantised for each, since ONNX Runtime would
    do as much, with one constant.

    Returns:
        Whether there were any.
    """
    weights = [node for node in model.graph if _is_weight(node)]
    for node in weights:
        _copy_for_each_use(node)
    constants = [
        value
        for value in model.graph.initializers.values()
        if value.dtype == onnx_ir.DataType.INT8 and len(value.uses()) > 1
    ]
    for value in constants:
        names = _free_names(model.graph, str(value.name))
        for node, index in _further_uses(value):
            copy = onnx_ir.Value(
                name=next(names),
                shape=value.shape,
                type=value.type,
                const_value=value.const_value,
            )
            model.graph.register_initializer(copy)
            node.replace_input_with(index, copy)
    return bool(constants)


def _is_weight(node: onnx_ir.Node) -> bool:
    integers = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    return (
        integers is not None
        and integers.is_initializer()
        and integers.dtype == onnx_ir.DataType.INT8
    )


def _copy_for_each_use(node: onnx_ir.Node) -> None:
    output = node.outputs[0]
    for user, index in _further_uses(output):
        copy = onnx_ir.node(
            node.op_type, node.inputs, node.attributes, domain=node.domain, version=node.version
        )
        copy.outputs[0].shape, copy.outputs[0].type = output.shape, output.type
        node.append(copy)
        user.replace_input_with(index, copy.outputs[0])


def _free_names(graph: onnx_ir.Graph, name: str) -> Iterator[str]:
    numbered = (f"{name}.{number}" for number in count(2))
    return (one for one in numbered if one not in graph.initializers)


def _further_uses(value: onnx_ir.Value) -> Iterator[tuple[onnx_ir.Node, int]]:
    """All but the first."""
    for use in list(value.uses())[1:]:
        yield use.node, use.idx
