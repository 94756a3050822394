"""Tokenizers of bundles make what transformers' tokenizers of the checkpoints make."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, MarianConfig, PreTrainedTokenizerFast

from seqloss.bundle.manifest import MANIFEST_NAME
from seqloss.bundle.reader import Bundle, open_bundle
from seqloss.demo import CHECKPOINT
from seqloss.errors import BundleError
from seqloss.export import texts as export_texts
from seqloss.export.exporter import ExportOptions, export_checkpoint
from seqloss.export.languages import languages_of
from seqloss.export.texts import StoredText, stored_text_of
from seqloss.tokenization.encoder import EncodedPairs, TextEncoder, TextPairs
from tokenized_checkpoints import (
    ENGLISH,
    EVERY,
    GERMAN,
    TOKENIZED,
    save_m2m100,
    save_tokenized,
)

# What Marian's tokenizer says of every source text.
pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

SOURCES = [
    *ENGLISH,
    "the fox and the dog, 2024",
    "  spaces  at   both ends ",
    "Ω 狐狸 ß and ΩΩ狸 x",
    "\tA\nB\u3000C",
    "e\u0301 \ufb01 \uff21",
    "e\u0323\u0302 \u304b\u3099 \u1112\u1161\u11ab",
    "🦊",
    "",
    " ",
    "</s> in a text, and <unk>",
    ">>deu<< twice >>deu<< the fox",
    ">>xyz<< the fox",
    ">> the << fox",
]
TARGETS = [*GERMAN, *SOURCES[len(GERMAN) :], "Der Hund"][: len(SOURCES)]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random checkpoint of each family, once per run."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_tokenized(name, tmp_path_factory.mktemp("tokenized") / "checkpoint")
        return made[name]

    return make


def stored(folder: Path, model_type: str) -> StoredText | None:
    return stored_text_of(folder, languages_of(folder, model_type))


def encoded(folder: Path, model_type: str, pairs: TextPairs) -> EncodedPairs:
    languages = languages_of(folder, model_type)
    made = stored_text_of(folder, languages)
    assert made
    return TextEncoder(made.text, languages, made.files.__getitem__).encode(pairs, with_tokens=True)


def by_transformers(name: str, folder: Path, sources: list[str], targets: list[str]) -> Any:
    """Source ids, target ids, prefix length and start id, by the recipes of the README."""
    source_language, target_language = TOKENIZED[name].languages
    if name == "marian":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sources = [f">>{target_language}<< {text}" for text in sources]
    elif source_language:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, src_lang=source_language, tgt_lang=target_language
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    made = tokenizer(sources, text_target=targets)
    labels = made["labels"]
    if name in ("mbart-25", "plbart"):
        (start,) = {row[-1] for row in labels}
        return made["input_ids"], [row[:-1] for row in labels], 0, start
    prefix_length = 1 if source_language else 0
    return made["input_ids"], labels, prefix_length, None


def rows_of(pairs: EncodedPairs) -> Any:
    return (
        [row.tolist() for row in pairs.sources.ids.rows()],
        [row.tolist() for row in pairs.targets.ids.rows()],
        pairs.prefix_length,
        pairs.start_id,
    )


@pytest.mark.parametrize("name", TOKENIZED)
def test_ids_are_those_of_transformers(
    name: str, checkpoint_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint_of(name)
    sources = [text for text in SOURCES if not text.startswith(">>")]
    targets = TARGETS[: len(sources)]
    made = encoded(
        folder, TOKENIZED[name].model, TextPairs(sources, targets, *TOKENIZED[name].languages)
    )
    assert rows_of(made) == by_transformers(name, folder, sources, targets)
    assert not [record for record in caplog.records if record.name.startswith("seqloss")]


@pytest.mark.parametrize("name", TOKENIZED)
def test_bundles_hold_a_file_for_each_tokenizer(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    made = stored(checkpoint_of(name), TOKENIZED[name].model)
    assert made
    assert len(made.files) == TOKENIZED[name].num_files
    assert {made.text.source.path, made.text.target.path} == made.files.keys()


def test_marians_tags_in_the_text_are_those_of_transformers(
    checkpoint_of: Callable[[str], Path],
) -> None:
    folder = checkpoint_of("marian")
    made = rows_of(encoded(folder, "marian", TextPairs(SOURCES, TARGETS)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = tokenizer(SOURCES, text_target=TARGETS)
    assert made == (wanted["input_ids"], wanted["labels"], 0, None)
    vocabulary = tokenizer.get_vocab()
    by_text = dict(zip(SOURCES, made[0], strict=True))
    # The cases are what they are for: a tag is one id at the beginning only, an unknown one too.
    assert by_text[">>deu<< twice >>deu<< the fox"].count(vocabulary[">>deu<<"]) == 1
    assert by_text[">>xyz<< the fox"][0] == tokenizer.unk_token_id
    assert vocabulary["Ω"] in by_text["Ω 狐狸 ß and ΩΩ狸 x"]
    assert "Ω" not in tokenizer.spm_source.encode("Ω", out_type=int)


@pytest.mark.parametrize("name", ["marian", "m2m100", "m2m100 of BPE", "plbart", "t5"])
def test_texts_that_nobody_wrote_are_encoded_as_by_transformers(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    folder = checkpoint_of(name)
    languages = languages_of(folder, TOKENIZED[name].model)
    made = stored_text_of(folder, languages)
    assert made
    encoder = TextEncoder(made.text, languages, made.files.__getitem__)
    letters = sorted({letter for text in EVERY for letter in text} | set("  ▁<>\n\t🦊é"))
    some = st.text(st.sampled_from(letters) | st.characters(categories=("L", "N", "P", "S")))

    @given(st.lists(some.filter(lambda text: not text.startswith(">>")), min_size=1))
    def check(texts: list[str]) -> None:
        pairs = TextPairs(texts, texts, *TOKENIZED[name].languages)
        made = rows_of(encoder.encode(pairs, with_tokens=False))
        assert made == by_transformers(name, folder, texts, texts)

    check()


@pytest.mark.parametrize("name", TOKENIZED)
def test_spans_are_where_the_tokens_stand(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    texts = ["the quick brown fox", "It was 2024!", "Ω x"]
    pairs = TextPairs(texts, texts, *TOKENIZED[name].languages)
    made = encoded(checkpoint_of(name), TOKENIZED[name].model, pairs)
    for side in (made.sources, made.targets):
        assert side.tokens
        assert side.spans
        for text, ids, tokens, spans in zip(
            texts, side.ids.rows(), side.tokens, side.spans, strict=True
        ):
            assert len(ids) == len(tokens) == len(spans)
            covered = ""
            for token, span in zip(tokens, spans, strict=True):
                if span is None:
                    continue
                there = text[slice(*span)]
                covered += there
                if token != "<unk>":
                    assert there.strip() == token.replace("▁", " ").strip()
            assert covered.replace(" ", "") == text.replace(" ", "")
            assert {span for token, span in zip(tokens, spans, strict=True) if token == "</s>"} == {
                None
            }


def test_a_tag_in_the_text_stands_where_it_is(checkpoint_of: Callable[[str], Path]) -> None:
    text = ">>deu<< the fox"
    made = encoded(checkpoint_of("marian"), "marian", TextPairs([text], [text]))
    assert made.sources.tokens
    assert made.sources.spans
    assert made.sources.tokens[0][0] == ">>deu<<"
    spans = [span for span in made.sources.spans[0] if span]
    assert spans[0] == (0, 7)
    assert text[slice(*spans[-1])] == text[spans[-1][0] :]


def test_a_text_whose_characters_were_composed_has_no_spans(
    checkpoint_of: Callable[[str], Path],
) -> None:
    texts = ["cafe\u0301", "cafe"]
    made = encoded(checkpoint_of("plbart"), "plbart", TextPairs(texts, texts, "java", "en_XX"))
    assert made.sources.spans
    assert not any(made.sources.spans[0])
    assert any(made.sources.spans[1])


def test_many_texts_and_long_ones_are_encoded_as_one_by_one(
    checkpoint_of: Callable[[str], Path],
) -> None:
    folder = checkpoint_of("marian")
    long = "the lazy dog and the quick fox " * 10_000
    texts = [f"{'>>deu<< ' * (index % 2)}the fox {index}" for index in range(1_100)]
    texts += [long, "", long, "the end"]
    made = encoded(folder, "marian", TextPairs(texts, texts))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = tokenizer(texts, text_target=texts, verbose=False)
    assert rows_of(made)[:2] == (wanted["input_ids"], wanted["labels"])
    assert made.sources.tokens
    assert made.sources.spans
    lengths = [len(row) for row in wanted["input_ids"]]
    assert [len(row) for row in made.sources.tokens] == lengths
    assert [len(row) for row in made.sources.spans] == lengths


# ---------------------------------------------------------------- losses


def ids_request(name: str, folder: Path, sources: list[str], targets: list[str]) -> dict[str, Any]:
    source_ids, target_ids, prefix_length, start = by_transformers(name, folder, sources, targets)
    return {
        "source_ids": source_ids,
        "target_ids": target_ids,
        "prefix_length": prefix_length,
        "decoder_start_token_id": start,
        "return": ["token_losses", "token_ranks"],
        "reproducible": True,
    }


@pytest.mark.parametrize("name", TOKENIZED)
def test_losses_of_texts_are_those_of_the_ids_of_transformers(
    name: str, checkpoint_of: Callable[[str], Path], make_client: Any, tmp_path: Path
) -> None:
    """To the bit, which takes batches that are made alike."""
    folder = checkpoint_of(name)
    export_checkpoint(str(folder), tmp_path / "bundle", ExportOptions())
    service = make_client({"tokenized": open_bundle(tmp_path / "bundle")})
    sources, targets = ["The lazy dog", "Where is £4,300?"], ["Der faule Hund", "außer 敏捷"]
    source_language, target_language = TOKENIZED[name].languages
    body = {
        "sources": sources,
        "targets": targets,
        "source_language": source_language,
        "target_language": target_language,
        "return": ["token_losses", "token_ranks"],
        "reproducible": True,
    }
    response = service.post("/loss/text", json=body)
    assert response.status_code == 200, response.text
    by_ids = service.post("/loss", json=ids_request(name, folder, sources, targets)).json()
    made = response.json()
    same = ("losses", "nlls", "num_tokens", "token_losses", "token_ranks", "aggregate")
    assert {key: made[key] for key in same} == {key: by_ids[key] for key in same}
    for tokens, losses in zip(made["target_tokens"], made["token_losses"], strict=True):
        assert len(tokens) == len(losses)
    (model,) = service.get("/models").json()["models"]
    assert model["text"] is True


# ---------------------------------------------------------------- what cannot be stored


def warning_of(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [record for record in caplog.records if record.name == export_texts.__name__]
    assert record.levelno == logging.WARNING
    return record.getMessage()


def test_a_checkpoint_without_tokenizer_takes_no_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MarianConfig().save_pretrained(tmp_path)
    assert stored_text_of(tmp_path, None) is None
    assert not caplog.records


def test_a_tokenizer_that_makes_other_ids_is_not_stored(
    checkpoint_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As where transformers does in Python what the stored tokenizer knows nothing of."""
    folder = checkpoint_of("t5")
    call = PreTrainedTokenizerFast.__call__

    def lower_cased(self: Any, text: Any = None, **rest: Any) -> Any:
        return call(self, [one.lower() for one in text] if isinstance(text, list) else text, **rest)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lower_cased)
    assert stored(folder, "t5") is None
    said = warning_of(caplog)
    assert "as a source, 'Hello, world!' has the ids [" in said
    assert "takes no texts" in said


