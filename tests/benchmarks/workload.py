"""The pairs that every variant scores, and what transformers says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from benchmarks.pairs import SEED, Pairs, sentence_lengths

_DRAWN_AT_ONCE = 128
# Of the reference; its logits are float64.
_REFERENCE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """Pairs with transformers' mean nll of each, in float32 with a softmax in float64.

    Attributes:
        lengths_from: where the lengths come from, in words.
        pairs: what is scored.
        mean_nlls: of each pair, per token.
        mean_nlls_without_pad: the same with the pad class kept out of the softmax.
    """

    lengths_from: str
    pairs: Pairs
    mean_nlls: list[float]
    mean_nlls_without_pad: list[float]

    def expected_nlls(self, *, without_pad: bool) -> list[float]:
        """What a variant should return."""
        return self.mean_nlls_without_pad if without_pad else self.mean_nlls

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_bytes(orjson.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Workload:
        """Reads what `save` wrote."""
        fields = orjson.loads(path.read_bytes())
        return cls(**fields | {"pairs": Pairs(**fields["pairs"])})


def make_workload(checkpoint: Path, num_pairs: int) -> Workload:
    """Random sources, targets drawn from the model; the same ones for the same arguments.

    A drawn target looks to the model as its training data did: confident, small losses.
    """
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    lengths_from, lengths = sentence_lengths(num_pairs)
    most = getattr(model.config, "max_position_embeddings", None) or math.inf
    lengths = np.minimum(lengths, most).astype(int)
    sources = _random_sources(model.config, lengths[:, 0])
    pairs = Pairs(sources, _drawn_targets(model, sources, lengths[:, 1]))
    mean_nlls, without_pad = _reference(model, pairs)
    return Workload(lengths_from, pairs, mean_nlls, without_pad)


def _special_ids(config: Any) -> list[int]:
    names = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id")
    return sorted({value for name in names if (value := getattr(config, name, None)) is not None})


def _random_sources(config: Any, lengths: np.ndarray[Any, Any]) -> list[list[int]]:
    generator = np.random.default_rng(SEED)
    ids = np.setdiff1d(np.arange(config.vocab_size), _special_ids(config))
    return [[*generator.choice(ids, n - 1).tolist(), config.eos_token_id] for n in lengths]


@torch.inference_mode()
def _drawn_targets(
    model: Any, sources: list[list[int]], lengths: np.ndarray[Any, Any]
) -> list[list[int]]:
    torch.manual_seed(SEED)
    targets: list[list[int]] = [[] for _ in sources]
    order = np.argsort(lengths)
    for start in range(0, len(order), _DRAWN_AT_ONCE):
        rows = order[start : start + _DRAWN_AT_ONCE]
        drawn = _drawn(model, [sources[row] for row in rows], int(lengths[rows].max()) - 1)
        for row, ids in zip(rows, drawn.tolist(), strict=True):
            targets[row] = [*ids[: lengths[row] - 1], model.config.eos_token_id]
    return targets


def _drawn(model: Any, sources: list[list[int]], length: int) -> Tensor:
    """Targets without an end of sentence. Shape: (len(sources), length)."""
    source_ids, mask = padded(sources, model.config.pad_token_id)
    encoded = model.get_encoder()(input_ids=source_ids, attention_mask=mask)
    last = torch.full((len(sources), 1), model.config.decoder_start_token_id)
    drawn, cache = [], None
    for _ in range(length):
        output = model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=last,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits = output.logits[:, -1]
        logits[:, _special_ids(model.config)] = -torch.inf
        last = logits.softmax(-1).multinomial(1)
        drawn.append(last)
    return torch.cat(drawn, dim=1)


@torch.inference_mode()
def _reference(model: Any, pairs: Pairs) -> tuple[list[float], list[float]]:
    """Mean nlls of the pairs, over all classes and without the pad class."""
    pad = model.config.pad_token_id
    with_all, without_pad = np.zeros(len(pairs)), np.zeros(len(pairs))
    for rows in batches_by_length(pairs, _REFERENCE_TOKENS):
        batch = Pairs([pairs.source_ids[i] for i in rows], [pairs.target_ids[i] for i in rows])
        logits, labels, counted = teacher_forced(model, batch)
        logits = logits.double()
        own = logits.gather(-1, labels[..., None])[..., 0]
        lse = logits.logsumexp(-1)
        lse_without_pad = lse + torch.log1p(-(logits[..., pad] - lse).exp())
        with_all[rows] = _row_means(lse - own, counted)
        without_pad[rows] = _row_means(lse_without_pad - own, counted)
    return with_all.tolist(), without_pad.tolist()


def _row_means(values: Tensor, counted: Tensor) -> np.ndarray[Any, Any]:
    means: np.ndarray[Any, Any] = ((values * counted).sum(-1) / counted.sum(-1)).numpy()
    return means


def teacher_forced(model: Any, batch: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """One batch through transformers' model, which returns all logits.

    Returns:
        logits, labels, and which labels are no padding. Shapes: (B, T, V), (B, T), (B, T).
    """
    pad = model.config.pad_token_id
    source_ids, mask = padded(batch.source_ids, pad)
    labels, counted = padded(batch.target_ids, pad)
    decoder_input_ids = labels.roll(1, dims=1)
    decoder_input_ids[:, 0] = model.config.decoder_start_token_id
    logits = model(
        input_ids=source_ids,
        attention_mask=mask,
        decoder_input_ids=decoder_input_ids,
        use_cache=False,
    ).logits
    return logits, labels, counted


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64. Shapes: (rows, longest)."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(mask.shape, pad)
    ids[mask] = torch.tensor([value for row in rows for value in row])
    return ids, mask.long()


def batches_by_length(pairs: Pairs, max_tokens: int) -> Iterator[list[int]]:
    """Indices of pairs of similar length; no batch pads its targets to more than `max_tokens`."""
    targets, sources = pairs.target_lengths, pairs.source_lengths
    batch: list[int] = []
    for row in sorted(range(len(pairs)), key=lambda row: (targets[row], sources[row])):
        if batch and (len(batch) + 1) * targets[row] > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch
