"""Pairs of texts as a model takes them: ids, with languages where it learnt them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from seqloss.bundle.manifest import Languages, Text
from seqloss.bundle.reader import Bundle
from seqloss.errors import Fault, InvalidRequestError, NoTokenizerError
from seqloss.tokenization.encoded import EncodedTexts
from seqloss.tokenization.pieces import tag_of
from seqloss.tokenization.side import Side

# Of a name that somebody made up so much is repeated back.
_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class TextPairs:
    """What is to be encoded.

    Attributes:
        sources: as they were sent.
        targets: as they were sent.
        source_language: of all sources, by its name in the bundle; None where none is given.
        target_language: of all targets, likewise.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    source_language: str | None = None
    target_language: str | None = None


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Texts as a model takes them.

    Attributes:
        sources: with their language, where the model is told it.
        targets: likewise.
        prefix_length: tokens at the beginning of each target that are fed and do not count.
        start_id: the decoder's first input; None where it is the model's own.
    """

    sources: EncodedTexts
    targets: EncodedTexts
    prefix_length: int = 0
    start_id: int | None = None


class TextEncoder:
    """Makes ids of texts for one model; its tokenizers are loaded when the first texts come.

    Threads may share it.
    """

    def __init__(
        self, text: Text | None, languages: Languages | None, content: Callable[[str], bytes]
    ) -> None:
        """Loads nothing.

        Args:
            text: what the manifest says of tokenizers.
            languages: what it says of languages.
            content: reads a file of the bundle.
        """
        self._text = text
        self._languages = languages
        self._content = content
        self._lock = threading.Lock()
        self._loaded: tuple[Side, Side] | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> TextEncoder:
        """That of a bundle, which may have no tokenizers."""
        return cls(bundle.manifest.text, bundle.manifest.languages, bundle.content)

    def encode(self, pairs: TextPairs, *, with_tokens: bool) -> EncodedPairs:
        """Encodes all sources and all targets; to be called off the event loop.

        Args:
            pairs: the texts, and their languages.
            with_tokens: whether tokens and their spans are wanted.

        Raises:
            NoTokenizerError: there is no tokenizer, or nothing to run it with.
            RequestTooLargeError: a text is longer than any model takes.
            InvalidRequestError: languages that the model has not, or has and are not given; texts
                with a tag of their own beside the target's language; texts that cannot be encoded.
        """
        source_side, target_side = self._sides()
        source_id, target_id = self._language_ids(pairs)
        tag = self._tag(pairs)
        sources = source_side.encode(
            [tag + text for text in pairs.sources] if tag else pairs.sources,
            "sources",
            with_tokens=with_tokens,
        ).without_characters(len(tag))
        targets = target_side.encode(pairs.targets, "targets", with_tokens=with_tokens)
        languages = self._languages
        if languages is None:
            return EncodedPairs(sources, targets)
        if source_id is not None and languages.source == "first":
            sources = sources.beginning_with(source_id, source_side.name_of(source_id))
        elif source_id is not None:
            sources = sources.ending_with(source_id, source_side.name_of(source_id))
        if target_id is not None and languages.target == "decoder_start":
            return EncodedPairs(sources, targets, start_id=target_id)
        if target_id is not None and languages.target == "first":
            targets = targets.beginning_with(target_id, target_side.name_of(target_id))
            return EncodedPairs(sources, targets, prefix_length=1)
        return EncodedPairs(sources, targets)

    def _tag(self, pairs: TextPairs) -> str:
        """What to put before every source, for models that read the target's language there."""
        languages, language = self._languages, pairs.target_language
        if languages is None or languages.target != "first_of_source" or language is None:
            return ""
        _refuse_tagged(pairs.sources, languages)
        return f">>{language}<< "

    def _sides(self) -> tuple[Side, Side]:
        if self._text is None:
            raise NoTokenizerError(
                "the model's bundle has no tokenizer, so it takes ids and no texts; export the "
                "checkpoint again, with its tokenizer's files: `seqloss export` warns if it cannot "
                "use them"
            )
        with self._lock:
            if self._loaded is None:
                source = Side(self._text.source, self._content)
                is_one = self._text.source == self._text.target
                self._loaded = source, source if is_one else Side(self._text.target, self._content)
            return self._loaded

    def _language_ids(self, pairs: TextPairs) -> tuple[int | None, int | None]:
        """Ids of the languages that are given; all that are missing or unknown are faults."""
        languages = self._languages
        names = languages.ids if languages else {}
        is_told_source = languages is not None and languages.source != "none"
        needs_target = languages is not None and languages.target != "first_of_source"
        faults: list[Fault] = []
        ids = (
            _language_id(
                "source",
                pairs.source_language,
                names if is_told_source else {},
                faults,
                is_needed=is_told_source,
            ),
            _language_id("target", pairs.target_language, names, faults, is_needed=needs_target),
        )
        if faults:
            raise InvalidRequestError("; ".join(fault.detail for fault in faults), faults)
        return ids


def _language_id(
    side: str, name: str | None, known: dict[str, int], faults: list[Fault], *, is_needed: bool
) -> int | None:
    """The id of a language that is known, or None with a fault unless none is needed."""
    if name is None and not is_needed:
        return None
    if name in known:
        return known[name]
    field = f"{side}_language"
    these = f"give one of: {', '.join(known)}"
    code = "unknown_language"
    if not known:
        detail = f"{field}: the model is not told any; leave it out"
    elif name is None:
        code = "missing_language"
        detail = (
            f"{field} is missing, and the model must be told the language of its {side}s; {these}"
        )
    else:
        detail = f"{field}: there is no language {name[:_LONGEST_NAME]!r}; {these}"
    faults.append(Fault(code, detail, loc=(field,)))
    return None


def _refuse_tagged(sources: Sequence[str], languages: Languages) -> None:
    """A tag in the text and one in front of it would contradict each other."""
    tagged = [
        index
        for index, text in enumerate(sources)
        if (tag := tag_of(text.lstrip())) and tag[2:-2] in languages.ids
    ]
    if tagged:
        raise InvalidRequestError(
            f"{len(tagged)} sources begin with a language's tag, and target_language puts one "
            "there too; give one of the two",
            [
                Fault("inconsistent", f"source {index} begins with a tag", loc=("sources", index))
                for index in tagged
            ],
        )
