"""Has a packed graph run on an NVIDIA GPU by what Torch has for it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional

from seqloss.model.flash_attention import flash_attention, laid_out, takes
from seqloss.model.operators import ACTIVATIONS, attention

_ATEN: Any = torch.ops.aten
_OPS: Any = torch.ops.seqloss


def bind(module: GraphModule, *, with_flash: bool) -> None:
    """Puts plain calls in the place of the graph's operators, and flash attention where it goes.

    An operator of ours costs the host about twice as much as a plain call, some 10 microseconds
    more: where batches are small, a GPU waits for the host.

    Args:
        module: a packed graph with its weights. Its inputs that say where sequences lie are on the
            CPU when it is called, see `seqloss.engines.layout.HOST_INPUTS`.
        with_flash: whether the device has a kernel for attention of 16 bits.
    """
    binding = _Binding(module)
    if with_flash:
        binding.attend_by_flash()
    binding.replace_the_others()
    binding.finish()


class _Binding:
    """One graph while it is bound."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._graph: Graph = module.graph
        self._rounded: dict[tuple[str, torch.dtype], str] = {}

    def attend_by_flash(self) -> None:
        """In 16 bits, wherever there is no bias; layouts are made once for all layers."""
        layouts: dict[tuple[Any, ...], Node] = {}
        for node in self._of(_OPS.attention.default):
            products = self._products_for_flash(node)
            if not products:
                continue
            queries, keys, values, *bounds, _, heads, scale, causal, dtype = node.args
            for product in products:
                product.args = (*product.args[:-1], dtype)
            key = tuple(bounds)
            with self._graph.inserting_before(node):
                if key not in layouts:
                    layouts[key] = self._graph.call_function(laid_out, (*bounds, queries, keys))
                arguments = (queries, keys, values, layouts[key], heads, scale, causal)
                self._replace(node, flash_attention, arguments)

    def replace_the_others(self) -> None:
        """With the same numbers as the operators' definitions."""
        for node in self._of(_OPS.linear.default):
            inputs, weight, bias, activation, dtype = node.args
            self._replace(
                node, _linear, (inputs, weight, self._bias(bias, weight), activation, dtype)
            )
        for node in self._of(_OPS.linear_add.default):
            inputs, weight, bias, residual = node.args
            self._replace(node, _linear_add, (inputs, weight, self._bias(bias, weight), residual))
        for node in self._of(_OPS.norm.default):
            self._replace(node, _norm, node.args)
        for node in self._of(_OPS.attention.default):
            self._replace(node, attention, node.args)

    def finish(self) -> None:
        """Drops biases that nothing reads any more."""
        for node in self._graph.find_nodes(op="get_attr"):
            if not node.users:
                self._graph.erase_node(node)
        self._graph.lint()
        self._module.recompile()

    def _of(self, operator_: Any) -> list[Node]:
        return list(self._graph.find_nodes(op="call_function", target=operator_))

    def _replace(self, node: Node, function: Callable[..., Any], arguments: Any) -> None:
        with self._graph.inserting_before(node):
            node.replace_all_uses_with(self._graph.call_function(function, tuple(arguments)))
        self._graph.erase_node(node)

    def _products_for_flash(self, node: Node) -> set[Node]:
        """The products that make queries, keys and values; empty where the kernel does not go."""
        arguments: Any = node.args
        bounds, (bias, heads, _, causal, dtype) = arguments[3:7], arguments[7:]
        made_by = [_product_and_parts(rows) for rows in arguments[:3]]
        products = {product for product, _ in made_by if product is not None}
        if bias is not None or (causal and bounds[:2] != bounds[2:]) or len(products) == 0:
            return set()
        if any(product is None for product, _ in made_by):
            return set()
        query_product, parts = made_by[0]
        width = self._weight(query_product).shape[0] // (parts * heads)
        are_rounded = all(self._weight(product).dtype == dtype for product in products)
        return products if takes(dtype, width) and are_rounded else set()

    def _weight(self, product: Any) -> Tensor:
        weight: Tensor = operator.attrgetter(product.args[1].target)(self._module)
        return weight

    def _bias(self, bias: Any, weight: Any) -> Node | None:
        """The bias in the weight's dtype, as a product takes it; rounded once."""
        if bias is None:
            return None
        dtype = operator.attrgetter(weight.target)(self._module).dtype
        key = bias.target, dtype
        if key not in self._rounded:
            self._rounded[key] = name = f"rounded_bias_{len(self._rounded)}"
            rounded = operator.attrgetter(bias.target)(self._module).detach().to(dtype)
            self._module.register_buffer(name, rounded, persistent=False)
        with self._graph.inserting_after(bias):
            return self._graph.get_attr(self._rounded[key])


def _product_and_parts(rows: Any) -> tuple[Node | None, int]:
    """The product that rows of queries, keys or values are a part of, and of how many parts."""
    if rows.target is _OPS.linear.default:
        made, parts = rows, 1
    elif rows.target is operator.getitem and rows.args[0].target is _ATEN.chunk.default:
        made, parts = rows.args[0].args[0], rows.args[0].args[1]
    else:
        return None, 1
    activation_free = made.target is _OPS.linear.default and made.args[3] == "none"
    return (made if activation_free else None), parts


def _linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """As `seqloss.model.operators.linear`, with a bias of the weight's dtype."""
    return ACTIVATIONS[activation](functional.linear(inputs, weight, bias)).to(dtype)


def _linear_add(inputs: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """As `seqloss.model.operators.linear_add`, likewise; the sum is float32 as the residual is."""
    return residual + functional.linear(inputs, weight, bias)


def _norm(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `seqloss.model.operators.norm`."""
    if bias is None:
        normed = functional.rms_norm(inputs, weight.shape, weight, epsilon)
    else:
        normed = functional.layer_norm(inputs, weight.shape, weight, bias, epsilon)
    return normed, normed.to(dtype)
