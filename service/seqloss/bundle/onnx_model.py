"""What an ONNX file says of itself, read before any runtime is let near it.

A model is data, but a runtime does what it says: it opens the files that tensors name, and runs
whatever operators there are.  So the file is walked here first, by the wire format of protocol
buffers alone, and refused unless it has but operators that losses need and one file of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from seqloss.errors import BundleError

# Of a file's faults so many are named.
_MOST_FAULTS = 10
# Graphs within graphs; exported ones have none at all.
_MAX_DEPTH = 8
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
# What exported bodies, heads and the runtime's own fusions consist of.  Left out on purpose: what
# draws random numbers, what loops, and what reads files or calls back into a program.
_OPERATORS = frozenset(
    """
    Abs Add And Attention Cast CastLike Ceil Clip Concat Constant ConstantOfShape Cos CumSum
    DequantizeLinear Div DynamicQuantizeLinear DynamicQuantizeMatMul Einsum Equal Erf Exp Expand
    Flatten Floor FusedMatMul Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual
    Identity IsNaN LayerNormalization Less LessOrEqual Log LogSoftmax MatMul MatMulInteger
    MatMulIntegerToFloat Max Min Mod Mul MultiHeadAttention Neg Not OneHot Or Pad Pow
    QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Relu
    Reshape RMSNormalization ScatterElements ScatterND Shape Sigmoid Sign
    SimplifiedLayerNormalization Sin Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Swish Tanh
    Tile Transpose Trilu Unsqueeze Where Xor
    """.split()
)


@dataclass(slots=True)
class OnnxModel:
    """What a file says of itself.

    Attributes:
        ir_version: of the format.
        opsets: version by domain; the standard operators' domain is the empty one.
        operators: domain and name of every node's operator, in subgraphs too.
        externals: file, offset and length of every tensor that lies outside.
        faults: what such a file may not have.
    """

    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)
    operators: set[tuple[str, str]] = field(default_factory=set)
    externals: list[tuple[str, int, int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_onnx(content: bytes) -> OnnxModel:
    """Reads a serialised ModelProto.

    Raises:
        BundleError: it is none.
    """
    model = OnnxModel()
    try:
        _read_model(memoryview(content), model)
    except (IndexError, ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"not an ONNX model: {error}") from error
    return model


def check_onnx(content: bytes, weights_name: str, weights_bytes: int) -> OnnxModel:
    """Refuses what could do more than compute.

    Args:
        content: a serialised ModelProto.
        weights_name: the only file that its tensors may name.
        weights_bytes: how long that is.

    Raises:
        BundleError: with all faults, or the first ones of many.
    """
    model = read_onnx(content)
    faults = model.faults
    for domain, name in sorted(model.operators):
        if domain not in _DOMAINS or name not in _OPERATORS:
            faults.append(f"the operator {name!r} of domain {domain!r} is not one that losses need")
    for location, offset, length in model.externals:
        if location != weights_name:
            faults.append(f"a tensor lies in {location!r}, and may lie in {weights_name!r} only")
        elif min(offset, length) < 0 or offset + length > weights_bytes:
            faults.append(f"a tensor lies behind the end of {weights_name!r}")
    if faults:
        raise BundleError("an ONNX model holds what bundles may not", faults[:_MOST_FAULTS])
    return model


# ---------------------------------------------------------------- the wire format

# https://protobuf.dev/programming-guides/encoding/
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_Value = int | memoryview


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has too many digits")


def _fields(data: memoryview) -> Iterator[tuple[int, _Value]]:
    """Number and value of every field of a message, in order; a field may come several times."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown kind {wire}")
        if at + length > len(data):
            raise ValueError("it ends too early")
        yield number, data[at : at + length]
        at += length


def _text(value: _Value) -> str:
    if isinstance(value, int):
        raise ValueError("a number stands where a text belongs")
    return bytes(value).decode()


def _message(value: _Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message belongs")
    return value


def _number(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a message stands where a number belongs")
    return value


# ---------------------------------------------------------------- ONNX
# Field numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto


def _read_model(data: memoryview, model: OnnxModel) -> None:
    has_graph = False
    for number, value in _fields(data):
        if number == 1:
            model.ir_version = _number(value)
        elif number == 7:
            has_graph = True
            _read_graph(_message(value), model, 1)
        elif number == 8:
            opset = dict(_fields(_message(value)))
            model.opsets[_text(opset.get(1, memoryview(b"")))] = _number(opset.get(2, 0))
        elif number in (20, 25):
            model.faults.append("a model may not bring functions or training of its own")
    if not has_graph:
        raise ValueError("it has no graph")


def _read_graph(data: memoryview, model: OnnxModel, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs within graphs within graphs")
    for number, value in _fields(data):
        if number == 1:
            _read_node(_message(value), model, depth)
        elif number == 5:
            _read_tensor(_message(value), model)
        elif number == 15:
            _read_sparse(_message(value), model)


def _read_node(data: memoryview, model: OnnxModel, depth: int) -> None:
    domain = name = ""
    for number, value in _fields(data):
        if number == 4:
            name = _text(value)
        elif number == 7:
            domain = _text(value)
        elif number == 5:
            _read_attribute(_message(value), model, depth)
    model.operators.add((domain, name))


def _read_attribute(data: memoryview, model: OnnxModel, depth: int) -> None:
    for number, value in _fields(data):
        if number in (5, 10):
            _read_tensor(_message(value), model)
        elif number in (6, 11):
            _read_graph(_message(value), model, depth + 1)
        elif number in (22, 23):
            _read_sparse(_message(value), model)


def _read_sparse(data: memoryview, model: OnnxModel) -> None:
    for number, value in _fields(data):
        if number in (1, 2):
            _read_tensor(_message(value), model)


def _read_tensor(data: memoryview, model: OnnxModel) -> None:
    is_external = False
    places: dict[str, list[str]] = {}
    for number, value in _fields(data):
        if number == 13:
            entry = dict(_fields(_message(value)))
            key = _text(entry.get(1, memoryview(b"")))
            places.setdefault(key, []).append(_text(entry.get(2, memoryview(b""))))
        elif number == 14:
            is_external = is_external or _number(value) == 1
    if not (is_external or places):
        return
    # Whichever of several entries a runtime takes, each has to be harmless.
    for location in places.get("location", [""]):
        for offset in places.get("offset", ["0"]):
            for length in places.get("length", ["0"]):
                model.externals.append((location, int(offset), int(length)))
