"""The tokenizer of sources, or of targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from seqloss.bundle.manifest import Tokenizer
from seqloss.errors import Fault, InvalidRequestError, NoTokenizerError, RequestTooLargeError
from seqloss.records import Ragged
from seqloss.tokenization.encoded import EncodedTexts, Span, joined
from seqloss.tokenization.pieces import PieceLookup

if TYPE_CHECKING:
    from tokenizers import Encoding

# Until its ids are read an encoding takes some hundred bytes per token, which texts of this length
# have 200 MB of; so many texts and characters, or one text, are encoded at a time. No model takes
# one that is longer.
_TEXTS_AT_ONCE = 512
_MOST_CHARACTERS = 500_000
# SentencePiece's, before the first piece of each word.
_WORD_MARK = "▁"


class Side:
    """A tokenizer that is loaded."""

    def __init__(self, stored: Tokenizer, content: Callable[[str], bytes]) -> None:
        """Loads it.

        Args:
            stored: what the manifest says of it.
            content: reads a file of the bundle.

        Raises:
            NoTokenizerError: the library `tokenizers` is absent, or does not read the file.
        """
        try:
            # Only here: a service whose requests carry ids runs without the library.
            import tokenizers  # noqa: PLC0415
        except ImportError as error:
            raise NoTokenizerError(
                "the service has no library to run tokenizers with; it needs: "
                "pip install 'seqloss[text]'"
            ) from error
        text = content(stored.path).decode("utf-8")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # The library raises plain exceptions.
        except Exception as error:
            raise NoTokenizerError(
                f"tokenizers {tokenizers.__version__} does not read the bundle's {stored.path}: "
                f"{error}"
            ) from error
        # A file may ask for either, and nothing is cut or added here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._lookup = stored.pieces and PieceLookup(stored.pieces, self._tokenizer)

    def name_of(self, index: int) -> str:
        """The token of an id; the id's digits where it has none."""
        return (self._tokenizer.id_to_token(index) or str(index)).removeprefix(" ")

    def encode(self, texts: Sequence[str], field: str, *, with_tokens: bool) -> EncodedTexts:
        """Ids, and tokens with their spans where asked for.

        Args:
            texts: all of a request.
            field: the request's, for faults.
            with_tokens: whether tokens and spans are wanted.

        Raises:
            RequestTooLargeError: a text is longer than any model takes.
            InvalidRequestError: the tokenizer has nothing for what a text holds.
        """
        _refuse_endless(texts, field)
        return joined(
            [
                self._encode(texts[part], part.start, field, with_tokens=with_tokens)
                for part in _parts(texts)
            ],
            with_tokens=with_tokens,
        )

    def _encode(
        self, texts: Sequence[str], start: int, field: str, *, with_tokens: bool
    ) -> EncodedTexts:
        """A part of a side, from the text of the number `start` on."""
        lookup = self._lookup
        tags, rests = lookup.split(texts) if lookup else ([""] * len(texts), [*texts])
        with_spans = with_tokens or lookup is not None
        encode = self._tokenizer.encode_batch if with_spans else self._tokenizer.encode_batch_fast
        try:
            encodings: list[Encoding] = encode(rests)
        # The library raises plain exceptions.
        except Exception as error:
            raise InvalidRequestError(
                f"the tokenizer cannot encode {field} {start} to {start + len(texts) - 1}: {error}",
                [Fault("not_encoded", str(error), loc=(field,))],
            ) from error
        ids = Ragged.from_rows([encoding.ids for encoding in encodings], np.int64)
        if lookup:
            ids = lookup.looked_up(ids, encodings, tags, rests)
        if not with_tokens:
            return EncodedTexts(ids)
        made = list(zip(encodings, tags, rests, texts, strict=True))
        return EncodedTexts(
            ids,
            [[tag, *encoding.tokens] if tag else encoding.tokens for encoding, tag, _, _ in made],
            [_spans(*one) for one in made],
        )


def _spans(encoding: Encoding, tag: str, rest: str, text: str) -> list[Span | None]:
    """Where the tokens of a tag and of what is encoded behind it stand in the text as it was sent.

    All None where it was not encoded as it was sent: its characters were composed, and nothing says
    where they stood before.
    """
    shift = len(tag)
    head: list[Span | None] = [(0, shift)] if tag else []
    if tag + rest != text:
        return [*head, *[None] * len(encoding)]
    return head + [
        (begin + shift, end + shift)
        # What marks the beginning of the text's first word has no space that it stands for, and is
        # said to stand where that word does.
        if begin < end and (token != _WORD_MARK or rest[begin:end].isspace())
        else None
        for token, (begin, end) in zip(encoding.tokens, encoding.offsets, strict=True)
    ]


def _parts(texts: Sequence[str]) -> Iterator[slice]:
    """What is encoded at a time."""
    start = num_characters = 0
    for index, text in enumerate(texts):
        num_characters += len(text)
        if index > start and (index - start == _TEXTS_AT_ONCE or num_characters > _MOST_CHARACTERS):
            yield slice(start, index)
            start, num_characters = index, len(text)
    if texts:
        yield slice(start, len(texts))


def _refuse_endless(texts: Sequence[str], field: str) -> None:
    for index, text in enumerate(texts):
        if len(text) > _MOST_CHARACTERS:
            detail = (
                f"text {index} of {field} has {len(text)} characters, and at most "
                f"{_MOST_CHARACTERS} are taken; no model takes so many tokens"
            )
            raise RequestTooLargeError(detail, [Fault("too_long", detail, loc=(field, index))])
