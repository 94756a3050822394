"""Bundles that attack who loads them; nothing in them may run, and none may pass for another.

Each payload would make a file, the marker. Attacks that are proven are shown to make it where
Torch loads the archive without our check.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sealing import reseal, text_of
from seqloss.bundle import reader
from seqloss.bundle.graph_archive import checked
from seqloss.bundle.manifest import BODY_GRAPH, MANIFEST_NAME, WEIGHTS_NAME
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.engines import cpu_linear
from seqloss.engines.torch_engine import TorchEngine
from seqloss.errors import BundleError
from seqloss.records import Batch, Ragged

GRAPH = f"graphs/torch-float32/{BODY_GRAPH}"
PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
INPUTS = tuple(
    torch.ones(size, dtype=torch.int64) for size in [(3, 7), (3, 7), (5,), (5, 6), (11,)]
)

Members = dict[str, bytes]
Program = dict[str, Any]


class Touch:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def code(marker: Path) -> str:
    """An expression that makes the marker."""
    return f"__import__('pathlib').Path('{marker}').touch()"


# ---------------------------------------------------------------- helpers


@pytest.fixture
def generic_bundle(bundle_of: Callable[..., Bundle]) -> Bundle:
    """Of transformers' own graph, by whose names the attacks know it."""
    return bundle_of("marian", generic=True)


