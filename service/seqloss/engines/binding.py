"""Puts modules in the place of a packed graph's operators: kernels, or the best of plain Torch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from seqloss.engines import cpu_linear
from seqloss.kernels.functions import AttentionSettings, KernelLibrary
from seqloss.kernels.modules import CompiledAttention, CompiledLinear, CompiledNorm
from seqloss.model.operators import ACTIVATIONS, attention, norm

_OPS: Any = torch.ops.seqloss
_ATEN: Any = torch.ops.aten


# What moves or looks up rows, each by itself: whatever else a packed graph calls may compute a row
# by how many others there are.
_ROW_BY_ROW = frozenset(
    {
        operator.getitem,
        _ATEN.embedding.default,
        _ATEN.mul.Tensor,
        _ATEN.add.Tensor,
        _ATEN.to.dtype,
    }
)
# And what does along one dimension.
_ROW_BY_ROW_ALONG = {_ATEN.index_select.default: (1, (0,)), _ATEN.chunk.default: (2, (1, -1))}


@dataclass(frozen=True, slots=True)
class Bound:
    """What became of a graph's operators.

    Attributes:
        num_compiled: of ours, those that run on kernels.
        num_plain: of ours, those that do not.
        num_others: calls of anything that may not treat each row by itself.
    """

    num_compiled: int
    num_plain: int
    num_others: int

    @property
    def is_all_compiled(self) -> bool:
        """Whether a row's bits depend on no other row."""
        return self.num_compiled > 0 and not self.num_plain and not self.num_others


def bind(module: GraphModule, library: KernelLibrary | None) -> Bound:
    """Has the graph's operators run on the CPU, by kernels where there are some for their sizes.

    Weights are laid out anew, and the originals let go.

    Args:
        module: a packed graph, see `seqloss.engines.packed_program`, with weights on the CPU.
        library: the kernels; None for plain Torch.
    """
    graph = module.graph
    num_compiled = num_plain = num_others = 0
    for index, node in enumerate(list(graph.nodes)):
        if node.target not in _BOUND:
            num_others += _may_mix_rows(node)
            continue
        make, weights = _BOUND[node.target]
        bound = make(node, module, library)
        is_compiled = isinstance(bound, CompiledLinear | CompiledNorm | CompiledAttention)
        num_compiled, num_plain = num_compiled + is_compiled, num_plain + (not is_compiled)
        if bound is None:
            node.target = _DEFINITIONS[node.target]
            continue
        name = f"bound_{index}"
        module.add_submodule(name, bound)
        with graph.inserting_before(node):
            inputs = [
                value
                for place, value in enumerate(node.args)
                if isinstance(value, Node) and place not in weights
            ]
            node.replace_all_uses_with(graph.call_module(name, tuple(inputs)))
        graph.erase_node(node)
    _let_go(module)
    graph.lint()
    module.recompile()
    return Bound(num_compiled, num_plain, num_others)


def _may_mix_rows(node: Node) -> bool:
    if node.target in _ROW_BY_ROW_ALONG:
        place, dimensions = _ROW_BY_ROW_ALONG[node.target]
        return len(node.args) <= place or node.args[place] not in dimensions
    return node.op == "call_function" and node.target not in _ROW_BY_ROW


class _Linear(nn.Module):
    """A linear layer by oneDNN, whose weight is laid out once, or by Torch."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._dtype = dtype
        make = cpu_linear.prepacked if cpu_linear.is_available(weight.dtype) else _matmul
        self._multiply = make(weight)
        self._bias = None if bias is None else bias.to(weight.dtype)
        self._activate = ACTIVATIONS[activation]

    def forward(self, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        products = self._multiply(inputs)
        if self._bias is not None:
            products = products + self._bias
        if residual is not None:
            return residual + products.float()
        return self._activate(products).to(self._dtype)


def _matmul(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda inputs: inputs @ weight.t()


def _linear(node: Node, module: GraphModule, library: KernelLibrary | None) -> nn.Module:
    _, weight, bias, activation, dtype = node.args
    return _product(module, library, weight, bias, str(activation), dtype)


def _linear_add(node: Node, module: GraphModule, library: KernelLibrary | None) -> nn.Module:
    _, weight, bias, _ = node.args
    return _product(module, library, weight, bias, "none", torch.float32)


def _product(
    module: GraphModule,
    library: KernelLibrary | None,
    weight_node: Any,
    bias_node: Any,
    activation: str,
    dtype: Any,
) -> nn.Module:
    weight, bias = _attribute(module, weight_node), _tensor(module, bias_node)
    if library is not None and CompiledLinear.fits(library, weight):
        return CompiledLinear(library, weight, bias, activation, dtype)
    return _Linear(weight, bias, activation, dtype)


def _norm(node: Node, module: GraphModule, library: KernelLibrary | None) -> nn.Module | None:
    arguments: Any = node.args
    _, weight_node, bias_node, epsilon, dtype = arguments
    weight, bias = _attribute(module, weight_node), _tensor(module, bias_node)
    if library is None or not CompiledNorm.fits(library, weight, dtype):
        return None
    users = [user for user in node.users if user.target is operator.getitem]
    wanted: frozenset[Any] = frozenset(user.args[1] for user in users)
    return CompiledNorm(library, weight, bias, epsilon, dtype, wanted)


def _attention(node: Node, module: GraphModule, library: KernelLibrary | None) -> nn.Module | None:
    settings: list[Any] = list(node.args[-5:])
    how = AttentionSettings(_tensor(module, settings[0]), *settings[1:])
    if library is None or not CompiledAttention.fits(library, node.meta["width"], how):
        return None
    return CompiledAttention(library, how)


# What computes where there is no module. To call it by the operator's name takes longer, and has
# Torch import its compiler.
_DEFINITIONS: dict[Any, Callable[..., Any]] = {
    _OPS.norm.default: norm,
    _OPS.attention.default: attention,
}
# What makes an operator's module, and which of its arguments are weights, which the module holds.
_BOUND: dict[
    Any,
    tuple[Callable[[Node, GraphModule, KernelLibrary | None], nn.Module | None], frozenset[int]],
] = {
    _OPS.linear.default: (_linear, frozenset({1, 2})),
    _OPS.linear_add.default: (_linear_add, frozenset({1, 2})),
    _OPS.norm.default: (_norm, frozenset({1, 2})),
    _OPS.attention.default: (_attention, frozenset({7})),
}


def _tensor(module: GraphModule, node: Any) -> Tensor | None:
    return None if node is None else _attribute(module, node)


def _attribute(module: GraphModule, node: Any) -> Tensor:
    tensor: Tensor = operator.attrgetter(node.target)(module)
    return tensor.detach()


def _let_go(module: GraphModule) -> None:
    """Frees the weights that nothing reads any more."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for path in module.state_dict().keys() - read:
        parent, _, name = path.rpartition(".")
        delattr(module.get_submodule(parent), name)
