"""What a stranger's exported program may contain: an allow-list over its JSON.

A text may only stand where it cannot become code, an operator may only compute on what it is given,
and a run may leave nothing behind.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

# Anything that could be Python source needs a character that is not in here. Dots would make a
# name in the generated source an attribute to assign, so names of nodes and inputs have none.
_NAME = re.compile(r"[A-Za-z0-9_]{0,256}")
_EQUATION = re.compile(r"(\.{3})?[a-z]{1,8},(\.{3})?[a-z]{1,8}->(\.{3})?[a-z]{1,8}")  # of einsum
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_.+\-]{0,256}")
_PLACES_OF_PLAIN_TEXT = frozenset({"torch_version", "as_float"})  # "-Infinity" is a float
# Of weights and modules: attributes, none of which is one that Python gives to every object.
_PATH = re.compile(r"((?!__)[A-Za-z0-9_]+(\.(?!__)[A-Za-z0-9_]+)*)?")
_LONGEST_PATH = 256
_PLACES_OF_PATHS = frozenset({"parameter_name", "buffer_name", "fqn"})

# `sympify` drops line breaks before it parses. Without these, backslashes and comments, it reads
# the same expression as `ast.parse`.
_EXPRESSION = re.compile(r"[A-Za-z0-9_ (),='\-]{1,4096}")

_SYMBOLIC_FUNCTIONS = frozenset(
    """
    Symbol Integer Rational Add Mul Pow Min Max Mod PythonMod FloorDiv CeilDiv CleanDiv
    ModularIndexing IntTrueDiv Eq Ne Lt Le Gt Ge
    """.split()
)
_SYMBOL_ASSUMPTIONS = frozenset({"integer", "positive", "nonnegative"})
_LARGEST_SYMBOLIC_CONSTANT = 2**40
_LARGEST_SYMBOLIC_POWER = 4

# Functions of tensors and numbers alone. Nothing here touches a file (as aten.from_file does), a
# process, or memory outside its arguments.
_ATEN = frozenset(
    """
    _assert_tensor_metadata __and__ __or__ _to_copy abs add add_ addmm alias all any arange argmax
    baddbmm bitwise_and bitwise_not bitwise_or bmm cat chunk clamp clamp_max clamp_min clone
    concat contiguous conv1d cos cumsum detach_ detach div div_ dropout einsum embedding eq erf
    exp expand expand_as expm1 fill fill_ flatten floor floor_divide full full_like gather ge gelu
    gt index index_add index_select layer_norm le lift_fresh_copy linear log log1p log_softmax
    logical_and logical_not logical_or logsumexp lt masked_fill masked_fill_ matmul max maximum
    mean min minimum mm mul mul_ ne neg new_full new_ones new_zeros numpy_T ones ones_like pad
    permute pow relu relu_ remainder repeat reshape rms_norm rsqrt rsub scalar_tensor
    scaled_dot_product_attention scatter scatter_ select sigmoid silu silu_ sin slice softmax
    softplus split split_with_sizes sqrt squeeze stack sub sub_ sum sym_numel sym_size sym_stride
    t tanh to transpose tril triu type_as unbind unflatten unsqueeze view view_as where zeros
    zeros_like
    """.split()
)
# An operator's other attributes are its variants that write into an `out`, TorchScript's of texts
# and lists, and plain methods such as `__setattr__`.
_OVERLOADS = frozenset(
    """
    default Tensor Scalar Tensor_mode Scalar_mode Tensor_Scalar Tensor_Tensor Scalar_Tensor
    ScalarSelf ScalarOther self other src value int dim dims dim_IntList dtype dtype_layout device
    padding sizes start start_step using_ints a
    """.split()
)
# What these return is a new tensor, so that a graph may write into it. Any other may be a weight,
# where one request would leave something behind for the next one to read.
_NEW = frozenset(
    """
    add addmm arange baddbmm bmm cat clone conv1d div einsum embedding full full_like gelu
    index_select layer_norm lift_fresh_copy linear matmul mm mul neg new_full new_ones new_zeros
    ones ones_like relu rms_norm scatter silu softmax stack sub tanh where zeros zeros_like
    """.split()
)
# What these return is new where what they are given is.
_PASS_ON = frozenset({"contiguous", "to", "type_as"})
_IN_PLACE = frozenset("add_ div_ fill_ masked_fill_ mul_ relu_ scatter_ silu_ sub_".split())
_NOT_GIVEN = {"as_none": True}
_FLOOR = {"as_string": "floor"}
_ROUNDINGS = (_FLOOR, _NOT_GIVEN)
_OPERATOR = frozenset(
    """
    add eq floordiv ge getitem gt le lt mod mul ne neg pow sub
    """.split()
)
# Those of packed graphs, in seqloss.model.operators.
_OURS = frozenset("attention linear linear_add norm".split())
_TORCH = frozenset({"sym_ite", "sym_max", "sym_min", "sym_not"})


def program_faults(program: Any) -> list[str]:
    """Everything for which a program is refused.

    Args:
        program: the parsed `models/model.json` of a `torch.export` archive.
    """
    faults: list[str] = []
    try:
        _walk(program, "program", faults)
        return faults + _effect_faults(program["graph_module"])
    except RecursionError:
        return ["is nested more deeply than any program"]
    except (KeyError, TypeError, AttributeError):
        return [*faults, "is not the program of a graph"]


def _effect_faults(module: dict[str, Any]) -> list[str]:
    """A graph may change nothing that outlives its run, and read nothing before it is written."""
    faults = [
        f"writes {str(spec)[:80]!r}, which outlives a request"
        for spec in module["signature"]["output_specs"]
        if spec.keys() != {"user_output"}
    ]
    new: set[str] = set()
    for node in module["graph"]["nodes"]:
        operator = str(node["target"]).removeprefix("torch.ops.aten.").partition(".")[0]
        given = {argument["name"]: argument["arg"] for argument in node["inputs"]}
        faults += _argument_faults(operator, given)
        on_new = given.get("self", {}).get("as_tensor", {}).get("name") in new
        if operator in _IN_PLACE and not on_new:
            faults.append(f"writes with {operator!r} into what the graph did not make")
        if operator in _IN_PLACE | _NEW or (operator in _PASS_ON and on_new):
            new |= {
                output["as_tensor"]["name"] for output in node["outputs"] if "as_tensor" in output
            }
    return faults


def _argument_faults(operator: str, given: dict[str, Any]) -> list[str]:
    """What an allowed operator may still not be told to do."""
    faults = [
        f"moves a tensor by {name}, which leaves memory of others to be read"
        for name in ("non_blocking", "pin_memory")
        if given.get(name, _NOT_GIVEN) not in ({"as_bool": False}, _NOT_GIVEN)
    ]
    if operator == "einsum":
        # With one operand, or without an arrow, its result may be a view of a weight.
        equation = given["equation"].get("as_string", "")
        if not _EQUATION.fullmatch(equation) or len(given["tensors"].get("as_tensors", ())) != 2:
            faults.append(f"has an einsum {equation[:80]!r}, which is not one of two operands")
    elif any(_EQUATION.fullmatch(text.get("as_string", "")) for text in given.values()):
        faults.append(f"gives {operator!r} an equation")
    if operator == "pad" and given["mode"] != {"as_string": "constant"}:
        # Padding in circles copies memory that nobody wrote, where one side is cut off.
        faults.append("pads with something else than a constant")
    if operator in ("div", "div_") and given.get("rounding_mode", _FLOOR) not in _ROUNDINGS:
        # Truncating the least integer by -1 ends the process.
        faults.append("rounds a quotient towards 0")
    return faults


def _walk(value: Any, place: str, faults: list[str]) -> None:
    """Every text of the program must be of a kind that cannot become code."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not _PLAIN_TEXT.fullmatch(key):
                faults.append(f"has the name {key[:80]!r} in {place}")
            check = _CHECKS.get(key)
            if check is None:
                _walk(item, key, faults)
            elif fault := check(item):
                faults.append(fault)
    elif isinstance(value, list):
        for item in value:
            _walk(item, place, faults)
    elif isinstance(value, str) and not _is_plain(place, value):
        faults.append(f"has the text {value[:80]!r} in {place}")


