"""What an ONNX file says of itself, read before any runtime is let near it.

A model is data, but a runtime does what it says: it opens the files that tensors name, and runs
whatever operators there are.  So the file is walked here first, by the wire format of protocol
buffers alone, and refused unless it has but operators that losses need and one file of weights.

Two readers of one file may disagree about what is in it, and the runtime's is the lenient one: it
cuts numbers of fields to 32 bits, passes over fields of an unexpected kind, and merges messages
that come twice.  So a file is refused, too, where it is written as no writer of protocol buffers
would, or has fields that are not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from seqloss.errors import BundleError

# Of a file's faults so many are named.
_MOST_FAULTS = 10
# Graphs within graphs; exported ones have none at all.
_MAX_DEPTH = 8
# To walk these takes a second or two; four layers have some 15,000.
_MAX_FIELDS = 1_000_000
# Of operators, domains, files, inputs and outputs.
_MAX_NAME_BYTES = 1024
# What exported graphs consist of, and those of other exporters.  Left out on purpose: what draws
# random numbers, what loops, and what reads files or calls back into a program.
_STANDARD = frozenset(
    """
    Abs Add And Attention Cast CastLike Clip Concat Constant ConstantOfShape Cos CumSum
    DequantizeLinear Div DynamicQuantizeLinear Einsum Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Gelu Gemm Greater GreaterOrEqual Identity If IsInf IsNaN
    LayerNormalization Less LessOrEqual Log LogSoftmax MatMul MatMulInteger Max Min Mod Mul Neg Not
    Or Pad Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape
    ScatterElements ScatterND Shape Sigmoid Sin Slice Softmax Sqrt Squeeze Sub Tanh Tile Transpose
    Trilu Unsqueeze Where
    """.split()
)
_CONTRIB = frozenset(
    """
    BiasGelu DequantizeLinear DynamicQuantizeMatMul FastGelu Gelu MatMulIntegerToFloat
    QuantizeLinear SkipLayerNormalization
    """.split()
)
# By domain; the standard one has two names.
_OPERATORS = {"": _STANDARD, "ai.onnx": _STANDARD, "com.microsoft": _CONTRIB}


@dataclass(slots=True)
class OnnxModel:
    """What a file says of itself.

    Attributes:
        ir_version: of the format.
        opsets: version by domain; the standard operators' domain is the empty one.
        operators: domain and name of every node's operator, in subgraphs too.
        externals: file, offset and length of every tensor that lies outside.
        faults: what such a file may not have.
        num_fields: of all messages that were walked.
    """

    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)
    operators: set[tuple[str, str]] = field(default_factory=set)
    externals: list[tuple[str, int, int]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_fields: int = 0


def read_onnx(content: bytes) -> OnnxModel:
    """Reads a serialised ModelProto.

    Raises:
        BundleError: it is none, is too large, or is written so that readers may disagree about it.
    """
    model = OnnxModel()
    try:
        _read_model(memoryview(content), model)
    except ValueError as error:
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
        if name not in _OPERATORS.get(domain, ()):
            faults.append(f"the operator {name!r} of domain {domain!r} is not one that losses need")
    for location, offset, length in model.externals:
        if location != weights_name:
            faults.append(f"a tensor lies in {location!r}, and may lie in {weights_name!r} only")
        elif offset + length > weights_bytes:
            faults.append(f"a tensor lies behind the end of {weights_name!r}")
    if faults:
        raise BundleError("an ONNX model holds what bundles may not", faults[:_MOST_FAULTS])
    return model


# ---------------------------------------------------------------- the wire format

# https://protobuf.dev/programming-guides/encoding/
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Numbers of a fixed size are of no interest, and must not pass for texts of as many bytes.
_Value = int | memoryview | None


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a message may have.

    Attributes:
        name: for people.
        once: numbers of the fields that may come once.
        often: of those that may come several times.
        refused: names of known fields that it may not have, by number.
    """

    name: str
    once: frozenset[int]
    often: frozenset[int] = frozenset()
    refused: dict[int, str] = field(default_factory=dict)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has too many digits")
    raise ValueError("it ends too early")


