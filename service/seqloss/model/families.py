"""One weight map per family: how transformers' names and settings become the native transformer's.

A family is added by writing one entry of `NATIVE`; the parity tests then ask for its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqloss.model.transformer import Architecture, Side

# Transformers' names of activations, and ours.
_ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class NativeModel:
    """A checkpoint in the native transformer's terms.

    Attributes:
        architecture: what is not a weight.
        weights: by the names of `seqloss.model.transformer`, in float32.
    """

    architecture: Architecture
    weights: dict[str, Tensor]


def native_model(model: Any) -> NativeModel | None:
    """The weights and settings of a model of transformers, where its family has a map.

    Args:
        model: a `PreTrainedModel`, in float32.

    Returns:
        None where the family, or a setting of this checkpoint, is not known here.
    """
    make = NATIVE.get(model.config.model_type)
    return None if make is None else make(model)


def _bart_like(
    *,
    norms_first: bool = False,
    position_offset: int = 0,
    norms_embedding_alone: bool = False,
    scales_decoder_embeddings: bool = True,
) -> Callable[[Any], NativeModel | None]:
    """The families whose code descends from BART's, with its names.

    Args:
        norms_first: whether sublayers' inputs are normalised, and not their outputs.
        position_offset: rows of the table before the one of position 0.
        norms_embedding_alone: see `Architecture`.
        scales_decoder_embeddings: whether `scale_embedding` is of both sides, and not of the
            encoder alone.
    """

    def make(model: Any) -> NativeModel | None:
        config = model.config
        activation = _ACTIVATIONS.get(config.activation_function)
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        sides = (
            Side(config.encoder_layers, config.encoder_attention_heads, scale),
            Side(
                config.decoder_layers,
                config.decoder_attention_heads,
                scale if scales_decoder_embeddings else 1.0,
            ),
        )
        widths = {config.d_model // side.heads for side in sides}
        if activation is None or len(widths) > 1:
            return None
        architecture = Architecture(
            *sides,
            activation=activation,
            norms_first=norms_first,
            epsilon=1e-5,  # of torch.nn.LayerNorm, which these families leave alone
            attention_scale=widths.pop() ** -0.5,
            norms_embedding_alone=norms_embedding_alone,
        )
        weights: dict[str, Tensor] = {}
        for name, part, side in (
            ("encoder", model.get_encoder(), sides[0]),
            ("decoder", model.get_decoder(), sides[1]),
        ):
            state = _float32(part)
            weights[f"{name}.embeddings"] = part.embed_tokens.weight
            weights[f"{name}.positions"] = _positions(part.embed_positions)[position_offset:]
            _rename(weights, f"{name}.embedding_norm", state, "layernorm_embedding")
            _rename(weights, f"{name}.final_norm", state, "layer_norm")
            for index in range(side.layers):
                _bart_layer(weights, f"{name}.layers.{index}", state, f"layers.{index}")
        return NativeModel(architecture, weights)

    return make


def _bart_layer(
    weights: dict[str, Tensor], ours: str, state: Mapping[str, Tensor], theirs: str
) -> None:
    attention = f"{theirs}.self_attn"
    _fuse(weights, f"{ours}.attention.qkv", state, attention, ("q_proj", "k_proj", "v_proj"))
    _rename(weights, f"{ours}.attention.output", state, f"{attention}.out_proj")
    _rename(weights, f"{ours}.attention_norm", state, f"{theirs}.self_attn_layer_norm")
    cross = f"{theirs}.encoder_attn"
    if f"{cross}.q_proj.weight" in state:
        _rename(weights, f"{ours}.cross.query", state, f"{cross}.q_proj")
        _fuse(weights, f"{ours}.cross.kv", state, cross, ("k_proj", "v_proj"))
        _rename(weights, f"{ours}.cross.output", state, f"{cross}.out_proj")
        _rename(weights, f"{ours}.cross_norm", state, f"{theirs}.encoder_attn_layer_norm")
    _rename(weights, f"{ours}.feed_forward.inner", state, f"{theirs}.fc1")
    _rename(weights, f"{ours}.feed_forward.output", state, f"{theirs}.fc2")
    _rename(weights, f"{ours}.feed_forward_norm", state, f"{theirs}.final_layer_norm")


def _t5_like(scales_outputs: Callable[[Any], bool]) -> Callable[[Any], NativeModel | None]:
    """T5, mT5 and UMT5: relative positions, RMS norms, no biases, unscaled attention.

    Args:
        scales_outputs: whether the output layer is given hidden states by the square root of their
            width, by a configuration.
    """
    return lambda model: _t5(model, scales_outputs(model.config))


def _t5(model: Any, scales_outputs: bool) -> NativeModel | None:
    config = model.config
    activation = _ACTIVATIONS.get(config.dense_act_fn)
    if activation is None:
        return None
    sides = (
        Side(config.num_layers, config.num_heads),
        Side(config.num_decoder_layers, config.num_heads),
    )
    architecture = Architecture(
        *sides,
        activation=activation,
        norms_first=True,
        epsilon=config.layer_norm_epsilon,
        attention_scale=1.0,
        output_scale=config.d_model**-0.5 if scales_outputs else 1.0,
    )
    weights: dict[str, Tensor] = {}
    for name, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        state = _float32(part)
        weights[f"{name}.embeddings"] = part.get_input_embeddings().weight
        _rename(weights, f"{name}.final_norm", state, "final_layer_norm")
        bias = None
        for index, block in enumerate(part.block):
            ours = f"{name}.layers.{index}"
            attention = block.layer[0].SelfAttention
            # T5's first layer has one for all of them, UMT5's layers each have their own.
            if attention.has_relative_attention_bias:
                bias = _distance_bias(attention, config.relative_attention_max_distance)
            if bias is not None:
                weights[f"{ours}.attention.distance_bias"] = bias
            _t5_layer(weights, ours, state, f"block.{index}", decodes=name == "decoder")
    return NativeModel(architecture, weights)


def _t5_layer(
    weights: dict[str, Tensor],
    ours: str,
    state: Mapping[str, Tensor],
    theirs: str,
    *,
    decodes: bool,
) -> None:
    attention = f"{theirs}.layer.0.SelfAttention"
    _fuse(weights, f"{ours}.attention.qkv", state, attention, ("q", "k", "v"))
    _rename(weights, f"{ours}.attention.output", state, f"{attention}.o")
    _rename(weights, f"{ours}.attention_norm", state, f"{theirs}.layer.0.layer_norm")
    if decodes:
        cross = f"{theirs}.layer.1.EncDecAttention"
        _rename(weights, f"{ours}.cross.query", state, f"{cross}.q")
        _fuse(weights, f"{ours}.cross.kv", state, cross, ("k", "v"))
        _rename(weights, f"{ours}.cross.output", state, f"{cross}.o")
        _rename(weights, f"{ours}.cross_norm", state, f"{theirs}.layer.1.layer_norm")
    last = f"{theirs}.layer.{2 if decodes else 1}"
    dense = f"{last}.DenseReluDense"
    gated = f"{dense}.wi_0.weight" in state
    _rename(weights, f"{ours}.feed_forward.inner", state, f"{dense}.{'wi_0' if gated else 'wi'}")
    _rename(weights, f"{ours}.feed_forward.gated", state, f"{dense}.wi_1")
    _rename(weights, f"{ours}.feed_forward.output", state, f"{dense}.wo")
    _rename(weights, f"{ours}.feed_forward_norm", state, f"{last}.layer_norm")


def _distance_bias(attention: Any, reach: int) -> Tensor:
    """By how far a key stands behind its query; from `reach` on there is one bias for all.

    Shape: (heads, 2 * reach + 1).
    """
    with torch.no_grad():
        bias = attention.compute_bias(reach + 1, reach + 1)[0].float()  # (heads, queries, keys)
    # The last query has all keys before it, the first one all behind it.
    return torch.cat([bias[:, -1], bias[:, 0, 1:]], dim=1).contiguous()


def _positions(table: Any) -> Tensor:
    """Learned, or M2M100's sinusoids, which are a buffer, from position 0 on."""
    if hasattr(table, "weights"):
        weights: Tensor = table.weights[table.padding_idx + 1 :]
        return weights
    learned: Tensor = table.weight
    return learned


