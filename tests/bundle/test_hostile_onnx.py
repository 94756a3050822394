"""ONNX graphs that attack who loads them: refused before ONNX Runtime hears of them.

Each attack is one change to a small model that passes, and lies in a real bundle in the place of
its graph.  Those that are proven are shown to read the wrong file, or to run the wrong operator,
where ONNX Runtime is given them without our check.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    StringStringEntryProto,
    TensorProto,
)
from onnx.helper import (
    make_function,
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)

from sealing import reseal, text_of
from seqloss.bundle.manifest import ONNX_GRAPH, ONNX_WEIGHTS, EngineName
from seqloss.bundle.onnx_model import check_onnx
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.engines import onnx_engine
from seqloss.engines.onnx_engine import OnnxEngine
from seqloss.errors import BundleError

FOLDER = "graphs/onnx-float32"
OTHER, SECRET = "other.data", "secret"
SIZE, WIDTH = 64, 4  # floats in a file, and of them in a tensor
WEIGHTS_BYTES = 4 * SIZE
SEVENS = [7.0] * WIDTH
PLACE = (("location", ONNX_WEIGHTS), ("offset", "0"), ("length", str(4 * WIDTH)))
OTHER_PLACE = (("location", OTHER), *PLACE[1:])

Entries = tuple[tuple[str, str], ...]

# ---------------------------------------------------------------- models, as objects


def tensor(entries: Entries = OTHER_PLACE, name: str = "w") -> TensorProto:
    """One that lies outside."""
    outside = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[WIDTH])
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.extend(
        StringStringEntryProto(key=key, value=value) for key, value in entries
    )
    return outside


def graph_of(nodes: list[NodeProto], *initializers: TensorProto) -> GraphProto:
    """Of the input x and the output y."""
    return make_graph(
        nodes,
        "small",
        [make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )


def model_of(graph: GraphProto) -> ModelProto:
    domains = ("", "com.microsoft", "evil", "ai.onnx.ml")
    opsets = [make_opsetid(domain, 1 if domain else 20) for domain in domains]
    return make_model(graph, opset_imports=opsets, ir_version=10)


def adding(*initializers: TensorProto) -> GraphProto:
    return graph_of([make_node("Add", ["x", "w"], ["y"])], *initializers)


def small(change: Callable[[ModelProto], object] = lambda _: None) -> bytes:
    """A model that adds a weight to its input, and passes; changed."""
    model = model_of(adding(tensor(PLACE)))
    change(model)
    return model.SerializeToString()


def placed(*entries: tuple[str, str]) -> bytes:
    return model_of(adding(tensor(entries))).SerializeToString()


def placed_at(offset: str, length: str = PLACE[2][1]) -> bytes:
    return placed(PLACE[0], ("offset", offset), ("length", length))


def running(*nodes: NodeProto) -> bytes:
    return model_of(graph_of(list(nodes))).SerializeToString()


def with_attribute(**values: object) -> bytes:
    """The sum of the input and of what a node has in an attribute."""
    constant = NodeProto(op_type="Constant", output=["w"])
    constant.attribute.append(AttributeProto(**values))
    return model_of(graph_of([constant, make_node("Add", ["x", "w"], ["y"])])).SerializeToString()


def in_a_branch(branch: GraphProto, times: int = 1) -> bytes:
    """Runs the branch, which gives y, whatever the input."""
    for depth in range(times):
        truth = onnx.helper.make_tensor(f"truth_{depth}", TensorProto.BOOL, [], [True])
        condition = f"condition_{depth}"
        constant = make_node("Constant", [], [condition], value=truth)
        del branch.input[:]
        choice = make_node("If", [condition], ["y"], then_branch=branch, else_branch=branch)
        branch = graph_of([constant, choice])
    return model_of(branch).SerializeToString()


def sparse(values: TensorProto, indices: TensorProto) -> SparseTensorProto:
    return SparseTensorProto(values=values, indices=indices, dims=[WIDTH])


RANDOM = make_node("RandomNormalLike", ["x"], ["y"])
INSIDE = onnx.numpy_helper.from_array(np.arange(WIDTH), "inside")
INSIDE_FLOATS = onnx.numpy_helper.from_array(np.arange(WIDTH, dtype=np.float32), "inside")
FUNCTION = make_function("evil", "Identity", ["x"], ["y"], [RANDOM], [make_opsetid("", 20)])
FUNCTION_OF_OURS = make_function("", "Identity", ["x"], ["y"], [RANDOM], [make_opsetid("", 20)])

# ---------------------------------------------------------------- models, as bytes

VARINT, FIXED64, BYTES, GROUP, END_GROUP = 0, 1, 2, 3, 4
# Of a model, of a graph, of a node, of an attribute and of a tensor.
GRAPH, NAME, INITIALIZER, NODE, OPERATOR, ATTRIBUTE, SUBGRAPH = 7, 2, 5, 1, 4, 5, 6
DATA_LOCATION = 14


def varint(value: int, length: int = 0) -> bytes:
    """A number; in `length` bytes, of which the last ones say nothing, if it needs fewer."""
    digits = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    digits += [0] * (length - len(digits))
    return bytes([*(digit | 0x80 for digit in digits[:-1]), digits[-1]])


def record(number: int, content: bytes, beyond: int = 0) -> bytes:
    """A field of bytes; `beyond` stands in the bits of its number that the runtime forgets."""
    return varint((number << 3 | BYTES) + (beyond << 32)) + varint(len(content)) + content


def number_field(number: int, value: int) -> bytes:
    return varint(number << 3 | VARINT) + varint(value)


def head() -> bytes:
    """A model without its graph."""
    return small(lambda model: model.ClearField("graph"))


def with_tensor(content: bytes) -> bytes:
    """The small model with another weight."""
    graph = adding().SerializeToString() + record(INITIALIZER, content)
    return head() + record(GRAPH, graph)


def nested(depth: int) -> bytes:
    """Graphs within graphs, the innermost one empty."""
    graph = b""
    for _ in range(depth - 1):
        node = record(OPERATOR, b"If") + record(ATTRIBUTE, record(SUBGRAPH, graph))
        graph = record(NODE, node)
    return head() + record(GRAPH, graph)


def disguised() -> bytes:
    """A node whose operator comes again as a number of eight bytes; runtimes pass over that."""
    node = RANDOM.SerializeToString() + varint(OPERATOR << 3 | FIXED64) + b"Identity"
    return head() + record(GRAPH, graph_of([]).SerializeToString() + record(NODE, node))


EVIL_GRAPH = adding(tensor()).SerializeToString()
HALF = tensor(OTHER_PLACE).SerializeToString()
PLACE_ENTRY = record(1, b"location") + record(2, ONNX_WEIGHTS.encode())
INLINE = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[WIDTH])
INLINE.external_data.extend(tensor().external_data)

# ---------------------------------------------------------------- attacks

NO_PLACE = "no place in a file"
BEHIND = f"behind the end of {ONNX_WEIGHTS!r}"
NOT_NEEDED = "is not one that losses need"

# What ONNX Runtime alone answers with the content of the other file.
READING: dict[str, tuple[bytes, str]] = {
    "other_file": (placed(*OTHER_PLACE), f"lies in {OTHER!r}"),
    "climbing_and_coming_back": (
        placed(("location", f"../onnx-float32/{OTHER}"), *PLACE[1:]),
        "lies in '../onnx-float32/other.data'",
    ),
    "in_a_branch": (in_a_branch(adding(tensor())), f"lies in {OTHER!r}"),
    "in_a_branch_of_a_branch": (in_a_branch(adding(tensor()), 2), f"lies in {OTHER!r}"),
    "second_graph": (
        head() + record(GRAPH, record(NAME, b"empty")) + record(GRAPH, EVIL_GRAPH),
        "a model has field 7 twice",
    ),
    "graph_by_a_number_too_large": (
        head() + record(GRAPH, b"") + record(GRAPH, EVIL_GRAPH, beyond=1),
        "the number of a field has too many digits",
    ),
    "graph_by_a_number_far_too_large": (
        head() + record(GRAPH, b"") + record(GRAPH, EVIL_GRAPH, beyond=7),
        "the number of a field has too many digits",
    ),
    "tensor_by_a_number_too_large": (
        head() + record(GRAPH, adding().SerializeToString() + record(INITIALIZER, HALF, beyond=1)),
        "the number of a field has too many digits",
    ),
    "outside_by_a_number_that_is_cut": (
        with_tensor(INLINE.SerializeToString() + number_field(DATA_LOCATION, (1 << 32) + 1)),
        f"lies in {OTHER!r}",
    ),
}

# What ONNX Runtime alone runs.
RUNNING: dict[str, tuple[bytes, str]] = {
    "random_numbers": (running(RANDOM), f"'RandomNormalLike' of domain '' {NOT_NEEDED}"),
    "random_numbers_in_a_branch": (
        in_a_branch(graph_of([RANDOM])),
        f"'RandomNormalLike' of domain '' {NOT_NEEDED}",
    ),
    "operator_and_its_disguise": (disguised(), "a node has field 4 twice"),
    "function": (
        small(
            lambda model: (
                model.functions.append(FUNCTION),
                model.graph.CopyFrom(
                    graph_of([make_node("Identity", ["x"], ["y"], domain="evil")])
                ),
            )
        ),
        "a model may not have functions of its own",
    ),
}

REFUSED: dict[str, tuple[bytes, str]] = {
    **READING,
    **RUNNING,
    # files
    "absolute_path": (placed(("location", "/etc/hostname"), *PLACE[1:]), "lies in '/etc/hostname'"),
    "climbing": (placed(("location", f"../../../{SECRET}"), *PLACE[1:]), f"'../../../{SECRET}'"),
    "another_name_of_the_file": (
        placed(("location", f"./{ONNX_WEIGHTS}"), *PLACE[1:]),
        f"lies in './{ONNX_WEIGHTS}'",
    ),
    "name_with_an_end_in_it": (
        placed(("location", f"{ONNX_WEIGHTS}\0.txt"), *PLACE[1:]),
        "x00.txt', and may lie in",
    ),
    "memory_of_the_process": (
        placed(("location", "*/_ORT_MEM_ADDR_/*"), *PLACE[1:]),
        "lies in '*/_ORT_MEM_ADDR_/*'",
    ),
    "no_file": (placed(*PLACE[1:]), "lies in ''"),
    "no_entries": (placed(), "lies in ''"),
    "entries_and_not_outside": (with_tensor(INLINE.SerializeToString()), f"lies in {OTHER!r}"),
    "good_file_and_bad_file": (placed(*PLACE, OTHER_PLACE[0]), "two entries 'location'"),
    "bad_file_and_good_file": (placed(*OTHER_PLACE, PLACE[0]), "two entries 'location'"),
    "two_offsets": (placed(*PLACE, ("offset", "999")), "two entries 'offset'"),
    "two_lengths": (placed(*PLACE, ("length", "999")), "two entries 'length'"),
    "key_twice": (
        with_tensor(
            tensor(PLACE[1:]).SerializeToString() + record(13, PLACE_ENTRY + record(1, b"checksum"))
        ),
        "an entry of a tensor has field 1 twice",
    ),
    "file_twice_in_one_entry": (
        with_tensor(
            tensor(PLACE[1:]).SerializeToString()
            + record(13, PLACE_ENTRY + record(2, OTHER.encode()))
        ),
        "an entry of a tensor has field 2 twice",
    ),
    "file_by_eight_bytes": (
        with_tensor(
            tensor(PLACE[1:]).SerializeToString()
            + record(13, record(1, b"location") + varint(2 << 3 | FIXED64) + bytes(8))
        ),
        "a number stands where a message belongs",
    ),
    "weights_laid_out_for_kernels": (
        placed(*PLACE, ("prepacked_0", "key|0;16;0")),
        "the entry 'prepacked_0', which is unknown here",
    ),
    # places in the file
    "behind_the_end": (placed_at(str(WEIGHTS_BYTES)), BEHIND),
    "across_the_end": (placed_at(str(WEIGHTS_BYTES - 15)), BEHIND),
    "longer_than_the_file": (placed_at("0", str(WEIGHTS_BYTES + 1)), BEHIND),
    "far_behind_the_end": (placed_at("9" * 18), BEHIND),
    "far_too_long": (placed_at("9" * 200), NO_PLACE),
    "without_end": (placed_at("9" * 5000), "longer than any"),
    "no_length": (placed(*PLACE[:2]), NO_PLACE),
    "length_of_nothing": (placed_at("0", "0"), NO_PLACE),
    **{
        f"{name}_{text!r}": (placed_at(*place), NO_PLACE)
        for text in (
            "-16",
            "+16",
            " 16",
            "16 ",
            "1_6",
            "0x10",
            "1e1",
            "16.0",
            "\uff11\uff16",
            "",
            "x",
        )
        for name, place in (("offset", (text,)), ("length", ("0", text)))
    },
    # where tensors hide
    "in_an_attribute": (
        with_attribute(name="value", type=AttributeProto.TENSOR, t=tensor()),
        f"lies in {OTHER!r}",
    ),
    "in_an_attribute_of_another_type": (
        with_attribute(name="value", type=AttributeProto.INT, i=1, t=tensor()),
        f"lies in {OTHER!r}",
    ),
    "in_an_attribute_of_tensors": (
        with_attribute(
            name="value", type=AttributeProto.TENSORS, tensors=[tensor(PLACE), tensor()]
        ),
        f"lies in {OTHER!r}",
    ),
    "in_an_attribute_of_graphs": (
        with_attribute(name="value", type=AttributeProto.GRAPHS, graphs=[adding(tensor())]),
        f"lies in {OTHER!r}",
    ),
    "in_two_halves_of_an_attribute": (
        head()
        + record(
            GRAPH,
            record(
                NODE,
                record(OPERATOR, b"Constant")
                + record(
                    5,
                    record(5, tensor(PLACE).SerializeToString())
                    + record(5, tensor((("offset", "999"),)).SerializeToString()),
                ),
            ),
        ),
        "an attribute has field 5 twice",
    ),
    "in_a_sparse_attribute": (
        with_attribute(
            name="sparse_value",
            type=AttributeProto.SPARSE_TENSOR,
            sparse_tensor=sparse(tensor(), INSIDE),
        ),
        "an attribute may not have sparse tensors",
    ),
    "in_an_attribute_of_sparse_ones": (
        with_attribute(
            name="evil",
            type=AttributeProto.SPARSE_TENSORS,
            sparse_tensors=[sparse(INSIDE, tensor())],
        ),
        "an attribute may not have sparse tensors",
    ),
    "in_a_sparse_weight": (
        small(lambda model: model.graph.sparse_initializer.append(sparse(tensor(), INSIDE))),
        "a graph may not have sparse tensors",
    ),
    "in_an_attribute_in_a_branch": (
        in_a_branch(graph_of([make_node("Constant", [], ["y"], value=tensor())])),
        f"lies in {OTHER!r}",
    ),
    # operators
    **{
        f"operator_{domain}_{name}": (
            running(make_node(name, ["x"], ["y"], domain=domain)),
            f"the operator {name!r} of domain {domain!r} {NOT_NEEDED}",
        )
        for domain, name in (
            ("", "Loop"),
            ("", "Scan"),
            ("", "SequenceMap"),
            ("", "RandomNormal"),
            ("", "Multinomial"),
            ("", "StringNormalizer"),
            ("", ""),
            ("ai.onnx", "Loop"),
            ("ai.onnx.ml", "TreeEnsemble"),
            ("ai.onnx.contrib", "Add"),
            ("evil", "Add"),
            ("com.microsoft", "Add"),
            ("com.microsoft", "EPContext"),
            ("com.microsoft", "SampleOp"),
            ("com.microsoft.nchwc", "ReorderInput"),
            ("com.microsoft.extensions", "PythonOp"),
        )
    },
    "operator_with_an_end_in_it": (
        running(make_node("Add\0", ["x"], ["y"])),
        f"x00' of domain '' {NOT_NEEDED}",
    ),
    "operator_of_a_long_name": (running(make_node("A" * 2000, ["x"], ["y"])), "longer than any"),
    "operator_of_no_text": (
        head() + record(GRAPH, record(NODE, record(OPERATOR, b"\xff\xfe"))),
        "codec can't decode",
    ),
    # ONNX Runtime takes it, and fails where it is asked for the name.
    "output_of_no_text": (small().replace(b"\x01y", b"\x01\xff"), "codec can't decode"),
    "operator_by_a_number": (
        head() + record(GRAPH, record(NODE, number_field(OPERATOR, 1))),
        "a number stands where a message belongs",
    ),
    "loop_in_a_branch": (
        in_a_branch(graph_of([make_node("Loop", [], ["y"], body=adding())])),
        "'Loop'",
    ),
    # models
    "function_in_the_place_of_an_operator": (
        small(
            lambda model: (
                model.functions.append(FUNCTION_OF_OURS),
                model.graph.CopyFrom(graph_of([make_node("Identity", ["x"], ["y"])])),
            )
        ),
        "a model may not have functions of its own",
    ),
    "training": (
        small(lambda model: model.training_info.add().algorithm.CopyFrom(adding(tensor()))),
        "a model may not have training of its own",
    ),
    "training_by_a_number_too_large": (
        small() + record(20, record(2, EVIL_GRAPH), beyond=1),
        "the number of a field has too many digits",
    ),
    "unknown_field_of_a_model": (small() + number_field(99, 1), "a model may not have a field 99"),
    "unknown_field_of_a_tensor": (
        with_tensor(tensor(PLACE).SerializeToString() + number_field(99, 1)),
        "a tensor may not have a field 99",
    ),
    # no models
    "nothing": (b"", "it has no graph"),
    "text": (b"<!DOCTYPE html>", "not an ONNX model"),
    "archive": (b"PK\x03\x04" + bytes(60), "not an ONNX model"),
    "graph_alone": (adding(tensor(PLACE)).SerializeToString(), "not an ONNX model"),
    "truncated": (small()[:-5], "it ends too early"),
    "truncated_in_a_number": (small() + b"\x80", "it ends too early"),
    "truncated_in_a_fixed_number": (
        small() + varint(5 << 3 | FIXED64) + b"1234567",
        "it ends too early",
    ),
    "longer_than_it_is": (
        head() + varint(GRAPH << 3 | BYTES) + varint(1 << 40),
        "it ends too early",
    ),
    "number_of_eleven_bytes": (
        head() + varint(1 << 3) + varint(8, 11),
        "a number has too many digits",
    ),
    "number_without_end": (head() + varint(1 << 3) + b"\xff" * 10_000, "too many digits"),
    "group": (
        small() + varint(99 << 3 | GROUP) + varint(99 << 3 | END_GROUP),
        "a field of the unknown kind 3",
    ),
    "graph_as_a_group": (
        head() + varint(GRAPH << 3 | GROUP) + EVIL_GRAPH + varint(GRAPH << 3 | END_GROUP),
        "a field of the unknown kind 3",
    ),
    "graph_as_a_number": (head() + number_field(GRAPH, 1), "a number stands where"),
    "nested": (nested(9), "graphs within graphs"),
    "nested_deeply": (nested(3000), "graphs within graphs"),
    "too_large": (
        head() + record(GRAPH, record(NODE, b"") * 1_000_000),
        "it has more fields than any",
    ),
}


# ---------------------------------------------------------------- helpers


@pytest.fixture
def folder(export_once: Callable[[str, EngineName], Bundle], tmp_path: Path) -> Path:
    """A copy of a real bundle, to be changed."""
    bundle = export_once("marian", "onnx").folder
    (tmp_path / SECRET).write_bytes(np.full(SIZE, 7, np.float32).tobytes())
    return shutil.copytree(bundle, tmp_path / "bundle")


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What ONNX Runtime was given."""
    given = []
    real = onnxruntime.InferenceSession

    def session(content: bytes, *args: object, **options: object) -> object:
        given.append(content)
        return real(content, *args, **options)

    monkeypatch.setattr(onnx_engine.onnxruntime, "InferenceSession", session)
    return given