def _is_plain(place: str, text: str) -> bool:
    # Which operator it belongs to is seen to by `_argument_faults`.
    if place == "as_string" and _EQUATION.fullmatch(text):
        return True
    if place in _PLACES_OF_PATHS:
        return len(text) <= _LONGEST_PATH and _PATH.fullmatch(text) is not None
    return (_PLAIN_TEXT if place in _PLACES_OF_PLAIN_TEXT else _NAME).fullmatch(text) is not None


def _operator_fault(target: Any) -> str | None:
    match target.split(".") if isinstance(target, str) else ():
        case ["torch", "ops", "aten", "remainder", "int" | "default"]:
            pass  # of two numbers; ends the process where the second is 0
        case ["torch", "ops", "aten", name, overload] if name in _ATEN and overload in _OVERLOADS:
            return None
        case ["torch", "ops", "seqloss", name, "default"] if name in _OURS:
            return None
        case ["_operator", name] if name in _OPERATOR:
            return None
        case ["torch", name] if name in _TORCH:
            return None
    return f"calls {str(target)[:80]!r}, which is not an operator that a bundle may use"


def _expression_fault(text: Any) -> str | None:
    try:
        if _EXPRESSION.fullmatch(text) and _is_symbolic(ast.parse(text, mode="eval").body):
            return None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    return f"has the size {str(text)[:80]!r}, which is not plain arithmetic on symbols"