def _float32(part: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().float() for name, tensor in part.state_dict().items()}


def _rename(
    weights: dict[str, Tensor], ours: str, state: Mapping[str, Tensor], theirs: str
) -> None:
    """Takes a weight and a bias over, as far as there are."""
    for kind in ("weight", "bias"):
        if (tensor := state.get(f"{theirs}.{kind}")) is not None:
            weights[f"{ours}.{kind}"] = tensor


def _fuse(
    weights: dict[str, Tensor],
    ours: str,
    state: Mapping[str, Tensor],
    theirs: str,
    parts: tuple[str, ...],
) -> None:
    """One linear layer of several that have the same inputs."""
    for kind in ("weight", "bias"):
        tensors = [state.get(f"{theirs}.{part}.{kind}") for part in parts]
        found = [tensor for tensor in tensors if tensor is not None]
        if found:
            weights[f"{ours}.{kind}"] = torch.cat(found)


# By transformers' `model_type`.
NATIVE: dict[str, Callable[[Any], NativeModel | None]] = {
    "bart": _bart_like(position_offset=2),
    "blenderbot": _bart_like(norms_first=True),
    "blenderbot-small": _bart_like(norms_embedding_alone=True, scales_decoder_embeddings=False),
    "m2m_100": _bart_like(norms_first=True),
    "marian": _bart_like(),
    "mbart": _bart_like(norms_first=True, position_offset=2),
    "mt5": _t5_like(lambda _: False),
    "pegasus": _bart_like(norms_first=True),
    "plbart": _bart_like(position_offset=2),
    "t5": _t5_like(lambda config: config.scale_decoder_outputs),
    "umt5": _t5_like(lambda config: config.tie_word_embeddings),
}