def put(folder: Path, content: bytes) -> None:
    """Has the bundle consist of a small model, its weights, and another file."""
    graph = folder / FOLDER
    (graph / ONNX_GRAPH).write_bytes(content)
    (graph / ONNX_WEIGHTS).write_bytes(np.arange(SIZE, dtype=np.float32).tobytes())
    (graph / OTHER).write_bytes(np.full(SIZE, 7, np.float32).tobytes())
    reseal(folder)


def refusal(folder: Path) -> BundleError:
    """The error with which a sealed bundle is refused."""
    bundle = open_bundle(folder)
    with pytest.raises(BundleError) as caught:
        OnnxEngine(bundle, bundle.manifest.graph("onnx", "float32"), "cpu", 1)
    return caught.value


def run_unchecked(content: bytes, folder: Path) -> list[float]:
    """What ONNX Runtime computes for zeros, set up as the engine does."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str((folder / FOLDER).resolve())
    )
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(["y"], {"x": np.zeros(WIDTH, np.float32)})
    return list(result)


def refused(content: bytes) -> bool:
    """Whether the check refuses it; no other error comes out of it."""
    try:
        check_onnx(content, ONNX_WEIGHTS, WEIGHTS_BYTES)
    except BundleError:
        return True
    return False


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("attack", REFUSED)
def test_attack_is_refused_before_onnx_runtime_sees_it(
    attack: str, folder: Path, sessions: list[bytes]
) -> None:
    content, fault = REFUSED[attack]
    put(folder, content)
    start = time.monotonic()

    error = refusal(folder)

    assert f"{FOLDER}/{ONNX_GRAPH}" in error.detail
    assert fault in text_of(error)
    assert not sessions
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("attack", READING)
def test_onnx_runtime_alone_reads_the_other_file(attack: str, folder: Path) -> None:
    put(folder, READING[attack][0])
    assert run_unchecked(READING[attack][0], folder) == SEVENS


@pytest.mark.parametrize("attack", RUNNING)
def test_onnx_runtime_alone_runs_the_operator(attack: str, folder: Path) -> None:
    put(folder, RUNNING[attack][0])
    assert all(run_unchecked(RUNNING[attack][0], folder))  # random numbers are hardly ever zero


@pytest.mark.parametrize(
    "content",
    [
        small(),
        in_a_branch(adding(tensor(PLACE))),
        with_attribute(name="value", type=AttributeProto.TENSOR, t=INSIDE_FLOATS),
        head() + record(GRAPH, adding(tensor(PLACE)).SerializeToString()),
    ],
    ids=["small", "in_a_branch", "in_an_attribute", "by_hand"],
)
def test_what_is_no_attack_passes_the_check(
    content: bytes, folder: Path, sessions: list[bytes]
) -> None:
    put(folder, content)

    error = refusal(folder)

    assert sessions == [content]
    assert "takes x and gives y: it is no loss graph" in error.detail
    assert run_unchecked(content, folder) == list(range(WIDTH))


def test_graphs_may_be_nested_to_a_depth() -> None:
    assert not refused(nested(8))


def test_untouched_bundle_passes(folder: Path) -> None:
    bundle = open_bundle(folder)
    for graph in bundle.manifest.graphs:
        OnnxEngine(bundle, graph, "cpu", 1).close()


def test_all_faults_of_a_graph_are_listed() -> None:
    def change(model: ModelProto) -> None:
        model.graph.node.append(make_node("Loop", [], ["z"]))
        model.graph.initializer.append(tensor())
        model.functions.append(FUNCTION)
        model.training_info.add()

    with pytest.raises(BundleError) as caught:
        check_onnx(small(change), ONNX_WEIGHTS, WEIGHTS_BYTES)

    text = text_of(caught.value)
    for fault in ("'Loop'", f"lies in {OTHER!r}", "functions", "training"):
        assert fault in text


def test_the_faults_of_a_graph_full_of_them_are_not() -> None:
    with pytest.raises(BundleError) as caught:
        check_onnx(
            small(lambda model: model.graph.initializer.extend([tensor()] * 1000)),
            ONNX_WEIGHTS,
            WEIGHTS_BYTES,
        )
    assert len(caught.value.faults) == 10


# ---------------------------------------------------------------- another format of ONNX Runtime


@pytest.fixture
def own_format(tmp_path: Path) -> bytes:
    """A model as ONNX Runtime keeps them for itself: a flatbuffer, which it takes at its word."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(running(RANDOM), options, providers=["CPUExecutionProvider"])
    return (tmp_path / "model.ort").read_bytes()


