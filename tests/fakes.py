"""Engines and bundles for tests that need no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from seqloss.bundle.manifest import (
    Checkpoint,
    Graph,
    Manifest,
    SelfTest,
    SpecialIds,
    Vocabulary,
)
from seqloss.bundle.reader import Bundle
from seqloss.engines.base import EngineInfo
from seqloss.records import Batch, TokenTerms

VOCABULARY_SIZE = 50
START, PAD, EOS = 49, 1, 2
MAX_TOKENS = 12


def fake_manifest(**changes: object) -> Manifest:
    """A model with 50 ids, decoder start 49, pad 1, at most 12 tokens on each side."""
    fields: dict[str, object] = {
        "schema_version": 2,
        "seqloss_version": "0",
        "family": "fake",
        "checkpoint": Checkpoint(name="fake", digest="0" * 64),
        "vocabulary": Vocabulary(
            source=VOCABULARY_SIZE, target=VOCABULARY_SIZE, classes=VOCABULARY_SIZE
        ),
        "special_ids": SpecialIds(decoder_start=START, pad=PAD, eos=EOS),
        "max_source_tokens": MAX_TOKENS,
        "max_target_tokens": MAX_TOKENS,
        "weight_aliases": {},
        "graphs": [
            Graph(
                engine="torch",
                precision="float32",
                layout="padded",
                folder="graphs/torch-float32",
                exported_with="nothing",
                max_error=0.0,
                mean_error=0.0,
                tolerance=1e-6,
                mean_tolerance=1e-6,
            )
        ],
        "self_test": SelfTest(
            source_ids=[[1]], source_index=[0], target_ids=[[1]], token_nlls=[[1.0]]
        ),
        "files": {},
    }
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def fake_bundle(**changes: object) -> Bundle:
    return Bundle(Path("fake"), fake_manifest(**changes), "0" * 64)


def fake_nll(source: list[int], decoder_input: int, label: int) -> float:
    """What the fake model says of a token: it depends on all that a real one's would."""
    return (sum(source) * 7 + decoder_input * 3 + label) % 97 / 10


class FakeEngine:
    """Scores with `fake_nll`; `before` may raise, or return terms of its own."""

    def __init__(
        self,
        before: Callable[[Batch], TokenTerms | None] = lambda _: None,
        *,
        device: str = "cpu",
        makes_logits: bool = False,
        is_packed: bool = False,
        has_kernels: bool = False,
        is_batch_invariant: bool = False,
    ) -> None:
        self.batches: list[Batch] = []
        self.closed = False
        self.memory_releases = 0
        self._before = before
        self._info = EngineInfo(
            "torch",
            device,
            "float32",
            "fake",
            makes_logits=makes_logits,
            is_packed=is_packed,
            has_kernels=has_kernels,
            is_batch_invariant=is_batch_invariant,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def score(self, batch: Batch) -> TokenTerms:
        self.batches.append(batch)
        terms = self._before(batch)
        if terms is not None:
            return terms
        row = batch.decoder_input_ids.row_of_value
        nll = np.array(
            [
                fake_nll(batch.sources.row(batch.source_row[row[place]]).tolist(), fed, label)
                for place, (fed, label) in enumerate(
                    zip(batch.decoder_input_ids.values.tolist(), batch.labels.tolist(), strict=True)
                )
                if batch.counted[place]
            ],
            np.float32,
        )
        extra = batch.with_ranks_and_entropies
        return TokenTerms(
            target_logprob=-nll,
            mean_logprob=-nll - 1,
            rank=(nll * 10).astype(np.int32) if extra else None,
            entropy=nll / 2 if extra else None,
        )

    def release_memory(self) -> None:
        self.memory_releases += 1

    def memory_bytes(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.closed = True


def padded_tokens(batch: Batch) -> int:
    """What a batch costs whoever pads it, both sides together."""
    sides = (batch.sources, batch.decoder_input_ids)
    return sum(len(side) * int(side.lengths.max(initial=0)) for side in sides)
