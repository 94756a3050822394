"""Small random checkpoints of each family, with what real ones have and toys forget.

Their final_logits_bias is not zero, their special ids are odd ones, and their output embedding is
scaled up until they are as sure of themselves as trained models are: flat logits hide errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
)

VOCABULARY_SIZE = 101
MAX_POSITIONS = 48

_SIZES = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": MAX_POSITIONS,
}
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "marian": (
        MarianConfig,
        MarianMTModel,
        {
            "pad_token_id": 100,
            "decoder_start_token_id": 100,
            "eos_token_id": 0,
            "forced_eos_token_id": 0,
            "scale_embedding": True,
            "activation_function": "swish",
        },
    ),
    "bart": (
        BartConfig,
        BartForConditionalGeneration,
        {"pad_token_id": 7, "bos_token_id": 3, "eos_token_id": 9, "decoder_start_token_id": 9},
    ),
    "blenderbot": (
        BlenderbotConfig,
        BlenderbotForConditionalGeneration,
        {
            "pad_token_id": 57,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "tie_word_embeddings": False,
            "scale_embedding": True,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def make_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model in inference mode; the same one for the same arguments."""
    config_class, model_class, special = _FAMILIES[family]
    torch.manual_seed(17)
    model = model_class(config_class(**_SIZES | special | changes)).eval()
    with torch.no_grad():
        model.final_logits_bias.normal_()
        for name, parameter in model.named_parameters():
            if "layer_norm" in name or "layernorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed_positions" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        model.get_output_embeddings().weight.mul_(4)
    return model


def save_checkpoint(family: str, folder: Path, **changes: Any) -> Path:
    make_model(family, **changes).save_pretrained(folder)
    return folder