def test_the_runtimes_own_format_is_refused(
    own_format: bytes, folder: Path, sessions: list[bytes]
) -> None:
    assert own_format[4:8] == b"ORTM"
    onnxruntime.InferenceSession(own_format, providers=["CPUExecutionProvider"])  # takes it
    sessions.clear()
    put(folder, own_format)

    error = refusal(folder)

    assert "not an ONNX model" in error.detail
    assert not sessions
    # Should a file be both, the session is told which one it is.
    with pytest.raises(Exception, match="INVALID_PROTOBUF"):
        run_unchecked(own_format, folder)


# ---------------------------------------------------------------- other graphs, other files


def rename_an_output(model: ModelProto) -> None:
    rename(model, "target_logprob", "evil")


def rename_an_input(model: ModelProto) -> None:
    rename(model, "labels", "evil")


def swap_outputs(model: ModelProto) -> None:
    first, second = model.graph.output[0], model.graph.output[1]
    kept = onnx.ValueInfoProto()
    kept.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(kept)


def add_an_input(model: ModelProto) -> None:
    model.graph.input.append(make_tensor_value_info("evil", TensorProto.FLOAT, [1]))


def drop_an_output(model: ModelProto) -> None:
    del model.graph.output[-1]


def rename(model: ModelProto, old: str, new: str) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


