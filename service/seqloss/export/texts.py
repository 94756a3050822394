"""Makes the tokenizers of a bundle, and holds them against the checkpoint's own."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import AutoConfig

from seqloss.bundle import manifest
from seqloss.bundle.manifest import TOKENIZER_FOLDER, Languages, Text
from seqloss.export.languages import has_tokenizer, one_line, silence, tokenizer_of
from seqloss.export.pieces import converted_pieces
from seqloss.tokenization.encoder import TextEncoder, TextPairs

_LOG = logging.getLogger(__name__)

# What tokenizers treat differently from one another: spaces, cases, digits, marks, scripts,
# symbols, forms that normalisation changes.
_SAMPLES = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog; it's 3.14 times faster than 2 others.",
    "  two  spaces,   three, and one at the end ",
    "a\tb\nc",
    "(naïve) café — “quoted” … l\u2019été, Straße, ÅNGSTRÖM, İstanbul",
    "e\u0301 and \u00e9, \ufb01ne, \uff21\uff22\uff23, x\u00b2, \u2460, 5\u00a0km",
    "de\u0301compose\u0301: e\u0323\u0302, \u304b\u3099, \u1112\u1161\u11ab",
    "Привет, мир! Доброе утро.",
    "你好\uff0c世界。今天天气很好\uff01",
    "日本語のテキスト、カタカナ。",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "안녕하세요 세계",
    "emoji 😀👍🏽 and signs € £ ¥ © ½ ∑ →",
    "https://example.org/path?x=1&y=2 user@example.org #tag @name",
    "for (int i = 0; i < n; ++i) { a[i] = b[i] + 0x1F; }",
    "ALL CAPITALS and MiXeD cAsEs",
    "don't can't I'm you're we'll",
    "a",
    "",
    " ",
    ">>xyz<< a text that begins with what may be a tag",
    "1 << 2 >> 3",
)
_NUM_DRAWN = 64
_MOST_DRAWN_TOKENS = 24
# Of many languages so many are tried.
_NUM_LANGUAGES = 6


@dataclass(frozen=True, slots=True)
class StoredText:
    """What a bundle holds to make ids of texts.

    Attributes:
        text: what its manifest says of them.
        files: the tokenizers, by their paths inside the bundle.
    """

    text: Text
    files: dict[str, bytes]


def stored_text_of(folder: Path, languages: Languages | None) -> StoredText | None:
    """The tokenizers of a checkpoint, which make what transformers makes.

    None where the checkpoint has no tokenizer, and also, with a warning in the log, where it has
    one that does not load, or whose ids would be others: losses of ids can be computed without.

    Args:
        folder: of the checkpoint, with its config.json.
        languages: how the model is told the languages of a pair.
    """
    if not has_tokenizer(folder):
        return None
    try:
        with silence():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            tokenizer = tokenizer_of(folder, config)
            stored = _stored(tokenizer, languages)
            _require_equal(tokenizer, stored, languages)
    # What is wrong with a tokenizer surfaces as whatever its class raises.
    except Exception as error:
        _LOG.warning(
            "%s: the bundle takes no texts, because its tokenizer cannot be stored: %s. Losses of "
            "ids are the same without it.",
            folder,
            one_line(error),
        )
        return None
    return stored


def _stored(tokenizer: Any, languages: Languages | None) -> StoredText:
    if hasattr(type(tokenizer), "src_lang"):
        if languages is None:
            raise ValueError("it is switched between languages, and they are not known")
        tokenizer.src_lang = tokenizer.tgt_lang = next(iter(languages.ids))
    source: tuple[bytes, manifest.Pieces | None]
    target: tuple[bytes, manifest.Pieces | None]
    if hasattr(tokenizer, "backend_tokenizer"):
        source = target = _serialized(_backend(tokenizer)), None
    else:
        source = _converted(tokenizer)
        tokenizer._switch_to_target_mode()  # as `text_target` does
        target = _converted(tokenizer)
        tokenizer._switch_to_input_mode()
    if source == target:
        names = ("tokenizer.json", "tokenizer.json")
    else:
        names = ("source.json", "target.json")
    paths = [f"{TOKENIZER_FOLDER}/{name}" for name in names]
    sides = [
        manifest.Tokenizer(path=path, pieces=pieces)
        for path, (_, pieces) in zip(paths, (source, target), strict=True)
    ]
    return StoredText(
        Text(source=sides[0], target=sides[1]),
        dict(zip(paths, (source[0], target[0]), strict=True)),
    )


def _backend(tokenizer: Any) -> Tokenizer:
    """A fast tokenizer's, as transformers assembled it; where it puts a language, without."""
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if hasattr(type(tokenizer), "src_lang"):
        _end_with(made, tokenizer)
    return made


