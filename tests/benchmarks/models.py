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
    """

    config_class: str
    settings: dict[str, Any]
    ctranslate2_drops_pad: bool = False

    def config(self) -> Any:
        """Transformers' configuration."""
        return getattr(transformers, self.config_class)(**self.settings)

    def default_scale(self) -> float:
        """The logits' standard deviation at which drawn tokens cost about `_AIM` nats.

        Logits that are normally distributed with standard deviation s over V classes have an
        entropy of about log V - s * s / 2.
        """
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


MODELS = {
    "marian-base": marian(vocabulary=58_101, width=512, layers=6, heads=8, ffn_width=2048),
    "tiny": marian(vocabulary=997, width=32, layers=2, heads=4, ffn_width=64),
}


def shape_of(config: Any) -> Shape:
    """The sizes that operations are counted from, by whatever name a family has for them."""

    def first(*names: str) -> int:
        return next(int(value) for name in names if (value := getattr(config, name, None)))

    return Shape(
        vocabulary=config.vocab_size,
        width=config.d_model,
        encoder_layers=first("encoder_layers", "num_layers"),
        decoder_layers=first("decoder_layers", "num_decoder_layers"),
        ffn_width=first("encoder_ffn_dim", "d_ff"),
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
        elif isinstance(module, nn.LayerNorm):
            module.weight.add_(torch.randn_like(module.weight) * 0.1)
            module.bias.add_(torch.randn_like(module.bias) * 0.1)
    output.weight.normal_(std=scale / math.sqrt(config.d_model))
    # Marian starts its decoder from zeros, and CTranslate2 takes that for granted.
    output.weight[config.pad_token_id] = 0
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(std=0.5)
    return model
