"""Small random checkpoints of each family, with what real ones have and toys forget.

Their final_logits_bias is not zero, their special ids are odd ones, and their output embedding is
scaled up until they are as sure of themselves as trained models are: flat logits hide errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY_SIZE = 101
MAX_POSITIONS = 48

_BART = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 7,
    "bos_token_id": 3,
    "eos_token_id": 9,
    "decoder_start_token_id": 9,
}
_T5 = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 5,
    "eos_token_id": 1,
    "decoder_start_token_id": 5,
}
_BERT = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_GEMMA = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_POSITIONS,
    "sliding_window": 16,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 30.0,
}


def _two_parts(kind: str, **changes: Any) -> Any:
    """An encoder and a decoder of a kind that was made for neither."""
    config_class = getattr(transformers, f"{kind}Config")
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        config_class(**_BERT | changes),
        config_class(**_BERT | changes, is_decoder=True, add_cross_attention=True),
    )
    config.decoder_start_token_id, config.pad_token_id = 3, changes["pad_token_id"]
    return config


def _t5gemma() -> Any:
    config = transformers.T5GemmaConfig(
        encoder=transformers.T5GemmaModuleConfig(**_GEMMA),
        decoder=transformers.T5GemmaModuleConfig(**_GEMMA),
        vocab_size=VOCABULARY_SIZE,
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 6, 1
    return config


@dataclass(frozen=True)
class Recipe:
    """A family's class, its configuration, and how far its output layer is scaled up."""

    model: str
    config: dict[str, Any] | Callable[[], Any] = field(default_factory=dict)
    sharpness: float = 4
    # Its own code takes pad ids in the data for padding, and there is no way to tell it otherwise.
    pads_are_padding: bool = False


RECIPES: dict[str, Recipe] = {
    "marian": Recipe(
        "MarianMTModel",
        _BART
        | {
            "pad_token_id": 100,
            "decoder_start_token_id": 100,
            "eos_token_id": 0,
            "forced_eos_token_id": 0,
            "scale_embedding": True,
            "activation_function": "swish",
        },
    ),
    "bart": Recipe("BartForConditionalGeneration", _BART),
    "blenderbot": Recipe(
        "BlenderbotForConditionalGeneration",
        _BART
        | {
            "pad_token_id": 57,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "tie_word_embeddings": False,
            "scale_embedding": True,
        },
    ),
    "m2m_100": Recipe(
        "M2M100ForConditionalGeneration",
        _BART | {"pad_token_id": 5, "scale_embedding": True},
        sharpness=2.5,
    ),
    "mbart": Recipe("MBartForConditionalGeneration", _BART | {"scale_embedding": True}),
    "pegasus": Recipe(
        "PegasusForConditionalGeneration",
        _BART | {"pad_token_id": 0, "decoder_start_token_id": 0, "scale_embedding": True},
        sharpness=2.5,
    ),
    "t5": Recipe("T5ForConditionalGeneration", _T5, sharpness=12),
    "mt5": Recipe(
        "MT5ForConditionalGeneration",
        _T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    ),
    "umt5": Recipe(
        "UMT5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}, sharpness=8
    ),
    "blenderbot-small": Recipe(
        "BlenderbotSmallForConditionalGeneration", _BART | {"scale_embedding": True}
    ),
    "plbart": Recipe("PLBartForConditionalGeneration", _BART),
    "mvp": Recipe("MvpForConditionalGeneration", _BART),
    "bigbird_pegasus": Recipe("BigBirdPegasusForConditionalGeneration", _BART, sharpness=2.5),
    "fsmt": Recipe(
        "FSMTForConditionalGeneration",
        _BART
        | {
            "langs": ["en", "de"],
            "src_vocab_size": VOCABULARY_SIZE,
            "tgt_vocab_size": VOCABULARY_SIZE,
        },
        pads_are_padding=True,
    ),
    "longt5": Recipe(
        "LongT5ForConditionalGeneration",
        _T5 | {"local_radius": 5, "encoder_attention_type": "local"},
        sharpness=12,
    ),
    "longt5-transient-global": Recipe(
        "LongT5ForConditionalGeneration",
        _T5
        | {
            "local_radius": 5,
            "global_block_size": 4,
            "encoder_attention_type": "transient-global",
        },
        sharpness=12,
    ),
    "bert2bert": Recipe(
        "EncoderDecoderModel",
        lambda: _two_parts("Bert", pad_token_id=7, max_position_embeddings=MAX_POSITIONS),
        sharpness=6,
    ),
    "roberta2roberta": Recipe(
        "EncoderDecoderModel",
        lambda: _two_parts("Roberta", pad_token_id=5, max_position_embeddings=MAX_POSITIONS + 6),
        sharpness=6,
    ),
    "t5gemma": Recipe("T5GemmaForConditionalGeneration", _t5gemma, sharpness=20),
}
FAMILIES = tuple(RECIPES)
# Whose losses are compared in all ways; the others share their code, or are rare.
MAIN_FAMILIES = ("marian", "bart", "m2m_100", "t5")


def sized(family: str, size: str) -> dict[str, int]:
    """Changes of a family's recipe: `wide`, every kernel is for its sizes; `narrow`, not every one.

    Kernels are for attention heads of 16 or, where the CPU has no more than AVX2, of 8, and of
    multiples of it.
    """
    width = {"wide": 16, "narrow": 4}[size]
    config: Any = RECIPES[family].config
    return {"d_model": 4 * width} | ({"d_kv": width} if "d_kv" in config else {})


def make_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model in inference mode; the same one for the same arguments."""
    recipe = RECIPES[family]
    model_class: Any = getattr(transformers, recipe.model)
    torch.manual_seed(17)
    if callable(recipe.config):
        config = recipe.config()
    else:
        config = model_class.config_class(**recipe.config | changes)
    model: PreTrainedModel = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "relative_attention_bias" in name:
                parameter.normal_()
            elif "embed_positions" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        _output_layer(model).weight.mul_(recipe.sharpness)
    return model


def _output_layer(model: Any) -> Any:
    if model.config.model_type == "fsmt":  # its output embeddings are those of the decoder's input
        return model.model.decoder.output_projection
    return model.get_output_embeddings()


def save_checkpoint(family: str, folder: Path, **changes: Any) -> Path:
    make_model(family, **changes).save_pretrained(folder)
    return folder