def _converted(tokenizer: Any) -> tuple[bytes, manifest.Pieces]:
    converted = converted_pieces(tokenizer)
    _end_with(converted.tokenizer, tokenizer)
    return _serialized(converted.tokenizer), converted.pieces


def _end_with(made: Tokenizer, tokenizer: Any) -> None:
    """Has every text end in the token that all these families end them with."""
    end = str(tokenizer.eos_token)
    made.post_processor = processors.TemplateProcessing(
        single=["$A", end], special_tokens=[(end, tokenizer.eos_token_id)]
    )


def _serialized(made: Tokenizer) -> bytes:
    made.no_truncation()
    made.no_padding()
    return made.to_str().encode()


# ---------------------------------------------------------------- is it the same?


def _require_equal(tokenizer: Any, stored: StoredText, languages: Languages | None) -> None:
    """Encodes texts with what is stored and with the tokenizer itself.

    Raises:
        ValueError: ids differ.
    """
    encoder = TextEncoder(stored.text, languages, stored.files.__getitem__)
    every = [*_SAMPLES, *_drawn(tokenizer)]
    untagged = [text for text in every if ">>" not in text]
    for source_language, target_language in _tried(languages):
        samples = every if target_language is None else untagged
        made = encoder.encode(
            TextPairs(samples, samples, source_language, target_language), with_tokens=False
        )
        sources, targets = _by_transformers(
            tokenizer, samples, languages, source_language, target_language
        )
        for side, wanted, rows in (
            ("source", sources, made.sources.ids.rows()),
            ("target", targets, made.targets.ids.rows()),
        ):
            for text, ids, row in zip(samples, wanted, rows, strict=True):
                if ids != row.tolist():
                    raise ValueError(
                        f"as a {side}, {text!r} has the ids {ids} by transformers, and what can be "
                        f"stored makes {row.tolist()}"
                    )


def _drawn(tokenizer: Any) -> Iterator[str]:
    """Texts of the vocabulary's own words, and of what it has that texts hardly ever have."""
    generator = random.Random(20)  # noqa: S311 - they shall be the same each time
    names = sorted(tokenizer.get_vocab())
    for _ in range(_NUM_DRAWN):
        drawn = generator.choices(names, k=generator.randint(1, _MOST_DRAWN_TOKENS))
        yield "".join(drawn).replace("▁", " ").replace("Ġ", " ")


def _tried(languages: Languages | None) -> Iterator[tuple[str | None, str | None]]:
    """Names of source and target languages."""
    if languages is None or languages.target == "first_of_source":
        yield None, None
    if languages is None:
        return
    names = list(languages.ids)
    some = names[:: -(-len(names) // _NUM_LANGUAGES)]
    for source, target in zip(some, [*some[1:], some[0]], strict=True):
        is_told = languages.source != "none"
        yield source if is_told else None, target


def _by_transformers(
    tokenizer: Any,
    texts: list[str],
    languages: Languages | None,
    source_language: str | None,
    target_language: str | None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Source ids and labels, as the service feeds them to the model."""
    if languages is None or languages.target == "first_of_source":
        tag = f">>{target_language}<< " if target_language else ""
        tagged = [tag + text for text in texts]
        return tokenizer(tagged)["input_ids"], tokenizer(text_target=texts)["input_ids"]
    tokenizer.src_lang, tokenizer.tgt_lang = source_language, target_language
    sources = tokenizer(texts)["input_ids"]
    labels = tokenizer(text_target=texts)["input_ids"]
    index = languages.ids[str(target_language)]
    if languages.target == "decoder_start":
        return sources, [_without_last(row, index) for row in labels]
    return sources, [
        row if row[0] == index else [index, *_without_last(row, index)] for row in labels
    ]


def _without_last(labels: list[int], language: int) -> list[int]:
    """Labels without the language that they end in, behind `</s>`."""
    if labels[-1] != language:
        raise ValueError(f"labels do not end in the language's id, {language}")
    return labels[:-1]