def test_a_model_with_symbols_of_users_is_not_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_m2m100(tmp_path, user_defined_symbols=["<sep>"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    assert stored(tmp_path, "m2m_100") is None
    assert "symbols that users defined" in warning_of(caplog)


def test_truncation_and_padding_of_a_tokenizer_are_left_behind(tmp_path: Path) -> None:
    """Many that are published cut texts at 512 tokens."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    MarianConfig().save_pretrained(tmp_path)
    texts = ["Thursday, March 5, 2026 at 4:05 PM"]
    made = encoded(tmp_path, "marian", TextPairs(texts, texts))
    plain = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(texts[0]).ids
    assert made.sources.ids.values.tolist() == made.targets.ids.values.tolist() == plain
    (content,) = {*map(bytes.decode, stored(tmp_path, "marian").files.values())}  # type: ignore[union-attr]
    assert json.loads(content)["truncation"] is json.loads(content)["padding"] is None


def test_the_demo_takes_texts(bundle_of: Callable[[str], Bundle]) -> None:
    manifest = bundle_of("demo").manifest
    assert manifest.text
    assert manifest.text.source == manifest.text.target
    assert manifest.text.source.path in manifest.files


def test_a_tokenizer_that_is_not_listed_is_refused(
    bundle_of: Callable[[str], Bundle], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_of("demo").folder, folder)
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["text"]["target"]["path"] = "tokenizer/other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError) as error:
        open_bundle(folder)
    assert "tokenizer/other.json is not listed" in str(error.value)
