"""The numbers that bundles are held against: what transformers says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqloss.bundle.manifest import SelfTest, Vocabulary
from seqloss.export.families import FAMILIES
from seqloss.export.graph import embeddings_of, ids_or_embeddings

_SEED = 20260305
_NUM_SOURCES = 6
_LONGEST = 16


class TokenReference(ABC):
    """Token nlls of one pair at a time, by a model as it came: float64 from its logits on."""

    def __init__(self, decoder_start: int, num_targets: int) -> None:
        self._decoder_start = decoder_start
        self._num_targets = num_targets

    def nlls(self, source_ids: list[int], target_ids: list[int]) -> list[float]:
        """Token nlls of one pair, in nats."""
        logprobs = self._logprobs(source_ids, [[self._decoder_start, *target_ids[:-1]]])[0]
        return [float(nll) for nll in -logprobs[range(len(target_ids)), target_ids]]

    def draw(
        self, source_ids: list[int], length: int, generator: np.random.Generator, count: int = 1
    ) -> list[list[int]]:
        """Targets of a source drawn from the model: what its training data looks like to it."""
        drawn: list[list[int]] = [[] for _ in range(count)]
        for _ in range(length):
            inputs = [[self._decoder_start, *target] for target in drawn]
            logprobs = self._logprobs(source_ids, inputs)[:, -1, : self._num_targets]
            for target, probabilities in zip(drawn, logprobs.softmax(-1).numpy(), strict=True):
                target.append(int(generator.choice(self._num_targets, p=probabilities)))
        return drawn

    @abstractmethod
    def _logprobs(self, source_ids: list[int], decoder_input_ids: list[list[int]]) -> Tensor:
        """Of several targets of one source. Shape: (B, T, V), float64; -inf where excluded."""


class Reference(TokenReference):
    """By a transformers model alone, in float32."""

    def __init__(self, model: Any, decoder_start: int, excluded: Sequence[int]) -> None:
        super().__init__(decoder_start, embeddings_of(model.get_decoder()).num_embeddings)
        self._model = model
        self._excluded = list(excluded)

    @torch.inference_mode()
    def _logprobs(self, source_ids: list[int], decoder_input_ids: list[list[int]]) -> Tensor:
        model, embed = self._model, FAMILIES[self._model.config.model_type].embeds_ids
        sources = torch.tensor([source_ids] * len(decoder_input_ids))
        targets = torch.tensor(decoder_input_ids)
        logits = model(
            **ids_or_embeddings(model.get_encoder(), sources, embed=embed),
            **ids_or_embeddings(model.get_decoder(), targets, "decoder_", embed=embed),
            # No pair is padded, and no id is padding, whatever it equals.
            attention_mask=torch.ones_like(sources),
            decoder_attention_mask=torch.ones_like(targets),
            use_cache=False,
        ).logits.double()
        logits[..., self._excluded] = -torch.inf
        return torch.log_softmax(logits, -1)


def make_self_test(
    reference: TokenReference, vocabulary: Vocabulary, max_positions: tuple[int | None, int | None]
) -> SelfTest:
    """Random sources, each with a target drawn from the model and a random one.

    A drawn target looks to the model as its training data did (confident, small losses); a random
    one is as wrong as can be.  Lengths run from 1 to 16.
    """
    generator = np.random.default_rng(_SEED)
    longest = min(_LONGEST, *(limit or _LONGEST for limit in max_positions))
    kept = np.flatnonzero(~vocabulary.excluded[: vocabulary.target])
    sources, source_index, targets = [], [], []
    for source_length in np.linspace(1, longest, _NUM_SOURCES).astype(int):
        source = generator.integers(vocabulary.source, size=source_length).tolist()
        sources.append(source)
        target_length = int(generator.integers(1, longest + 1))
        (drawn,) = reference.draw(source, target_length, generator)
        targets += [drawn, generator.choice(kept, target_length).tolist()]
        source_index += [len(sources) - 1] * 2
    return SelfTest(
        source_ids=sources,
        source_index=source_index,
        target_ids=targets,
        token_nlls=[
            reference.nlls(sources[index], target)
            for index, target in zip(source_index, targets, strict=True)
        ],
    )