@pytest.fixture
def folder(generic_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of a real bundle, to be changed."""
    return shutil.copytree(generic_bundle.folder, tmp_path / "bundle")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def unpacked(archive: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


def packed(members: Members, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def refusal(folder: Path) -> BundleError:
    """The error with which a resealed bundle is refused."""
    reseal(folder)
    bundle = open_bundle(folder)
    with pytest.raises(BundleError) as caught:
        TorchEngine(bundle, bundle.manifest.graphs[0], "cpu")
    return caught.value


def run_unchecked(archive: bytes) -> None:
    """What a loader does that trusts its file."""
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        torch.export.load(io.BytesIO(archive)).module()(*INPUTS)


def change_json(members: Members, name: str, change: Callable[[Any], None]) -> None:
    content = json.loads(members[name])
    change(content)
    members[name] = json.dumps(content).encode()


# ---------------------------------------------------------------- payloads beside the program


def pickle_a_weight(members: Members, marker: Path) -> None:
    def change(weights: Any) -> None:
        weights["config"]["model.model.encoder.layers.0.self_attn.k_proj.weight"] |= {
            "use_pickle": True,
            "path_name": "weight_9",
        }

    change_json(members, WEIGHTS, change)
    members["data/weights/weight_9"] = pickle.dumps(Touch(marker))


def pickle_all_weights_as_old_archives_do(members: Members, marker: Path) -> None:
    members["data/weights/model.pt"] = pickle.dumps(Touch(marker))


def pickle_all_constants_as_old_archives_do(members: Members, marker: Path) -> None:
    members["data/constants/model.pt"] = pickle.dumps(Touch(marker))


def pickle_sample_inputs(members: Members, marker: Path) -> None:
    members[SAMPLE_INPUTS] = pickle.dumps(Touch(marker))


def add_constant(kind: str) -> Callable[[Members, Path], None]:
    def attack(members: Members, marker: Path) -> None:
        payload = {"path_name": f"{kind}_0", "is_param": False, "use_pickle": True}
        constants = {"config": {"evil": payload | {"tensor_meta": None}}}
        members[CONSTANTS] = json.dumps(constants).encode()
        members[f"data/constants/{kind}_0"] = pickle.dumps(Touch(marker))

    attack.__name__ = f"add_{kind}"
    return attack


def add_second_program(members: Members, marker: Path) -> None:
    members["models/other.json"] = members[PROGRAM]
    members["data/sample_inputs/other.pt"] = pickle.dumps(Touch(marker))


def add_compiled_library(members: Members, marker: Path) -> None:
    members["data/aotinductor/model/evil.so"] = b"\x7fELF"


def climb_out_of_the_archive(members: Members, marker: Path) -> None:
    members["../../marker"] = b"written"


# ---------------------------------------------------------------- payloads in the program


def program_attack(change: Callable[[Program, Path], None]) -> Callable[[Members, Path], None]:
    def attack(members: Members, marker: Path) -> None:
        change_json(members, PROGRAM, lambda program: change(program, marker))

    attack.__name__ = change.__name__
    return attack


def graph_of(program: Program) -> Any:
    return program["graph_module"]["graph"]


def signature_of(program: Program) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def set_size(program: Program, text: str) -> None:
    graph_of(program)["tensor_values"]["source_ids"]["sizes"][0]["as_expr"]["expr_str"] = text


@program_attack
def code_as_a_size(program: Program, marker: Path) -> None:
    set_size(program, code(marker))


@program_attack
def code_in_the_comment_of_a_size(program: Program, marker: Path) -> None:
    # sympify drops line breaks: the first text ends later than Python says, the comment is none.
    set_size(program, f"Add(Symbol('a\\\n'), #'),{code(marker)},\nSymbol(\"b\"))")


@program_attack
def huge_power_as_a_size(program: Program, marker: Path) -> None:
    set_size(program, "Pow(Integer(9), Pow(Integer(9), Integer(4)))")


@program_attack
def code_as_the_name_of_an_input(program: Program, marker: Path) -> None:
    # Torch pastes the names twice: the text between makes one function of the two.
    names = [f'a={code(marker)}, b="""', "c=0): #"]
    signature_of(program)["forward_arg_names"] = names


@program_attack
def attribute_as_the_name_of_an_input(program: Program, marker: Path) -> None:
    signature_of(program)["forward_arg_names"][0] = "torch.load"


@program_attack
def code_as_a_guard(program: Program, marker: Path) -> None:
    program["guards_code"] = [f"True #\n)\n{code(marker)}\ndef _(*args):\n #"]


@program_attack
def enum_as_a_structure(program: Program, marker: Path) -> None:
    structure = json.loads(signature_of(program)["in_spec"])
    enum = {"__enum__": True, "fqn": "antigravity:Evil", "name": "EVIL"}
    structure[1]["children_spec"][1]["context"] = json.dumps([enum])
    signature_of(program)["in_spec"] = json.dumps(structure)


@program_attack
def list_as_a_structure(program: Program, marker: Path) -> None:
    signature_of(program)["in_spec"] = "[1, []]"


@program_attack
def metadata_of_a_node(program: Program, marker: Path) -> None:
    graph_of(program)["nodes"][0]["metadata"] = {"source_fn_stack": "evil,torch.load"}


@program_attack
def script_object(program: Program, marker: Path) -> None:
    graph_of(program)["custom_obj_values"] = {"evil": {"name": "evil", "class_fqn": "Evil"}}


@program_attack
def operator_as_an_argument(program: Program, marker: Path) -> None:
    graph_of(program)["nodes"][0]["inputs"][1]["arg"] = {"as_operator": "torch.load"}


@program_attack
def weight_as_an_output_to_overwrite(program: Program, marker: Path) -> None:
    output = {
        "arg": {"name": "neg"},
        "parameter_name": "model.model.encoder.layers.0.self_attn.k_proj.weight",
    }
    program["graph_module"]["signature"]["output_specs"][0] = {"parameter_mutation": output}


@program_attack
def path_to_what_all_modules_share(program: Program, marker: Path) -> None:
    weight = program["graph_module"]["signature"]["input_specs"][0]["parameter"]
    weight["parameter_name"] = "__class__.__base__.__base__._compiled_call_impl.x"


def insert_node(target: str, **arguments: Any) -> Callable[[Members, Path], None]:
    """A node in front of all others, whose result nobody uses."""

    def change(program: Program, marker: Path) -> None:
        graph = graph_of(program)
        graph["tensor_values"]["evil"] = graph["tensor_values"]["source_ids"]
        inputs = [
            {"name": name, "arg": {"as_string": str(marker)} if value is marker_path else value}
            | {"kind": 1}
            for name, value in arguments.items()
        ]
        node = {"target": target, "inputs": inputs, "outputs": [{"as_tensor": {"name": "evil"}}]}
        graph["nodes"].insert(
            0, node | {"metadata": {}, "name": "evil", "is_hop_single_tensor_return": None}
        )

    change.__name__ = target
    return program_attack(change)


marker_path = object()
weight = {"as_tensor": {"name": "p_model_model_encoder_layers_0_self_attn_k_proj_weight"}}
true, zero = {"as_bool": True}, {"as_int": 0}

read_a_file = insert_node(
    "torch.ops.aten.from_file.default", filename=marker_path, shared=true, size={"as_int": 8}
)

PROVEN: list[tuple[Callable[[Members, Path], None], str]] = [
    (pickle_a_weight, "something else than a plain tensor"),
    (pickle_all_weights_as_old_archives_do, "unexpected member"),
    (pickle_all_constants_as_old_archives_do, "unexpected member"),
    (pickle_sample_inputs, "unexpected member"),
    (add_constant("tensor"), "something else than a plain tensor"),
    (add_constant("opaque_obj"), "something else than a plain tensor"),
    (code_as_a_size, "not plain arithmetic"),
    (code_in_the_comment_of_a_size, "not plain arithmetic"),
    (code_as_the_name_of_an_input, "forward_arg_names"),
    (read_a_file, "not an operator that a bundle may use"),
]
REFUSED: list[tuple[Callable[[Members, Path], None], str]] = [
    *PROVEN,
    (add_constant("custom_obj"), "something else than a plain tensor"),
    (add_second_program, "unexpected member"),
    (add_compiled_library, "unexpected member"),
    (climb_out_of_the_archive, "unexpected member"),
    (code_as_a_guard, "guards"),
    (huge_power_as_a_size, "not plain arithmetic"),
    (attribute_as_the_name_of_an_input, "forward_arg_names"),
    (enum_as_a_structure, "structure"),
    (list_as_a_structure, "structure"),
    (metadata_of_a_node, "metadata"),
    (script_object, "script objects"),
    (operator_as_an_argument, "operator as an argument"),
    (weight_as_an_output_to_overwrite, "outlives a request"),
    (path_to_what_all_modules_share, "in parameter_name"),
    *(
        (insert_node(target, f=marker_path), "not an operator that a bundle may use")
        for target in (
            "torch.load",
            "torch.hub.load",
            "torch.ops.load_library",
            "torch.ops.aten.save.default",
            "torch.ops.aten.add.out",
            "torch.ops.aten.add.__setattr__",
            "torch.ops.aten.add.op",
            "torch.ops.aten.empty.memory_format",
            "torch.ops.aten.as_strided.default",
            "torch.ops.aten.set_.source_Storage",
            "torch.ops.aten.remainder.int",
            "torch.ops.higher_order.cond",
            "_operator.attrgetter",
            "_operator.methodcaller",
            "math.factorial",
            "#extension:evil",
        )
    ),
    (insert_node("torch.ops.aten.fill_.Scalar", self=weight, value=zero), "did not make"),
    (
        insert_node("torch.ops.aten.to.dtype", self=weight, dtype=zero, non_blocking=true),
        "non_blocking",
    ),
]


def names_of(attacks: list[tuple[Callable[[Members, Path], None], str]]) -> list[str]:
    return [attack.__name__ for attack, _ in attacks]


@pytest.mark.parametrize(("attack", "fault"), REFUSED, ids=names_of(REFUSED))
def test_attack_is_refused_before_it_runs(
    attack: Callable[[Members, Path], None], fault: str, folder: Path, marker: Path
) -> None:
    members = unpacked((folder / GRAPH).read_bytes())
    attack(members, marker)
    (folder / GRAPH).write_bytes(packed(members))

    error = refusal(folder)

    assert GRAPH in error.detail
    assert fault in text_of(error)
    assert not marker.exists()


@pytest.mark.parametrize(("attack", "_"), PROVEN, ids=names_of(PROVEN))
def test_attack_is_real_without_the_check(
    attack: Callable[[Members, Path], None], _: str, folder: Path, marker: Path
) -> None:
    members = unpacked((folder / GRAPH).read_bytes())
    attack(members, marker)

    run_unchecked(packed(members))

    assert marker.exists()


def test_guards_run_code_without_the_check(folder: Path, marker: Path) -> None:
    members = unpacked((folder / GRAPH).read_bytes())
    code_as_a_guard(members, marker)
    buffer = io.BytesIO()
    torch.save((INPUTS, {}), buffer)

    run_unchecked(packed(members | {SAMPLE_INPUTS: buffer.getvalue()}))  # guards need samples

    assert marker.exists()


def test_all_faults_of_a_program_are_listed(folder: Path, marker: Path) -> None:
    members = unpacked((folder / GRAPH).read_bytes())
    for attack in (code_as_a_guard, code_as_a_size, pickle_a_weight, read_a_file):
        attack(members, marker)

    with pytest.raises(BundleError) as caught:
        checked(packed(members))

    text = text_of(caught.value)
    for fault in ("guards", "not plain arithmetic", "than a plain tensor", "not an operator"):
        assert fault in text


def test_untouched_bundle_passes(folder: Path) -> None:
    bundle = open_bundle(folder)
    TorchEngine(bundle, bundle.manifest.graphs[0], "cpu").close()


# ---------------------------------------------------------------- what a graph writes into

FLOAT32 = {"as_scalar_type": 7}
WEIGHT, INPUT = "p_model_model_encoder_layers_0_self_attn_k_proj_weight", "decoder_input_ids"
BATCH = Batch(
    sources=Ragged.from_rows([[3, 1, 4], [1, 5]], np.int32),
    source_row=np.array([0, 1], np.int32),
    decoder_input_ids=Ragged.from_rows([[100, 7, 8], [100]], np.int32),
    labels=np.array([7, 8, 9, 2], np.int32),
    counted=np.ones(4, np.bool_),
)


def call(target: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """An operator of ATen with its arguments; a text names a tensor, `made` the last one made."""
    return f"torch.ops.aten.{target}", {
        name: {"as_tensor": {"name": value}} if isinstance(value, str) else value
        for name, value in arguments.items()
    }


def with_calls(archive: bytes, *calls: tuple[str, dict[str, Any]]) -> bytes:
    """The archive with calls in front of its own, whose last result nobody uses."""
    members = unpacked(archive)

    def change(program: Program) -> None:
        graph = graph_of(program)
        nodes, made = [], "made"
        for index, (target, arguments) in enumerate(calls):
            given = json.loads(json.dumps(arguments).replace('"made"', json.dumps(made)))
            made = f"made_{index}"
            graph["tensor_values"][made] = graph["tensor_values"]["source_ids"]
            inputs = [{"name": name, "arg": arg, "kind": None} for name, arg in given.items()]
            nodes.append(
                {
                    "target": target,
                    "inputs": inputs,
                    "outputs": [{"as_tensor": {"name": made}}],
                    "metadata": {},
                    "name": made,
                    "is_hop_single_tensor_return": None,
                }
            )
        graph["nodes"][:0] = nodes

    change_json(members, PROGRAM, change)
    return packed(members)


def einsum(equation: str, *operands: str) -> tuple[str, dict[str, Any]]:
    tensors = {"as_tensors": [{"name": name} for name in operands]}
    return call("einsum.default", equation={"as_string": equation}, tensors=tensors)


def losses_of(engine: TorchEngine) -> list[float]:
    return engine.score(BATCH).target_logprob.tolist()


WRITES = {
    "add_.Tensor": {"other": "made"},
    "add_.Scalar": {"other": {"as_int": 1}},
    "sub_.Tensor": {"other": INPUT},
    "sub_.Scalar": {"other": {"as_float": 0.5}},
    "mul_.Tensor": {"other": "made"},
    "mul_.Scalar": {"other": {"as_int": 2}},
    "div_.Tensor": {"other": "made"},
    "div_.Scalar": {"other": {"as_int": 2}},
    "div_.Tensor_mode": {"other": "made", "rounding_mode": {"as_string": "floor"}},
}
# What each of these returns lies in the memory of what it is given, or may.
PASSED_ON = {
    "to.dtype": call("to.dtype", self="made", dtype=FLOAT32),
    "to.dtype_layout": call("to.dtype_layout", self="made", dtype=FLOAT32),
    "to.other": call("to.other", self="made", other="made"),
    "contiguous": call("contiguous.default", self="made"),
    "type_as": call("type_as.default", self="made", other="made"),
}
VIEWS = {
    "alias": call("alias.default", self="made"),
    "detach": call("detach.default", self="made"),
    "detach_": call("detach_.default", self="made"),
    "view": call("view.default", self="made", size={"as_ints": [-1]}),
    "view_as": call("view_as.default", self="made", other="made"),
    "reshape": call("reshape.default", self="made", shape={"as_ints": [-1]}),
    "flatten": call("flatten.using_ints", self="made"),
    "expand_as": call("expand_as.default", self="made", other="made"),
    "t": call("t.default", self="made"),
    "transpose": call("transpose.int", self="made", dim0={"as_int": 0}, dim1={"as_int": 1}),
    "permute": call("permute.default", self="made", dims={"as_ints": [1, 0]}),
    "numpy_T": call("numpy_T.default", self="made"),
    "select": call("select.int", self="made", dim={"as_int": 0}, index={"as_int": 0}),
    "slice": call("slice.Tensor", self="made"),
    "squeeze": call("squeeze.default", self="made"),
    "unsqueeze": call("unsqueeze.default", self="made", dim={"as_int": 0}),
    "dropout": call("dropout.default", input="made", p={"as_float": 0.5}, train={"as_bool": False}),
    "einsum_of_one": einsum("ab", "made"),
}


def begun_with(name: str, *calls: tuple[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The first of the calls is given a tensor of the graph."""
    target, arguments = calls[0]
    return [(target, json.loads(json.dumps(arguments).replace('"made"', f'"{name}"'))), *calls[1:]]


@pytest.fixture
def archive(generic_bundle: Bundle) -> bytes:
    return (generic_bundle.folder / GRAPH).read_bytes()


@pytest.mark.parametrize("name", [WEIGHT, INPUT])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_into_a_weight_or_an_input_is_refused(
    write: str, name: str, archive: bytes
) -> None:
    operator = write.partition(".")[0]
    calls = begun_with(name, call(write, self="made", **WRITES[write]))
    with pytest.raises(BundleError) as caught:
        checked(with_calls(archive, *calls))
    assert f"writes with {operator!r} into what the graph did not make" in text_of(caught.value)


@pytest.mark.parametrize("between", PASSED_ON | VIEWS)
def test_a_write_into_what_may_be_a_weight_is_refused(between: str, archive: bytes) -> None:
    write = call("add_.Scalar", self="made", other={"as_int": 1})
    calls = begun_with(WEIGHT, (PASSED_ON | VIEWS)[between], write)
    with pytest.raises(BundleError):
        checked(with_calls(archive, *calls))


@pytest.mark.parametrize("between", PASSED_ON)
def test_what_is_passed_on_twice_is_no_newer(between: str, archive: bytes) -> None:
    calls = begun_with(
        WEIGHT,
        VIEWS["alias"],
        PASSED_ON[between],
        PASSED_ON["to.dtype"],
        call("add_.Scalar", self="made", **WRITES["add_.Scalar"]),
    )
    with pytest.raises(BundleError, match="cannot be trusted"):
        checked(with_calls(archive, *calls))


@pytest.mark.parametrize("between", ["to.dtype", "alias", "einsum_of_one"])
def test_such_writes_are_real_without_the_check(
    between: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request changes the weights, and with them the losses of the next one."""
    passed_on = (PASSED_ON | VIEWS)[between]
    calls = begun_with(WEIGHT, passed_on, call("mul_.Scalar", self="made", other={"as_int": -2}))
    (folder / GRAPH).write_bytes(with_calls((folder / GRAPH).read_bytes(), *calls))
    reseal(folder)
    monkeypatch.setattr(reader, "checked", lambda content: content)
    # Where weights are laid out anew the write hits what nothing reads; as on a GPU they are not.
    monkeypatch.setattr(cpu_linear, "is_available", lambda _: False)
    bundle = open_bundle(folder)
    engine = TorchEngine(bundle, bundle.manifest.graphs[0], "cpu")
    assert losses_of(engine) != losses_of(engine)


FRESH = {
    "lift_fresh_copy": [call("lift_fresh_copy.default", self=WEIGHT)],
    "einsum": [einsum("ab,cb->ac", WEIGHT, WEIGHT)],
    "clone, passed on": [call("clone.default", self=WEIGHT), *PASSED_ON.values()],
}


INTO_THE_FRESH = [
    call("add_.Scalar", self="made", other={"as_int": 1}),
    call("mul_.Scalar", self="made", other={"as_int": -2}),
    call("sub_.Tensor", self="made", other="made"),
    call("div_.Scalar", self="made", other={"as_int": 3}),
]


@pytest.mark.parametrize("fresh", FRESH)
def test_a_write_into_what_the_graph_made_passes(fresh: str, archive: bytes) -> None:
    checked(with_calls(archive, *FRESH[fresh], *INTO_THE_FRESH))


def test_writes_into_what_the_graph_made_change_no_weight(folder: Path) -> None:
    bundle = open_bundle(folder)
    untouched = TorchEngine(bundle, bundle.manifest.graphs[0], "cpu")
    writes = [one for fresh in FRESH.values() for one in (*fresh, *INTO_THE_FRESH)]
    (folder / GRAPH).write_bytes(with_calls((folder / GRAPH).read_bytes(), *writes))
    reseal(folder)
    bundle = open_bundle(folder)
    engine = TorchEngine(bundle, bundle.manifest.graphs[0], "cpu")
    assert losses_of(engine) == losses_of(engine) == losses_of(untouched)


def test_writing_into_the_fresh_does_not_let_a_view_of_a_weight_pass(archive: bytes) -> None:
    """Neither an operand that is new nor a name that was used before makes a tensor new."""
    write = call("add_.Scalar", self="made", other={"as_int": 1})
    clone = call("clone.default", self=WEIGHT)
    for view in (
        call("type_as.default", self=WEIGHT, other="made"),
        call("to.other", self=WEIGHT, other="made"),
        call("view_as.default", self=WEIGHT, other="made"),
    ):
        with pytest.raises(BundleError) as caught:
            checked(with_calls(archive, clone, view, write))
        assert "writes with 'add_'" in text_of(caught.value)


def test_a_name_is_made_once(folder: Path) -> None:
    """Were a name made anew and then a view's, a write into the view would pass for one into it."""
    write = call("mul_.Scalar", self="made_0", other={"as_int": -2})
    archive = with_calls(
        (folder / GRAPH).read_bytes(),
        call("clone.default", self=WEIGHT),
        call("alias.default", self=WEIGHT),
        write,
    )
    members = unpacked(archive)

    def rename(program: Program) -> None:
        alias = graph_of(program)["nodes"][1]
        alias["outputs"] = [{"as_tensor": {"name": "made_0"}}]

    change_json(members, PROGRAM, rename)
    (folder / GRAPH).write_bytes(packed(members))
    refusal(folder)


# ---------------------------------------------------------------- texts that operators are given


@pytest.mark.parametrize("equation", ["ab,cb->ac", "ab,ab->a", "abcd,ecd->abe"])
def test_an_equation_of_two_operands_passes(equation: str, archive: bytes) -> None:
    checked(with_calls(archive, einsum(equation, WEIGHT, WEIGHT)))


def test_an_equation_stays_a_text(archive: bytes) -> None:
    equation = "...ab,cb->...ac"
    passed = checked(with_calls(archive, einsum(equation, WEIGHT, WEIGHT)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = torch.export.load(io.BytesIO(passed)).graph_module.code
    assert f"einsum.default({equation!r}, " in source
    assert source.count(equation) == 1


@pytest.mark.parametrize(
    "equation",
    [
        "ab",  # of one operand: a view of it
        "",
        "a",
        "ab->ba",
        "...ab->...ba",
        "ab,bc",
        "ab,bc->",
        "ab,bc,cd->ad",
        "ab,cb->ac\n",
        "ab,\ncb->ac",
        "\nab,cb->ac",
        "ab, cb -> ac",
        "AB,CB->AC",
        "ab,c.b->ac",
        "ab,cb->ac'",
        "ab,cb->ac);exec(1",
        "__import__('os')",
        "__import__",
        "é,b->b",
        "abcdefghi,b->b",
    ],
)
def test_another_equation_is_refused(equation: str, archive: bytes) -> None:
    with pytest.raises(BundleError):
        checked(with_calls(archive, einsum(equation, WEIGHT)))


@pytest.mark.parametrize(
    "text",
    ["a.b", "a,b", "a->b", "...", "torch.load", "a,b->c,d", "a,b->c.d", "a,b->c ", "a,b->c\n", "'"],
)
def test_a_text_argument_carries_no_punctuation_but_an_equation(text: str, archive: bytes) -> None:
    divided = call("div.Tensor_mode", self=WEIGHT, other=WEIGHT, rounding_mode={"as_string": text})
    with pytest.raises(BundleError) as caught:
        checked(with_calls(archive, divided))
    assert "in as_string" in text_of(caught.value)


@pytest.mark.parametrize("place", ["name", "as_tensor", "class_fqn", "as_strings"])
def test_an_equation_is_a_text_in_no_other_place(place: str, archive: bytes) -> None:
    members = unpacked(archive)
    change_json(
        members, PROGRAM, lambda program: graph_of(program)["nodes"][0].update({place: "a,b->c"})
    )
    with pytest.raises(BundleError) as caught:
        checked(packed(members))
    assert f"has the text 'a,b->c' in {place}" in text_of(caught.value)


def padding(mode: str, *sizes: int) -> list[tuple[str, dict[str, Any]]]:
    """Pads zeros of the shape (1, 2, 8)."""
    zeros = call(
        "zeros.default",
        size={"as_ints": [1, 2, 8]},
        dtype=FLOAT32,
        device={"as_device": {"type": "cpu", "index": None}},
    )
    return [
        zeros,
        call("pad.default", self="made", pad={"as_ints": list(sizes)}, mode={"as_string": mode}),
    ]


def test_padding_with_a_constant_passes(archive: bytes) -> None:
    checked(with_calls(archive, *padding("constant", 1, 2)))


def test_padding_in_circles_is_refused(archive: bytes) -> None:
    """It copies memory that nobody wrote: what other requests had left there could be read."""
    with pytest.raises(BundleError):
        checked(with_calls(archive, *padding("circular", 8, -7)))


def test_padding_in_circles_reads_what_nobody_wrote() -> None:
    """Torch fills new memory with NaN where it is asked to be deterministic."""
    torch.use_deterministic_algorithms(mode=True)
    try:
        read = torch.ops.aten.pad.default(torch.zeros(1, 2, 8), [8, -7], "circular")
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert read.isnan().any()


# ---------------------------------------------------------------- the archive


def duplicate_member(archive: bytes) -> bytes:
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(f"archive/{PROGRAM}", b"{}")
    return buffer.getvalue()


def second_root(archive: bytes) -> bytes:
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr(f"other/{PROGRAM}", b"{}")
    return buffer.getvalue()


def flag_as_encrypted(archive: bytes) -> bytes:
    start = archive.index(b"PK\x01\x02")
    return archive[: start + 8] + b"\x01" + archive[start + 9 :]


def overlapping_members(archive: bytes) -> bytes:
    """Each member claims the bytes of the largest one."""
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
        for index in range(8):
            file.filelist.append(copy(largest))
            file.filelist[-1].filename = f"archive/{index}"
        file._didModify = True  # type: ignore[attr-defined]
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda archive: packed(unpacked(archive), zipfile.ZIP_DEFLATED), "compressed"),
        (duplicate_member, "same name"),
        (second_root, "same name"),
        (overlapping_members, "overlap"),
        (flag_as_encrypted, "not a ZIP archive"),
        (lambda archive: archive[:-100], "not a ZIP archive"),
        (lambda archive: archive[: len(archive) // 2], "not a ZIP archive"),
        (lambda archive: b"", "not a ZIP archive"),
        (lambda archive: packed({}), "lacks"),
        (lambda archive: packed(unpacked(archive) | {PROGRAM: b"{"}), "not JSON"),
        (lambda archive: packed(unpacked(archive) | {PROGRAM: b"[" * 100_000}), "not JSON"),
        (lambda archive: packed(unpacked(archive) | {PROGRAM: b"[]"}), "not the program"),
        (lambda archive: packed(unpacked(archive) | {WEIGHTS: b"[]"}), "malformed list"),
    ],
    ids=[
        "compressed",
        "duplicate_member",
        "second_root",
        "overlapping_members",
        "encrypted",
        "without_its_end",
        "half",
        "empty",
        "without_members",
        "program_is_not_json",
        "program_is_nested_too_deeply",
        "program_is_a_list",
        "weights_are_a_list",
    ],
)
def test_archive_is_refused(change: Callable[[bytes], bytes], fault: str, folder: Path) -> None:
    archive = (folder / GRAPH).read_bytes()
    (folder / GRAPH).write_bytes(change(archive))
    assert fault in text_of(refusal(folder))


# ---------------------------------------------------------------- the folder


def link_a_file(folder: Path) -> None:
    outside = folder.with_name("outside")
    (folder / WEIGHTS_NAME).rename(outside)
    (folder / WEIGHTS_NAME).symlink_to(outside)


def link_a_folder(folder: Path) -> None:
    outside = folder.with_name("outside")
    (folder / "graphs").rename(outside)
    (folder / "graphs").symlink_to(outside, target_is_directory=True)


def link_the_manifest(folder: Path) -> None:
    outside = folder.with_name("outside")
    (folder / MANIFEST_NAME).rename(outside)
    (folder / MANIFEST_NAME).symlink_to(outside)


def add_a_file(folder: Path) -> None:
    (folder / "graphs" / ".hidden").write_text("unlisted")


def remove_a_file(folder: Path) -> None:
    (folder / GRAPH).unlink()


def change_a_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS_NAME).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(content)


def replace_a_file_by_a_folder(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    (folder / WEIGHTS_NAME).mkdir()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (link_a_file, f"{WEIGHTS_NAME!r} is a link"),
        (link_a_folder, "'graphs' is a link"),
        (link_the_manifest, f"has no {MANIFEST_NAME}"),
        (add_a_file, "'graphs/.hidden' is not listed"),
        (remove_a_file, f"{GRAPH!r} is missing"),
        (change_a_byte, "its digest differs"),
        (replace_a_file_by_a_folder, f"{WEIGHTS_NAME!r} is a folder"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_folder_other_than_the_manifest_says_is_refused(
    change: Callable[[Path], None], fault: str, folder: Path
) -> None:
    change(folder)
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert fault in text_of(caught.value)


def test_all_faults_of_a_folder_are_listed(folder: Path) -> None:
    for change in (add_a_file, remove_a_file, change_a_byte):
        change(folder)
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert len(caught.value.faults) == 3


def test_graph_that_changes_after_the_bundle_was_opened_is_refused(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / GRAPH).write_bytes(b"another")
    with pytest.raises(BundleError, match="changed while it was read"):
        bundle.graph_archive(bundle.manifest.graphs[0])


# ---------------------------------------------------------------- the manifest


def change_manifest(folder: Path, change: Callable[[Any], None]) -> BundleError:
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    change(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    return caught.value


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../outside", "graphs/../../outside", "a//b", "a\\b", ".", "", "./a"]
)
def test_path_out_of_the_bundle_is_refused(path: str, folder: Path) -> None:
    (folder.with_name("outside")).write_text("secret")

    def change(manifest: Any) -> None:
        manifest["files"][path] = manifest["files"][WEIGHTS_NAME]
        manifest["graphs"][0]["folder"] = path

    error = change_manifest(folder, change)
    assert text_of(error).count("is not a path inside the bundle") == 2


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_other_schema_version_names_the_command(version: Any, folder: Path) -> None:
    error = change_manifest(folder, lambda manifest: manifest.update(schema_version=version))
    assert "seqloss export CHECKPOINT --output" in error.detail


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_file_that_is_no_manifest_is_refused(content: bytes, folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BundleError, match="is not a manifest"):
        open_bundle(folder)


def test_all_faults_of_a_manifest_are_listed(folder: Path) -> None:
    def change(manifest: Any) -> None:
        del manifest["family"]
        manifest["unknown"] = 1
        manifest["max_source_tokens"] = "many"
        manifest["vocabulary"]["classes"] = 10**18

    faults = text_of(change_manifest(folder, change))
    for field in ("family", "unknown", "max_source_tokens", "vocabulary.classes"):
        assert f"{field}: " in faults


def test_graph_without_files_is_refused(folder: Path) -> None:
    error = change_manifest(
        folder, lambda manifest: manifest["graphs"][0].update(folder="graphs/none")
    )
    assert f"graphs/none/{BODY_GRAPH} is not listed" in text_of(error)


@pytest.mark.parametrize(
    ("section", "change", "fault"),
    [
        ("vocabulary", {"excluded_classes": [[0, 10**6]]}, "classes that do not exist"),
        ("vocabulary", {"excluded_classes": [[0, 100]]}, "every class is excluded"),
        ("vocabulary", {"classes": 5}, "ids that the output projection does not"),
        ("special_ids", {"pad": 10**6}, "special_ids.pad is not in the vocabulary"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(
    section: str, change: dict[str, Any], fault: str, folder: Path
) -> None:
    error = change_manifest(folder, lambda manifest: manifest[section].update(change))
    assert fault in text_of(error)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"target_ids": [[1, 10**6]]}, "self_test.target_ids are not in the vocabulary"),
        ({"target_ids": [[1, 2**70]]}, "self_test.target_ids are not in the vocabulary"),
        ({"source_ids": [[101]]}, "self_test.source_ids are not in the vocabulary"),
        ({"source_index": [1]}, "sources that do not exist"),
        ({"source_index": [0, 0]}, "one source and one nll per token"),
        ({"token_nlls": [[1.0]]}, "one source and one nll per token"),
        ({"token_nlls": [[1.0, 1.0], [1.0]]}, "one source and one nll per token"),
        ({"source_ids": [[]]}, "sequences without tokens"),
        ({"source_ids": [[1] * 2000]}, "a source of 2000 tokens, and at most "),
        ({"target_ids": [[1] * 999], "token_nlls": [[1.0] * 999]}, "a target of 999 tokens"),
        ({"target_ids": [[]], "token_nlls": [[]]}, "sequences without tokens"),
    ],
)
def test_a_self_test_of_what_there_is_not_is_refused(
    change: dict[str, Any], fault: str, folder: Path
) -> None:
    """Its pairs go straight to the engine."""
    test = {
        "source_ids": [[1, 2]],
        "source_index": [0],
        "target_ids": [[1, 2]],
        "token_nlls": [[1.0, 1.0]],
    }
    error = change_manifest(folder, lambda manifest: manifest["self_test"].update(test | change))
    assert fault in text_of(error)


def test_a_self_test_of_an_excluded_class_is_refused(folder: Path) -> None:
    def change(manifest: Any) -> None:
        target = manifest["self_test"]["target_ids"][0]
        manifest["vocabulary"]["excluded_classes"] = [[target[0], target[0]]]

    assert "of excluded classes" in text_of(change_manifest(folder, change))
