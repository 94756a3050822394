"""What remains to be done where a SentencePiece model's pieces have their ids elsewhere."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from seqloss.bundle.manifest import Pieces
from seqloss.records import Int64Array, Ragged, offsets_of

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


class PieceLookup:
    """Ids of tags and of pieces, by their names; see `seqloss.bundle.manifest.Pieces`."""

    def __init__(self, pieces: Pieces, tokenizer: Tokenizer) -> None:
        self._pieces = pieces
        self._tokenizer = tokenizer
        self._unknown_token = tokenizer.id_to_token(pieces.unknown)

    def split(self, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        """The tag of each text, "" where it has none, and what the tokenizer is to encode."""
        tags = [tag_of(text) if self._pieces.has_tags else "" for text in texts]
        rests = [text[len(tag) :] for tag, text in zip(tags, texts, strict=True)]
        if self._pieces.composes:
            rests = [unicodedata.normalize("NFC", rest) for rest in rests]
        return tags, rests

    def looked_up(
        self, ids: Ragged, encodings: Sequence[Encoding], tags: list[str], rests: list[str]
    ) -> Ragged:
        """The model's ids, tags among them.

        Args:
            ids: the tokenizer's, of the rests.
            encodings: of the rests.
            tags: as `split` found them.
            rests: as `split` left them.
        """
        self._replace_unknown(ids, encodings, rests)
        tagged = np.flatnonzero([bool(tag) for tag in tags])
        tag_ids = [self._index_of(tags[row]) for row in tagged]
        return Ragged(
            np.insert(ids.values, ids.offsets[:-1][tagged], tag_ids),
            offsets_of(ids.lengths + np.isin(np.arange(len(ids)), tagged)),
        )

    def _replace_unknown(
        self, ids: Ragged, encodings: Sequence[Encoding], rests: list[str]
    ) -> None:
        """In place: what the SentencePiece model does not know may have an id all the same."""
        for row in np.unique(ids.row_of_value[ids.values == self._pieces.unknown]):
            values: Int64Array = ids.row(row)
            tokens, spans = encodings[row].tokens, encodings[row].offsets
            for place in np.flatnonzero(values == self._pieces.unknown):
                name = tokens[place]
                if name == self._unknown_token:  # a model of BPE does not say what it stands for
                    name = self._normalized(rests[row][slice(*spans[place])])
                values[place] = self._index_of(name)
        ids.values[ids.values >= self._pieces.num_ids] = self._pieces.unknown

    def _index_of(self, name: str) -> int:
        index = self._tokenizer.token_to_id(" " + name)
        return self._pieces.unknown if index is None else index

    def _normalized(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)


def tag_of(text: str) -> str:
    """What a text begins with up to `<<`, if that is `>>`; else nothing."""
    end = text.find("<<") if text.startswith(">>") else -1
    return text[: end + 2] if end >= 0 else ""