@pytest.mark.parametrize(
    "change", [rename_an_output, rename_an_input, swap_outputs, add_an_input, drop_an_output]
)
def test_a_graph_of_other_inputs_or_outputs_is_no_loss_graph(
    change: Callable[[ModelProto], None], folder: Path, sessions: list[bytes]
) -> None:
    path = folder / FOLDER / ONNX_GRAPH
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    reseal(folder)

    error = refusal(folder)

    assert len(sessions) == 1
    assert "it is no loss graph" in error.detail


def test_weights_that_were_cut_off_are_not_those_of_the_manifest(folder: Path) -> None:
    cut(folder / FOLDER / ONNX_WEIGHTS)
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert f"'{FOLDER}/{ONNX_WEIGHTS}' is not the file" in text_of(caught.value)


def test_a_graph_does_not_read_behind_the_end_of_its_weights(
    folder: Path, sessions: list[bytes]
) -> None:
    cut(folder / FOLDER / ONNX_WEIGHTS)
    reseal(folder)

    error = refusal(folder)

    assert BEHIND in text_of(error)
    assert not sessions


def test_weights_may_not_be_a_link(folder: Path) -> None:
    path = folder / FOLDER / ONNX_WEIGHTS
    path.rename(folder.parent / "outside")
    path.symlink_to(folder.parent / "outside")
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert f"'{FOLDER}/{ONNX_WEIGHTS}' is a link" in text_of(caught.value)


