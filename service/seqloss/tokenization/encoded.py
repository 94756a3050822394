"""What texts were made into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seqloss.records import Int64Array, Ragged, offsets_of

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """The texts of one side.

    Attributes:
        ids: one row per text, int64.
        tokens: per text the names of its tokens, aligned with the ids; None where not asked for.
        spans: per text where each token begins and ends, in characters of the text; None for a
            token that stands for none of them, such as `</s>`. Aligned with the ids; None where
            not asked for.
    """

    ids: Ragged
    tokens: list[list[str]] | None = None
    spans: list[list[Span | None]] | None = None

    def beginning_with(self, index: int, name: str) -> EncodedTexts:
        """With a token before each text."""
        return self._with(index, name, self.ids.offsets[:-1], lambda row, token: [token, *row])

    def ending_with(self, index: int, name: str) -> EncodedTexts:
        """With a token behind each text."""
        return self._with(index, name, self.ids.offsets[1:], lambda row, token: [*row, token])

    def without_characters(self, count: int) -> EncodedTexts:
        """With spans as if the first characters of each text had not been there."""
        if not count or self.spans is None:
            return self
        spans = [
            [
                (max(0, span[0] - count), span[1] - count) if span and span[1] > count else None
                for span in row
            ]
            for row in self.spans
        ]
        return EncodedTexts(self.ids, self.tokens, spans)

    def _with(
        self, index: int, name: str, places: Int64Array, put: Callable[[list[Any], Any], list[Any]]
    ) -> EncodedTexts:
        return EncodedTexts(
            Ragged(np.insert(self.ids.values, places, index), offsets_of(self.ids.lengths + 1)),
            None if self.tokens is None else [put(row, name) for row in self.tokens],
            None if self.spans is None else [put(row, None) for row in self.spans],
        )


def joined(parts: Sequence[EncodedTexts], *, with_tokens: bool) -> EncodedTexts:
    """The texts of all parts, one after the other."""
    none = np.empty(0, np.int64)
    return EncodedTexts(
        Ragged(
            np.concatenate([none, *(part.ids.values for part in parts)]),
            offsets_of(np.concatenate([none, *(part.ids.lengths for part in parts)])),
        ),
        [row for part in parts for row in part.tokens or ()] if with_tokens else None,
        [row for part in parts for row in part.spans or ()] if with_tokens else None,
    )
