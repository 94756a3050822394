"""Pairs as people have them, and lengths as sentences have them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

SEED = 20260305
_LENGTHS = Path(__file__).parents[3] / "shared" / "corpora" / "lengths.json"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Sources and targets as lists of ids, as people have them."""

    source_ids: list[list[int]]
    target_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.target_ids)

    @property
    def source_lengths(self) -> list[int]:
        """Tokens of each source, end of sentence included."""
        return [len(row) for row in self.source_ids]

    @property
    def target_lengths(self) -> list[int]:
        """Tokens of each target, end of sentence included."""
        return [len(row) for row in self.target_ids]

    @property
    def num_tokens(self) -> int:
        """Of both sides."""
        return sum(self.source_lengths) + sum(self.target_lengths)

    def part(self, start: int, end: int) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.source_ids[start:end], self.target_ids[start:end])


def sorted_batches(pairs: Pairs, max_tokens: int, max_pairs: int) -> Iterator[list[int]]:
    """Indices by length, in batches of at most so many padded tokens, both sides together."""
    sources, targets = pairs.source_lengths, pairs.target_lengths
    batch: list[int] = []
    longest_source = 0
    for row in sorted(range(len(pairs)), key=lambda row: (targets[row], sources[row])):
        longest_source = max(longest_source, sources[row])
        padded = (len(batch) + 1) * (longest_source + targets[row])
        if batch and (padded > max_tokens or len(batch) == max_pairs):
            yield batch
            batch, longest_source = [], sources[row]
        batch.append(row)
    yield batch


def sentence_lengths(num_pairs: int) -> tuple[str, np.ndarray[Any, Any]]:
    """Where lengths come from, and lengths with an end of sentence. Shape: (num_pairs, 2)."""
    generator = np.random.default_rng(SEED)
    if _LENGTHS.is_file():
        languages = orjson.loads(_LENGTHS.read_bytes())["pairs"]
        rows = np.concatenate([languages[name] for name in ("en-de", "en-fr")])[:, 2:]
        chosen = generator.choice(len(rows), num_pairs, replace=num_pairs > len(rows))
        return "sentences of FLORES-200 dev, en-de and en-fr, 1.35 tokens per word", rows[
            chosen
        ] + 1
    source = np.exp(generator.normal(math.log(26.8), 0.33, num_pairs))
    target = source * np.exp(generator.normal(0.05, 0.12, num_pairs))
    rows = np.clip(np.stack([source, target], axis=1).round(), 5, 65)
    return "a log-normal distribution, 5 to 65 tokens, 28 on average", rows + 1
