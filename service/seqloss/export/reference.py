"""What transformers says: the numbers that a bundle's self-test is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqloss.bundle.manifest import SelfTest, Vocabulary
from seqloss.export.huggingface import LoadedCheckpoint

_SEED = 20260305
_NUM_SOURCES = 6
_LONGEST = 16


def reference_nlls(
    model: Any, source_ids: list[int], target_ids: list[int], start: int, excluded: list[int]
) -> list[float]:
    """Token nlls of one pair, by transformers alone: float32 logits, float64 from there on."""
    logprobs = _logprobs(model, source_ids, [start, *target_ids[:-1]], excluded)
    return [float(nll) for nll in -logprobs[range(len(target_ids)), target_ids]]


def make_self_test(checkpoint: LoadedCheckpoint, vocabulary: Vocabulary) -> SelfTest:
    """Random sources, each with a target drawn from the model and a random one.

    A drawn target looks to the model as its training data did (confident, small losses); a random
    one is as wrong as can be.  Lengths run from 1 to 16.
    """
    generator = np.random.default_rng(_SEED)
    longest = min(_LONGEST, checkpoint.max_positions or _LONGEST)
    excluded = [int(index) for index in np.flatnonzero(vocabulary.excluded)]
    kept = np.flatnonzero(~vocabulary.excluded[: vocabulary.target])
    start = checkpoint.special_ids.decoder_start
    sources, source_index, targets = [], [], []
    for source_length in np.linspace(1, longest, _NUM_SOURCES).astype(int):
        source = generator.integers(vocabulary.source, size=source_length).tolist()
        sources.append(source)
        target_length = int(generator.integers(1, longest + 1))
        drawn = _draw(checkpoint.model, source, target_length, start, excluded, generator)
        targets += [drawn, generator.choice(kept, target_length).tolist()]
        source_index += [len(sources) - 1] * 2
    return SelfTest(
        source_ids=sources,
        source_index=source_index,
        target_ids=targets,
        token_nlls=[
            reference_nlls(checkpoint.model, sources[index], target, start, excluded)
            for index, target in zip(source_index, targets, strict=True)
        ],
    )


def _draw(
    model: Any,
    source_ids: list[int],
    length: int,
    start: int,
    excluded: list[int],
    generator: np.random.Generator,
) -> list[int]:
    drawn: list[int] = []
    while len(drawn) < length:
        probabilities = _logprobs(model, source_ids, [start, *drawn], excluded)[-1].exp().numpy()
        probabilities = probabilities[: model.get_decoder().get_input_embeddings().num_embeddings]
        drawn.append(
            int(generator.choice(len(probabilities), p=probabilities / probabilities.sum()))
        )
    return drawn


@torch.inference_mode()
def _logprobs(
    model: Any, source_ids: list[int], decoder_input_ids: list[int], excluded: list[int]
) -> Tensor:
    """Shape: (T, V), float64; -inf for excluded classes."""
    logits = model(
        input_ids=torch.tensor([source_ids]), decoder_input_ids=torch.tensor([decoder_input_ids])
    ).logits
    logits = logits[0].double()
    logits[:, excluded] = -torch.inf
    return torch.log_softmax(logits, -1)
