"""transformers as people use it to score: all logits of a batch, then cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM

from benchmarks.pairs import Pairs
from benchmarks.scoring import Scorer, Setting, Setup, own_pid
from benchmarks.workload import batches_by_length, teacher_forced

_IGNORE_INDEX = -100
_BATCH_PAIRS = 32
# Padded target tokens. Above this the logits of the larger models take gigabytes.
_BATCH_TOKENS = (512, 1024, 2048, 4096)


def make(setup: Setup, precision: str, by_length: bool) -> Scorer:
    """The checkpoint, loaded."""
    torch.set_num_threads(setup.threads)
    return _WithTransformers(setup, precision, by_length)


class _WithTransformers:
    def __init__(self, setup: Setup, precision: str, by_length: bool) -> None:
        self._model = AutoModelForSeq2SeqLM.from_pretrained(
            setup.checkpoint, dtype=getattr(torch, precision)
        ).eval()
        self._by_length = by_length
        self._setting = self.candidates[0]

    @property
    def pid(self) -> int:
        return own_pid()

    @property
    def candidates(self) -> Sequence[Setting]:
        by_pairs = {"batch_pairs": _BATCH_PAIRS}
        if not self._by_length:
            return [by_pairs]
        return [by_pairs, *({"batch_tokens": tokens} for tokens in _BATCH_TOKENS)]

    def use(self, setting: Setting) -> None:
        self._setting = setting

    @torch.inference_mode()
    def score(self, pairs: Pairs) -> list[float]:
        means = torch.zeros(len(pairs))
        for rows in self._batches(pairs):
            batch = Pairs([pairs.source_ids[i] for i in rows], [pairs.target_ids[i] for i in rows])
            means[rows] = self._mean_nlls(batch)
        return means.tolist()

    def _mean_nlls(self, batch: Pairs) -> torch.Tensor:
        """Shape: (len(batch),)."""
        logits, labels, counted = teacher_forced(self._model, batch)
        nlls = cross_entropy(
            logits.flatten(0, 1),
            labels.masked_fill(counted == 0, _IGNORE_INDEX).flatten(),
            reduction="none",
            ignore_index=_IGNORE_INDEX,
        )
        return nlls.view(labels.shape).float().sum(-1) / counted.sum(-1)

    def _batches(self, pairs: Pairs) -> Iterator[list[int]]:
        if "batch_tokens" in self._setting:
            yield from batches_by_length(pairs, self._setting["batch_tokens"])
            return
        order = list(range(len(pairs)))
        if self._by_length:
            (order,) = batches_by_length(pairs, max_tokens=2**62)
        size = self._setting["batch_pairs"]
        yield from (order[start : start + size] for start in range(0, len(order), size))

    def close(self) -> None:
        """The process ends."""
