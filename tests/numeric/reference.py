"""What transformers says of pairs: float32 logits of one pair at a time, float64 from there on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

# Logits closer than this may change places by rounding, and ranks with them.
TIE = 1e-4


@dataclass(frozen=True)
class Reference:
    """Of one target's tokens; ranks as the least and the largest that rounding allows."""

    nll: np.ndarray
    negative_mean_logprob: np.ndarray
    entropy: np.ndarray
    least_rank: np.ndarray
    largest_rank: np.ndarray


@torch.inference_mode()
def reference(
    model: PreTrainedModel, source: list[int], decoder_input_ids: list[int], target: list[int]
) -> Reference:
    sources, fed = torch.tensor([source]), torch.tensor([decoder_input_ids])
    logits = (
        model(
            **_given(model, model.get_encoder(), sources),
            **_given(model, model.get_decoder(), fed, "decoder_"),
            attention_mask=torch.ones_like(sources),
            decoder_attention_mask=torch.ones_like(fed),
            use_cache=False,
        )
        .logits[0]
        .double()
    )
    logprobs = logits.log_softmax(-1)
    own = logits.gather(-1, torch.tensor(target)[:, None])
    return Reference(
        nll=-logprobs[range(len(target)), target].numpy(),
        negative_mean_logprob=-logprobs.mean(-1).numpy(),
        entropy=-(logprobs.exp() * logprobs).sum(-1).numpy(),
        least_rank=(logits > own + TIE).sum(-1).numpy(),
        largest_rank=(logits > own - TIE).sum(-1).numpy() - 1,
    )


def _given(
    model: PreTrainedModel, part: Any, ids: torch.Tensor, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Ids, or their embeddings where the family would count positions by `ids != pad`."""
    if model.config.model_type in ("m2m_100", "encoder-decoder"):
        return {f"{prefix}inputs_embeds": part.get_input_embeddings()(ids)}
    return {f"{prefix}input_ids": ids}


def random_pairs(
    seed: int, vocabulary: int, longest: int, *, absent: int | None = None, **ids: int
) -> dict[str, Any]:
    """24 targets for 10 sources, of all lengths from 1 on, special ids inside the data.

    The id `absent`, where one is given, is not in it.
    """
    generator = np.random.default_rng(seed)

    def rows(count: int) -> list[list[int]]:
        lengths = [1, longest, *generator.integers(1, longest + 1, count - 2)]
        made = [generator.integers(vocabulary, size=length) for length in lengths]
        for row in made:  # pad, start and end ids are ids like all others
            row[generator.random(len(row)) < 0.2] = generator.choice(list(ids.values()))
            row[row == absent] = 0
        return [row.tolist() for row in made]

    return {
        "source_ids": rows(10),
        "target_ids": rows(24),
        "source_index": generator.integers(10, size=24).tolist(),
    }