def _is_symbolic(node: ast.expr) -> bool:
    match node:
        case ast.Call(ast.Name("Symbol"), [ast.Constant(str(name))], keywords):
            return _NAME.fullmatch(name) is not None and all(
                keyword.arg in _SYMBOL_ASSUMPTIONS
                and isinstance(keyword.value, ast.Constant)
                and isinstance(keyword.value.value, bool)
                for keyword in keywords
            )
        case ast.Call(ast.Name("Pow"), [base, ast.Call(ast.Name("Integer"), [power], [])], []):
            return _is_symbolic(base) and _is_constant(power, _LARGEST_SYMBOLIC_POWER)
        case ast.Call(ast.Name("Pow")):
            return False
        case ast.Call(ast.Name(name), arguments, []) if name in _SYMBOLIC_FUNCTIONS:
            return all(map(_is_symbolic, arguments))
    return _is_constant(node, _LARGEST_SYMBOLIC_CONSTANT)


def _is_constant(node: ast.expr, largest: int) -> bool:
    match node:
        case ast.UnaryOp(ast.USub(), ast.Constant(int(number))) | ast.Constant(int(number)):
            return abs(number) <= largest
    return False


def _structure_fault(text: Any) -> str | None:
    """The nesting of inputs and outputs may consist of tuples, lists and dicts only."""
    try:
        version, tree = json.loads(text)
        if version == 1 and _is_plain_structure(tree):
            return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return f"has inputs or outputs of the structure {str(text)[:80]!r}"


def _is_plain_structure(tree: dict[str, Any]) -> bool:
    plain = {"builtins.tuple": "null", "builtins.list": "null", "builtins.dict": "[]", None: None}
    return (
        tree.keys() == {"type", "context", "children_spec"}
        and tree["type"] in plain
        and tree["context"] == plain[tree["type"]]
        and all(map(_is_plain_structure, tree["children_spec"]))
    )


def _must_be_empty(what: str) -> Callable[[Any], str | None]:
    return lambda value: f"carries {what}" if value else None


def _refused(what: str) -> Callable[[Any], str | None]:
    return lambda _: f"carries {what}"


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "target": _operator_fault,
    "expr_str": _expression_fault,
    "in_spec": _structure_fault,
    "out_spec": _structure_fault,
    "guards_code": _must_be_empty("guards, which are Python source"),
    "metadata": _must_be_empty("metadata of nodes or modules"),
    "custom_obj_values": _must_be_empty("script objects"),
    "treespec_namedtuple_fields": _must_be_empty("named tuples"),
    "as_custom_obj": _refused("a script object"),
    "as_graph": _refused("a nested graph"),
    "as_operator": _refused("an operator as an argument"),
}
