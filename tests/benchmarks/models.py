"""The models that are measured: random ones of real shapes, as sure of themselves as trained ones.

Speed does not depend on what a model has learnt.  Errors do: flat logits hide them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from benchmarks.operations import Shape

_SEED = 20260305
# Sublayers this loud drown the input's embedding, which is the output's too: quieter ones make a
# model that repeats the token it was fed.
_GAIN = 1.5
# What targets drawn from the model should cost per token, in nats.
_AIM = 3.0


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of `MODELS`.

    Attributes:
        config_class: the name of transformers' configuration class.
        settings: its arguments.
        ctranslate2_drops_pad: whether CTranslate2 leaves the pad class out of the softmax.
        scale: the logits' standard deviation at which drawn tokens cost 3 to 4 nats, where it was
            tried out; None where it follows from the vocabulary.
    """

    config_class: str
    settings: dict[str, Any]
    ctranslate2_drops_pad: bool = False
    scale: float | None = None

    def config(self) -> Any:
        """Transformers' configuration."""
        return getattr(transformers, self.config_class)(**self.settings)

    def default_scale(self) -> float:
        """The logits' standard deviation at which drawn tokens cost about `_AIM` nats.

        Logits that are normally distributed with standard deviation s over V classes have an
        entropy of about log V - s * s / 2. It is a nat more where V is some ten thousand, and
        further off the larger V is.
        """
        if self.scale is not None:
            return self.scale
        return math.sqrt(2 * (math.log(self.config().vocab_size) - _AIM))


def marian(vocabulary: int, width: int, layers: int, heads: int, ffn_width: int) -> Model:
    """A Marian model; the last id pads and starts, as in the published ones."""
    return Model(
        config_class="MarianConfig",
        settings={
            "vocab_size": vocabulary,
            "d_model": width,
            "encoder_layers": layers,
            "decoder_layers": layers,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": ffn_width,
            "decoder_ffn_dim": ffn_width,
            "activation_function": "swish",
            "scale_embedding": True,
            "max_position_embeddings": 512,
            "pad_token_id": vocabulary - 1,
            "decoder_start_token_id": vocabulary - 1,
            "eos_token_id": 0,
            "forced_eos_token_id": 0,
            "bos_token_id": None,
        },
        ctranslate2_drops_pad=True,
    )


def nllb(width: int, layers: int, ffn_width: int) -> Model:
    """A model of NLLB's family with its vocabulary."""
    return Model(
        config_class="M2M100Config",
        settings={
            "vocab_size": 256_206,
            "d_model": width,
            "encoder_layers": layers,
            "decoder_layers": layers,
            "encoder_attention_heads": 16,
            "decoder_attention_heads": 16,
            "encoder_ffn_dim": ffn_width,
            "decoder_ffn_dim": ffn_width,
            "activation_function": "relu",
            "scale_embedding": True,
            "max_position_embeddings": 1024,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        scale=5.3,
    )


def t5(width: int, layers: int, heads: int, ffn_width: int) -> Model:
    """One of the first T5 models, whose feed-forward layers have no gates."""
    return Model(
        config_class="T5Config",
        settings={
            "vocab_size": 32_128,
            "d_model": width,
            "d_kv": 64,
            "d_ff": ffn_width,
            "num_layers": layers,
            "num_decoder_layers": layers,
            "num_heads": heads,
            "relative_attention_num_buckets": 32,
            "feed_forward_proj": "relu",
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
        scale=4.6,
    )


MODELS = {
    "marian-base": marian(vocabulary=58_101, width=512, layers=6, heads=8, ffn_width=2048),
    "nllb-600m": nllb(width=1024, layers=12, ffn_width=4096),
    # For GPUs: in float32 its weights take 13 GB.
    "nllb-3.3b": nllb(width=2048, layers=24, ffn_width=8192),
    "t5-base": t5(width=768, layers=12, heads=12, ffn_width=3072),
    "tiny": marian(vocabulary=997, width=32, layers=2, heads=4, ffn_width=64),
}


def shape_of(config: Any) -> Shape:
    """The sizes that operations are counted from, by whatever name a family has for them."""

    def first(*names: str) -> int:
        return next(int(value) for name in names if (value := getattr(config, name, None)))

    # Only T5's heads need not be as wide as the model together.
    is_t5 = hasattr(config, "d_kv")
    return Shape(
        vocabulary=config.vocab_size,
        width=config.d_model,
        encoder_layers=first("encoder_layers", "num_layers"),
        decoder_layers=first("decoder_layers", "num_decoder_layers"),
        ffn_width=first("encoder_ffn_dim", "d_ff"),
        heads_width=config.num_heads * config.d_kv if is_t5 else config.d_model,
        ffn_matrices=3 if getattr(config, "is_gated_act", False) else 2,
    )


def save_checkpoint(model: Model, scale: float, folder: Path) -> None:
    """Writes a random model; the same one for the same arguments."""
    random_model(model.config(), scale).save_pretrained(folder)


@torch.no_grad()
def random_model(config: Any, scale: float) -> Any:
    """A model in inference mode whose logits have a standard deviation of about `scale`."""
    torch.manual_seed(_SEED)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    output = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not output:
            module.weight.normal_(std=_GAIN / math.sqrt(module.in_features))
        elif isinstance(module, nn.LayerNorm | T5LayerNorm):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    output.weight.normal_(std=scale / _output_length(config))
    _balance_t5_attention(model)
    _decorrelate_output(model)
    if config.model_type == "marian":
        # Marian starts its decoder from zeros, and CTranslate2 takes that for granted.
        output.weight[config.pad_token_id] = 0
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(std=0.5)
    return model


def _output_length(config: Any) -> float:
    """Of the vectors that the output layer is given; T5 scales them down to length 1."""
    return 1.0 if getattr(config, "scale_decoder_outputs", False) else math.sqrt(config.d_model)


def _balance_t5_attention(model: nn.Module) -> None:
    """T5 does not divide scores by the root of a head's width: its queries are smaller instead."""
    for module in model.modules():
        if isinstance(module, T5Attention):
            module.q.weight.div_(math.sqrt(module.key_value_proj_dim))
            if module.has_relative_attention_bias:
                module.relative_attention_bias.weight.normal_()


def _decorrelate_output(model: Any) -> None:
    """Keeps a model whose layer norms come first from repeating the token it was fed.

    What is fed reaches the last norm undamped, and the output layer has the same embeddings: that
    token's logit would be far above all others. Weights of either sign in the last norm turn it
    into one of many. Marian's norms come behind its sublayers, and there is no last one.
    """
    decoder = model.get_decoder()
    norm = getattr(decoder, "layer_norm", None) or getattr(decoder, "final_layer_norm", None)
    if norm is not None:
        norm.weight.mul_(torch.randn_like(norm.weight).sign())
