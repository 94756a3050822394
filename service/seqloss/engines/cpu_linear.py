"""Linear layers on a CPU: weights laid out once, activations fused.

oneDNN multiplies blocks, and reorders a weight for that in every call unless it is given one that
was reordered before. Torch's own compiler does the same with the same operators; what needs no
compiler is done here, to the graph as it was exported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

_ATEN: Any = torch.ops.aten
_ONEDNN: Any = torch.ops.mkldnn

# What oneDNN computes together with a product, by its name for it.
_FUSED: dict[Any, str] = {_ATEN.silu.default: "swish", _ATEN.relu.default: "relu"}
# Weights are laid out for about so many rows at a time; others work as well.
_ROWS = 1024


def is_available(dtype: torch.dtype) -> bool:
    """Whether this build of Torch and this CPU multiply in the dtype with oneDNN."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if dtype == torch.bfloat16:
        return built and bool(_ONEDNN._is_mkldnn_bf16_supported())
    return built and dtype == torch.float32


def prepacked(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A product with reordered rows; see `seqloss.loss.head.Linear`."""
    weight = _ONEDNN._reorder_linear_weight(rows.detach().contiguous(), _ROWS)
    return lambda states: _ONEDNN._linear_pointwise(states, weight, None, "none", [], "")


def prepack(module: GraphModule) -> None:
    """Has linear layers of an exported program run on reordered weights, where `is_available`.

    The originals are let go.

    Args:
        module: the program, with its weights on the CPU.
    """
    graph = module.graph
    _share_casts(module)
    packed: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.target is not _ATEN.linear.default or not _has_product(module, node.args[1]):
            continue
        inputs, weight, bias = (*node.args, None)[:3]
        if weight.target not in packed:
            packed[weight.target] = name = f"packed_weight_{len(packed)}"
            original = _attribute(module, weight.target).detach().contiguous()
            reordered = _ONEDNN._reorder_linear_weight(original, _ROWS)
            module.register_buffer(name, reordered, persistent=False)
        activation = _only_user(node)
        name = _FUSED.get(activation.target, "none") if activation else "none"
        last = activation if activation is not None and name != "none" else node
        with graph.inserting_before(node):
            arguments: tuple[Any, ...] = (
                inputs,
                graph.get_attr(packed[weight.target]),
                bias,
                name,
                [],
                "",
            )
            product = graph.call_function(_ONEDNN._linear_pointwise.default, arguments)
        last.replace_all_uses_with(product)
        if last is not node:
            graph.erase_node(last)
        graph.erase_node(node)
    _let_go(module, packed)
    graph.lint()
    module.recompile()


def _share_casts(module: GraphModule) -> None:
    """Queries, keys and values are cast from the same states: once is enough."""
    first: dict[Any, Node] = {}
    for node in list(module.graph.nodes):
        if node.target is not _ATEN.to.dtype or _is_written(node.args[0]) or _is_written(node):
            continue
        key = (node.args, tuple(node.kwargs.items()))
        if first.setdefault(key, node) is not node:
            node.replace_all_uses_with(first[key])
            module.graph.erase_node(node)


def _is_written(node: Node) -> bool:
    """Whether an operator writes into it; by Torch's convention such names end in `_`."""
    return any(
        str(user.target).partition(".")[2].split(".")[0].endswith("_") for user in node.users
    )


def _has_product(module: GraphModule, weight: Any) -> bool:
    return weight.op == "get_attr" and is_available(_attribute(module, weight.target).dtype)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _attribute(module: GraphModule, path: str) -> torch.Tensor:
    get: Callable[[Any], torch.Tensor] = operator.attrgetter(path)
    return get(module)


def _let_go(module: GraphModule, packed: dict[str, str]) -> None:
    """Frees the originals that nothing reads any more."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for path in packed.keys() - read:
        parent, _, name = path.rpartition(".")
        delattr(module.get_submodule(parent), name)