def test_a_graph_that_changed_since_the_bundle_was_opened_is_refused(
    folder: Path, sessions: list[bytes]
) -> None:
    put(folder, small())
    bundle = open_bundle(folder)
    (folder / FOLDER / ONNX_GRAPH).write_bytes(READING["other_file"][0])

    with pytest.raises(BundleError, match="changed while it was read"):
        OnnxEngine(bundle, bundle.manifest.graph("onnx", "float32"), "cpu", 1)

    assert not sessions


def test_weights_that_were_cut_off_since_the_bundle_was_opened_are_refused(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / FOLDER / ONNX_WEIGHTS).write_bytes(b"")
    with pytest.raises(BundleError, match="does not load"):
        OnnxEngine(bundle, bundle.manifest.graph("onnx", "float32"), "cpu", 1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# ---------------------------------------------------------------- whatever else there may be


@pytest.mark.parametrize("end", range(0, len(small()), 3))
def test_a_model_that_ends_anywhere_is_refused_or_whole(end: int) -> None:
    content = small()[:end]
    assert refused(content) or onnx.load_from_string(content).HasField("graph")


FIELDS = st.builds(
    lambda number, wire, beyond, content: (
        varint((number << 3 | wire) + (beyond << 32))
        + (varint(len(content)) if wire == BYTES else b"")
        + content
    ),
    number=st.integers(0, 30),
    wire=st.sampled_from([VARINT, FIXED64, BYTES, BYTES, BYTES, GROUP, END_GROUP, 5]),
    beyond=st.sampled_from([0, 0, 0, 1]),
    content=st.one_of(
        st.binary(max_size=12),
        st.sampled_from(
            [b"\x01", b"Loop", b"Identity", HALF, EVIL_GRAPH, RANDOM.SerializeToString()]
        ),
    ),
)


@given(
    places=st.lists(st.tuples(st.integers(0, len(small())), st.integers(0, 3), FIELDS), max_size=3),
    outside=st.lists(FIELDS, max_size=3),
)
def test_what_passes_is_what_another_reader_sees(
    places: list[tuple[int, int, bytes]], outside: list[bytes]
) -> None:
    content = small()
    for at, dropped, inserted in places:
        content = content[:at] + inserted + content[at + dropped :]
    content += b"".join(outside)
    if refused(content):
        return
    try:
        model = ModelProto.FromString(content)
    except DecodeError:
        return
    assert not model.functions
    assert not model.training_info
    for node in model.graph.node:
        assert node.op_type in {"Add", "Identity"}
        assert not node.domain
    for weight in model.graph.initializer:
        if weight.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in weight.external_data}
            assert entries["location"] == ONNX_WEIGHTS
            assert int(entries.get("offset", 0)) + int(entries["length"]) <= WEIGHTS_BYTES
