"""Makes a packed graph's program a module, without `torch.export.load`.

A packed graph calls few operators on tensors of plain sizes: its JSON is a list of calls, and to
read it takes milliseconds. Torch's own reader is made for all that programs may be, brings its
compiler along, and takes some two seconds.
"""

from __future__ import annotations

import io
import json
import operator
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from seqloss.bundle.graph_archive import PROGRAM
from seqloss.errors import BundleError
from seqloss.model import operators as _operators  # noqa: F401 - registers those of packed graphs

# Of the form that Torch writes programs in; another one may mean other things by the same names.
_SCHEMA_MAJOR = 8
# Torch's numbers of dtypes in that form (`torch._export.serde.schema.ScalarType`).
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_PLAIN = frozenset({"as_int", "as_bool", "as_string", "as_ints"})
# What export noted of dtypes and devices: computes nothing.
_NOTES = frozenset({"torch.ops.aten._assert_tensor_metadata.default"})

# A weight by its name, in a dtype.
Weights = Callable[[str, torch.dtype], Tensor]


def module_of(archive: bytes, weights: Weights, inputs: tuple[str, ...]) -> GraphModule:
    """The program as a module that takes tensors in order and returns one.

    Its calls of operators have all arguments that the program gives in their order; `meta["width"]`
    of a tensor's node is its last size, or None where that differs from batch to batch.

    Args:
        archive: a program that passed `seqloss.bundle.graph_archive.checked`.
        weights: where its parameters are.
        inputs: what it must take.

    Raises:
        BundleError: it takes other inputs, its weights have other sizes, or it says something that
            no packed graph does.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        program = json.loads(file.read(f"archive/{PROGRAM}"))
    version = program["schema_version"]["major"]
    if version != _SCHEMA_MAJOR:
        raise BundleError(
            f"a graph is written in version {version} of Torch's form, and this seqloss reads "
            f"{_SCHEMA_MAJOR}: export the checkpoint again with the Torch that is installed here"
        )
    reading = _Reading(program["graph_module"], weights)
    if reading.inputs != inputs:
        raise BundleError(f"a graph takes {list(reading.inputs)}, not {list(inputs)}")
    return reading.module()


class _Reading:
    """One program while it is read."""

    def __init__(self, program: Mapping[str, Any], weights: Weights) -> None:
        self._program = program["graph"]
        self._sizes: Mapping[str, Any] = self._program["tensor_values"]
        self._weights = weights
        self._tensors: dict[str, Tensor] = {}
        self._graph = Graph()
        self._nodes: dict[str, Node] = {}
        self.inputs = tuple(self._take(program["signature"]["input_specs"]))

    def _take(self, specs: list[dict[str, Any]]) -> Iterator[str]:
        """Makes nodes of weights and of inputs, and yields the names of the latter."""
        for spec in specs:
            match spec:
                case {"parameter": {"arg": {"name": name}, "parameter_name": path}}:
                    # Not by its path: a stranger's could lead to what all modules share.
                    own = f"weight_{len(self._tensors)}"
                    self._tensors[own] = self._weight(path, self._sizes[name])
                    self._note(name, self._graph.get_attr(own))
                case {"user_input": {"arg": {"as_tensor": {"name": name}}}}:
                    self._note(name, self._graph.placeholder(name))
                    yield name
                case _:
                    raise BundleError(f"a packed graph takes {str(spec)[:80]!r}")

    def _weight(self, path: str, described: Mapping[str, Any]) -> Tensor:
        weight = self._weights(path, _dtype(described["dtype"]))
        sizes = [size.get("as_int") for size in described["sizes"]]
        if list(weight.shape) != sizes:
            raise BundleError(
                f"the weight {path!r} has the sizes {list(weight.shape)}, and the graph takes "
                f"{sizes}"
            )
        return weight

    def _note(self, name: str, node: Node) -> None:
        if name in self._nodes:
            raise BundleError(f"a graph makes {name!r} twice")
        sizes = self._sizes[name]["sizes"]
        node.meta["width"] = sizes[-1].get("as_int") if sizes else None
        self._nodes[name] = node

    def module(self) -> GraphModule:
        """All calls in their order, and the result."""
        for call in self._program["nodes"]:
            if call["target"] not in _NOTES:
                self._call(call)
        match self._program["outputs"]:
            case [{"as_tensor": {"name": name}}]:
                self._graph.output(self._nodes[name])
            case outputs:
                raise BundleError(f"a packed graph returns {str(outputs)[:80]!r}")
        self._graph.lint()
        return GraphModule(self._tensors, self._graph)

    def _call(self, call: Mapping[str, Any]) -> None:
        target = _operator(call["target"])
        schema = target._schema
        given = {one["name"]: self._argument(one["arg"]) for one in call["inputs"]}
        if unknown := given.keys() - {argument.name for argument in schema.arguments}:
            raise BundleError(f"gives {call['target']} the unknown {sorted(unknown)}")
        arguments: list[Any] = []
        named: dict[str, Any] = {}
        is_in_order = True
        for argument in schema.arguments:
            is_in_order = is_in_order and argument.name in given and not argument.kwarg_only
            if is_in_order:
                arguments.append(given[argument.name])
            elif argument.name in given:
                named[argument.name] = given[argument.name]
        node = self._graph.call_function(target, tuple(arguments), named)
        returns = [str(one.type) for one in schema.returns]
        match returns, call["outputs"]:
            case ["Tensor"], [{"as_tensor": {"name": name}}]:
                self._note(name, node)
            case ["List[Tensor]"], [{"as_tensors": made}]:
                self._note_parts(node, made)
            case [_, _, *_], made if len(made) == len(returns) and set(returns) == {"Tensor"}:
                self._note_parts(node, [one["as_tensor"] for one in made])
            case _, made:
                raise BundleError(f"{call['target']} makes {str(made)[:80]!r}")

    def _note_parts(self, node: Node, made: list[dict[str, str]]) -> None:
        for place, one in enumerate(made):
            self._note(one["name"], self._graph.call_function(operator.getitem, (node, place)))

    def _argument(self, argument: Mapping[str, Any]) -> Any:
        ((kind, value),) = argument.items()
        match kind:
            case "as_tensor":
                return self._nodes[value["name"]]
            case "as_tensors":
                return [self._nodes[one["name"]] for one in value]
            case "as_scalar_type":
                return _dtype(value)
            case "as_float":  # JSON has no infinity, which is a text there
                return float(value)
            case "as_none":
                return None
            case _ if kind in _PLAIN:
                return value
        raise BundleError(f"a packed graph has an argument of the kind {kind!r}")


def _operator(name: str) -> Any:
    *_, namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _dtype(number: int) -> torch.dtype:
    if number not in _DTYPES:
        raise BundleError(f"a packed graph has no use for Torch's dtype number {number}")
    return _DTYPES[number]
