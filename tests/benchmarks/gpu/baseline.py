"""transformers on a GPU: bfloat16, sorted by length, all logits of a batch, cross-entropy."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM

from benchmarks.pairs import Pairs
from benchmarks.workload import batches_by_length, padded

_IGNORE_INDEX = -100


class TransformersTask:
    """In a worker process; eager, or compiled for any size."""

    def __init__(self, checkpoint: Path, device: str, *, compiled: bool) -> None:
        self._device = torch.device(device)
        model = AutoModelForSeq2SeqLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._model = model.eval().to(self._device)
        if compiled:
            self._model.compile(dynamic=True)

    def warm_up(self, pairs: Pairs, batch_tokens: int) -> int | None:
        """Scores all once, and then for their memory."""
        self.run(pairs, batch_tokens)
        if self._device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self._device)
        self.run(pairs, batch_tokens)
        return torch.cuda.max_memory_allocated(self._device)

    @torch.inference_mode()
    def run(self, pairs: Pairs, batch_tokens: int) -> float:
        """Seconds from lists of ids to all nlls."""
        started = time.perf_counter()
        nlls = torch.zeros(len(pairs), device=self._device)
        for rows in batches_by_length(pairs, batch_tokens):
            nlls[torch.tensor(rows, device=self._device)] = self._nlls(pairs, rows)
        nlls.cpu()
        return time.perf_counter() - started

    def _nlls(self, pairs: Pairs, rows: list[int]) -> torch.Tensor:
        """Shape: (len(rows),), float32."""
        config = self._model.config
        pad = config.pad_token_id
        source_ids, mask = padded([pairs.source_ids[row] for row in rows], pad)
        labels, counted = padded([pairs.target_ids[row] for row in rows], pad)
        decoder_input_ids = labels.roll(1, dims=1)
        decoder_input_ids[:, 0] = config.decoder_start_token_id
        labels = labels.masked_fill(counted == 0, _IGNORE_INDEX)
        source_ids, mask, decoder_input_ids, labels = (
            tensor.to(self._device) for tensor in (source_ids, mask, decoder_input_ids, labels)
        )
        logits = self._model(
            input_ids=source_ids,
            attention_mask=mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        ).logits
        nlls = cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=_IGNORE_INDEX
        )
        return nlls.view(labels.shape).float().sum(-1)

    def close(self) -> None:
        """The process ends."""