def _fields(data: memoryview) -> Iterator[tuple[int, _Value]]:
    """Number and value of every field of a message, in order; a field may come several times."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        # The runtime forgets higher bits: it would know a field that is an unknown one here.
        if key >= 1 << 32:
            raise ValueError("the number of a field has too many digits")
        number, wire = key >> 3, key & 7
        value: _Value = None
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire == _BYTES:
            length, at = _varint(data, at)
            value = data[at : at + length]
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown kind {wire}")
        if at > len(data):
            raise ValueError("it ends too early")
        yield number, value


def _known_fields(data: memoryview, kind: _Kind, model: OnnxModel) -> Iterator[tuple[int, _Value]]:
    """The fields of a message; notes those that it may not have."""
    seen = set()
    for number, value in _fields(data):
        model.num_fields += 1
        if model.num_fields > _MAX_FIELDS:
            raise ValueError("it has more fields than any")
        if number in kind.once:
            # A runtime makes one message of the two, and neither was looked at as a whole.
            if number in seen:
                raise ValueError(f"{kind.name} has field {number} twice")
            seen.add(number)
        elif number not in kind.often:
            name = kind.refused.get(number, f"a field {number}, which is unknown here")
            model.faults.append(f"{kind.name} may not have {name}")
            continue
        yield number, value


def _message(value: _Value) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("a number stands where a message belongs")
    return value


def _text(value: _Value) -> str:
    data = _message(value)
    if len(data) > _MAX_NAME_BYTES:
        raise ValueError("a name is longer than any")
    return bytes(data).decode()


def _number(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a message stands where a number belongs")
    return value


# ---------------------------------------------------------------- ONNX
# Field numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto

_MODEL = _Kind(
    "a model",
    once=frozenset({1, 2, 3, 4, 5, 6, 7}),
    often=frozenset({8, 14}),
    refused={20: "training of its own", 25: "functions of its own", 26: "devices of its own"},
)
_OPSET = _Kind("a set of operators", once=frozenset({1, 2}))
_GRAPH = _Kind(
    "a graph",
    once=frozenset({2, 10}),
    often=frozenset({1, 5, 11, 12, 13, 14, 16}),
    refused={15: "sparse tensors"},
)
_VALUE = _Kind("an input or output", once=frozenset({1, 2, 3}), often=frozenset({4}))
_NODE = _Kind(
    "a node",
    once=frozenset({3, 4, 6, 7, 8}),
    often=frozenset({1, 2, 5, 9}),
    refused={10: "devices of its own"},
)
_ATTRIBUTE = _Kind(
    "an attribute",
    once=frozenset({1, 2, 3, 4, 5, 6, 13, 20}),
    often=frozenset({7, 8, 9, 10, 11}),
    refused={
        14: "types",
        15: "types",
        21: "the name of another one",
        22: "sparse tensors",
        23: "sparse tensors",
    },
)
_TENSOR = _Kind(
    "a tensor",
    once=frozenset({2, 8, 9, 12, 14}),
    often=frozenset({1, 4, 5, 6, 7, 10, 11, 13, 16}),
    refused={3: "segments"},
)
_ENTRY = _Kind("an entry of a tensor", once=frozenset({1, 2}))
# What says where a tensor lies.  Not among them: entries of weights that the runtime has laid out
# for its kernels, which it would take as they are.
_PLACES = frozenset({"location", "offset", "length", "checksum"})
_DIGITS = re.compile("[0-9]{1,18}")
_EMPTY = memoryview(b"")


def _read_model(data: memoryview, model: OnnxModel) -> None:
    has_graph = False
    for number, value in _known_fields(data, _MODEL, model):
        if number == 1:
            model.ir_version = _number(value)
        elif number == 7:
            has_graph = True
            _read_graph(_message(value), model, 1)
        elif number == 8:
            opset = dict(_known_fields(_message(value), _OPSET, model))
            model.opsets[_text(opset.get(1, _EMPTY))] = _number(opset.get(2, 0))
    if not has_graph:
        raise ValueError("it has no graph")


def _read_graph(data: memoryview, model: OnnxModel, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs within graphs within graphs")
    for number, value in _known_fields(data, _GRAPH, model):
        if number == 1:
            _read_node(_message(value), model, depth)
        elif number == 5:
            _read_tensor(_message(value), model)
        elif number in (11, 12):
            _read_value(_message(value), model)


def _read_value(data: memoryview, model: OnnxModel) -> None:
    for number, value in _known_fields(data, _VALUE, model):
        if number == 1:
            _text(value)  # names that are none would fail where the engine asks for them


def _read_node(data: memoryview, model: OnnxModel, depth: int) -> None:
    domain = name = ""
    for number, value in _known_fields(data, _NODE, model):
        if number == 4:
            name = _text(value)
        elif number == 7:
            domain = _text(value)
        elif number == 5:
            _read_attribute(_message(value), model, depth)
    model.operators.add((domain, name))


def _read_attribute(data: memoryview, model: OnnxModel, depth: int) -> None:
    for number, value in _known_fields(data, _ATTRIBUTE, model):
        if number in (5, 10):
            _read_tensor(_message(value), model)
        elif number in (6, 11):
            _read_graph(_message(value), model, depth + 1)


def _read_tensor(data: memoryview, model: OnnxModel) -> None:
    is_external = False
    places: dict[str, str] = {}
    for number, value in _known_fields(data, _TENSOR, model):
        if number == 13:
            entry = dict(_known_fields(_message(value), _ENTRY, model))
            key = _text(entry.get(1, _EMPTY))
            if key in places:  # runtimes differ in which one they take
                raise ValueError(f"a tensor has two entries {key!r}")
            places[key] = _text(entry.get(2, _EMPTY))
        elif number == 14:
            # The runtime cuts this to 32 bits, too: 2 ** 32 + 1 says the same as 1.
            is_external = _number(value) != 0
    if is_external or places:
        _read_place(places, model)


def _read_place(places: dict[str, str], model: OnnxModel) -> None:
    model.faults += [
        f"a tensor has the entry {key!r}, which is unknown here"
        for key in sorted(places.keys() - _PLACES)
    ]
    # Without a length the runtime takes as much as the shape asks for.
    offset, length = places.get("offset", "0"), places.get("length", "")
    if not (_DIGITS.fullmatch(offset) and _DIGITS.fullmatch(length) and int(length)):
        model.faults.append(
            f"a tensor lies at the offset {offset!r} in the length {length!r}: no place in a file"
        )
        offset = length = "0"
    model.externals.append((places.get("location", ""), int(offset), int(length)))
