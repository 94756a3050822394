"""ONNX files as other people's exporters write them: encoder and decoder, in Optimum's layout."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from checkpoints import make_model

IDS = {0: Dim.AUTO, 1: Dim.AUTO}


class Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model.get_encoder()(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return hidden


class Decoder(nn.Module):
    """With a cache that nobody needs for scoring, as Optimum's decoders have one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, encoder_attention_mask: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, ...]:
        result = self.model(
            encoder_outputs=(encoder_hidden_states,),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            use_cache=True,
        )
        # Turned, it is an operator of its own that the logits do not need.
        keys = result.past_key_values.self_attention_cache.layers[0].keys.transpose(1, 2)
        return result.logits, keys


def save_onnx(family: str, folder: Path) -> Path:
    """A family's random model; inputs and outputs are named as Optimum names them."""
    model: Any = make_model(family)
    model.set_attn_implementation("eager")
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    ids = torch.zeros(3, 7, dtype=torch.int64)
    hidden = torch.zeros(3, 7, model.config.d_model)
    parts: list[Any] = [
        (Encoder, "encoder_model", (ids, ids + 1), ["input_ids", "attention_mask"]),
        (
            Decoder,
            "decoder_model",
            (torch.zeros(3, 5, dtype=torch.int64), ids + 1, hidden),
            ["input_ids", "encoder_attention_mask", "encoder_hidden_states"],
        ),
    ]
    outputs = [["last_hidden_state"], ["logits", "present.0.decoder.key"]]
    for (part, name, inputs, names), given in zip(parts, outputs, strict=True):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                part(model).eval(),
                inputs,
                folder / f"{name}.onnx",
                dynamo=True,
                external_data=name == "decoder_model",  # both ways occur
                input_names=names,
                output_names=given,
                dynamic_shapes=tuple([IDS] * len(inputs)),
                verbose=False,
            )
    return folder
