"""Languages of real tokenizers: their ids, and requests that are what transformers makes."""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    GenerationConfig,
    M2M100Config,
    M2M100Tokenizer,
    MarianConfig,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartTokenizer,
    NllbTokenizer,
    PLBartConfig,
    PLBartTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.models.m2m_100 import modeling_m2m_100
from transformers.models.marian import modeling_marian
from transformers.models.mbart import modeling_mbart
from transformers.models.plbart import modeling_plbart

from seqloss.demo import CHECKPOINT
from seqloss.errors import CheckpointError
from seqloss.export.languages import generation_ids, languages_of

# What Marian's tokenizer says of every source text.
pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

SOURCE, TARGET = "the dog jumps", "der hund springt"
SENTENCES = ["the quick brown fox jumps over the lazy dog", "der hund springt über den zaun"] * 9
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
EOS, PAD, UNKNOWN = 2, 1, 3  # of all families here but Marian, whose ids are further below


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model."""
    path = tmp_path_factory.mktemp("pieces") / "sentencepiece.bpe.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
    return path


def vocabulary(pieces: Path, first: Iterable[str], last: Iterable[str] = ()) -> dict[str, int]:
    """The model's pieces between tokens that it does not have."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    own = (model.id_to_piece(index) for index in range(3, len(model)))
    return {token: index for index, token in enumerate([*first, *own, *last])}


def letters() -> list[str]:
    return ["▁", *string.ascii_lowercase]


def save(folder: Path, tokenizer: Any, config: Any, **changes: Any) -> Path:
    """A checkpoint's files but for the weights; the model has a few ids more than the tokenizer."""
    config(**{"vocab_size": max(tokenizer.get_vocab().values()) + 9} | changes).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_nllb(folder: Path, pieces: Path, **settings: Any) -> Path:
    words = {token: index for index, token in enumerate([*SPECIAL, *letters()])}
    return save(folder, NllbTokenizer(vocab=words, merges=[], **settings), M2M100Config)


def save_m2m100(folder: Path, pieces: Path, **changes: Any) -> Path:
    folder.mkdir()
    words = vocabulary(pieces, SPECIAL)
    (folder / "words.json").write_text(json.dumps(words))
    tokenizer = M2M100Tokenizer(str(folder / "words.json"), str(pieces))
    (folder / "words.json").unlink()
    # A hundred languages, and eight ids that mean nothing.
    return save(folder, tokenizer, M2M100Config, **{"vocab_size": len(words) + 108} | changes)


def save_mbart(folder: Path, pieces: Path) -> Path:
    codes = MBartTokenizer().lang_code_to_id
    scores = [(token, -1.0) for token in [*SPECIAL, *letters(), *codes, "<mask>"]]
    return save(folder, MBartTokenizer(vocab=scores), MBartConfig)


def save_mbart50(folder: Path, pieces: Path) -> Path:
    scores = [(token, -1.0) for token in ["<unk>", "<s>", "</s>", *letters()]]
    return save(folder, MBart50Tokenizer(vocab=scores), MBartConfig)


def save_plbart(folder: Path, pieces: Path, **settings: Any) -> Path:
    return save(folder, PLBartTokenizer(str(pieces), **settings), PLBartConfig)


def save_marian(folder: Path, pieces: Path) -> Path:
    folder.mkdir()
    words = vocabulary(pieces, ["</s>", "<unk>"], [">>deu<<", ">>cmn_Hans<<", "<pad>"])
    (folder / "words.json").write_text(json.dumps(words))
    tokenizer = MarianTokenizer(
        str(pieces), str(pieces), str(folder / "words.json"), source_lang="en", target_lang="mul"
    )
    (folder / "words.json").unlink()
    # Real ones have two sentencepiece models, by these names.
    tokenizer.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} >= {"source.spm", "target.spm", "vocab.json"}
    return save(folder, tokenizer, MarianConfig, pad_token_id=words["<pad>"], eos_token_id=0)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.startswith("seqloss")]


class Family:
    """A family: how its checkpoints are made, and what transformers makes of a pair."""

    def __init__(
        self,
        make: Callable[..., Path],
        tokenizer: Any,
        model_type: str,
        languages: tuple[str, str],
        places: tuple[str, str],
        token: str = "{}",  # noqa: S107 - of a language
        **settings: Any,
    ) -> None:
        self.make, self.settings = make, settings
        self.tokenizer_class, self.model_type = tokenizer, model_type
        self.source_language, self.target_language = languages
        self.places = places
        self.token = token

    def save(self, folder: Path, pieces: Path) -> Path:
        return self.make(folder, pieces, **self.settings)

    def tokenizer(self, folder: Path) -> Any:
        if self.model_type == "marian":
            return self.tokenizer_class.from_pretrained(folder)
        return self.tokenizer_class.from_pretrained(
            folder, src_lang=self.source_language, tgt_lang=self.target_language
        )

    def shifted(self, labels: list[int], pad: int) -> list[int]:
        """What transformers feeds the decoder with, in training, given the labels."""
        batch = torch.tensor([labels])
        if self.model_type == "mbart":
            shifted = modeling_mbart.shift_tokens_right(batch, pad)
        elif self.model_type == "plbart":
            shifted = modeling_plbart.shift_tokens_right(batch, pad)
        elif self.model_type == "marian":
            shifted = modeling_marian.shift_tokens_right(batch, pad, pad)
        else:
            shifted = modeling_m2m_100.shift_tokens_right(batch, pad, EOS)
        return list(shifted[0].tolist())


FAMILIES = {
    "nllb": Family(
        save_nllb, NllbTokenizer, "m2m_100", ("eng_Latn", "zho_Hans"), ("first", "first")
    ),
    "nllb with languages of its own": Family(
        save_nllb,
        NllbTokenizer,
        "m2m_100",
        ("deu_Latn", "tyv_Cyrl"),
        ("first", "first"),
        extra_special_tokens=["deu_Latn", "tyv_Cyrl", "<spare>"],
    ),
    "m2m100": Family(
        save_m2m100, M2M100Tokenizer, "m2m_100", ("en", "ast"), ("first", "first"), "__{}__"
    ),
    "mbart-25": Family(
        save_mbart, MBartTokenizer, "mbart", ("en_XX", "ro_RO"), ("last", "decoder_start")
    ),
    "mbart-50": Family(
        save_mbart50, MBart50Tokenizer, "mbart", ("en_XX", "af_ZA"), ("first", "first")
    ),
    "plbart": Family(
        save_plbart,
        PLBartTokenizer,
        "plbart",
        ("java", "en_XX"),
        ("last", "decoder_start"),
        "__{}__",
    ),
    "plbart of many": Family(
        save_plbart,
        PLBartTokenizer,
        "plbart",
        ("python", "ruby"),
        ("last", "decoder_start"),
        "__{}__",
        language_codes="multi",
    ),
    "marian": Family(
        save_marian,
        MarianTokenizer,
        "marian",
        ("", "cmn_Hans"),
        ("none", "first_of_source"),
        ">>{}<<",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_places_are_those_of_the_family(
    name: str, tmp_path: Path, pieces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "checkpoint", pieces)
    languages = languages_of(folder, family.model_type)
    assert languages
    assert (languages.source, languages.target) == family.places
    tokenizer = family.tokenizer(folder)
    for language, index in languages.ids.items():
        assert tokenizer.convert_ids_to_tokens(index) == family.token.format(language)
    assert len(set(languages.ids.values())) == len(languages.ids)
    assert tokenizer.unk_token_id not in languages.ids.values()
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("nllb", 202),
        ("nllb with languages of its own", 2),
        ("m2m100", 100),
        ("mbart-25", 25),
        ("mbart-50", 52),
        ("plbart", 3),
        ("plbart of many", 7),
        ("marian", 2),
    ],
)
def test_no_language_is_forgotten(name: str, count: int, tmp_path: Path, pieces: Path) -> None:
    family = FAMILIES[name]
    languages = languages_of(family.save(tmp_path / "checkpoint", pieces), family.model_type)
    assert languages
    assert len(languages.ids) == count


@pytest.mark.parametrize("name", FAMILIES)
def test_a_request_by_the_recipe_is_what_transformers_makes(
    name: str, tmp_path: Path, pieces: Path
) -> None:
    family = FAMILIES[name]
    folder = family.save(tmp_path / "checkpoint", pieces)
    languages = languages_of(folder, family.model_type)
    assert languages
    tokenizer = family.tokenizer(folder)
    marian = family.model_type == "marian"
    start = tokenizer.pad_token_id if marian else tokenizer.eos_token_id

    # The recipe, as the README has it. It starts from `X </s>` and `Y </s>`.
    end = tokenizer.eos_token_id
    source = [*tokenizer(SOURCE, add_special_tokens=False)["input_ids"], end]
    target = [*tokenizer(text_target=TARGET, add_special_tokens=False)["input_ids"], end]
    if languages.source == "first":
        source = [languages.ids[family.source_language], *source]
    elif languages.source == "last":
        source = [*source, languages.ids[family.source_language]]
    wanted = languages.ids[family.target_language]
    if languages.target == "first":
        target = [wanted, *target]
    elif languages.target == "decoder_start":
        start = wanted
    else:
        source = [wanted, *source]

    text = family.token.format(family.target_language) + " " + SOURCE if marian else SOURCE
    made = tokenizer(text, text_target=TARGET)
    assert source == made["input_ids"]
    fed = family.shifted(made["labels"], tokenizer.pad_token_id)
    labels = made["labels"]
    if languages.target == "decoder_start":
        # Labels go on to the language, of which nothing is left to say after the end.
        assert labels[-2:] == [end, wanted]
        labels, fed = labels[:-1], fed[:-1]
    assert target == labels
    assert [start, *target[:-1]] == fed


def test_a_legacy_nllb_gets_its_target_language_as_generation_forces_it(
    tmp_path: Path, pieces: Path
) -> None:
    """Its labels end in the language; the model was not trained so, and its shift wraps nothing."""
    folder = save_nllb(tmp_path / "checkpoint", pieces, legacy_behaviour=True)
    languages = languages_of(folder, "m2m_100")
    assert languages
    assert (languages.source, languages.target) == ("last", "first")
    tokenizer = NllbTokenizer.from_pretrained(folder, src_lang="eng_Latn", tgt_lang="deu_Latn")
    made = tokenizer(SOURCE, text_target=TARGET)
    assert made["input_ids"][-1] == languages.ids["eng_Latn"]
    assert made["labels"][-1] == languages.ids["deu_Latn"]


def test_mbart_50_is_read_from_its_sentencepiece_model(tmp_path: Path, pieces: Path) -> None:
    """The checkpoints on the hub have no tokenizer.json."""
    pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece models with it")
    folder = save(tmp_path / "checkpoint", MBart50Tokenizer(), MBartConfig, vocab_size=120)
    (folder / "tokenizer.json").unlink()
    (folder / "sentencepiece.bpe.model").write_bytes(pieces.read_bytes())
    languages = languages_of(folder, "mbart")
    assert languages
    assert languages.source == languages.target == "first"
    # fairseq has one id more before the pieces, and languages behind them in their order.
    first = len(sentencepiece.SentencePieceProcessor(model_file=str(pieces))) + 1
    assert min(languages.ids.values()) == languages.ids["ar_AR"] == first
    assert sorted(languages.ids.values()) == list(range(first, first + 52))


def test_tags_are_found_in_a_tokenizer_json_without_sentencepiece_models() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    languages = languages_of(CHECKPOINT, "marian")
    assert languages
    assert languages.ids == {
        name: tokenizer.token_to_id(f">>{name}<<") for name in ("de", "es", "fr")
    }
    assert (languages.source, languages.target) == ("none", "first_of_source")


def test_a_tag_that_is_not_one_id_in_a_text_is_no_language(tmp_path: Path) -> None:
    content = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] != ">>fr<<"
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    MarianConfig().save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(tokenizer(">>fr<< a")["input_ids"]) > len(tokenizer(">>de<< a")["input_ids"])
    languages = languages_of(tmp_path, "marian")
    assert languages
    assert languages.ids.keys() == {"de", "es"}


@pytest.mark.parametrize("config", [T5Config, BartConfig])
def test_a_model_without_languages_has_none(
    config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """T5's prefixes, such as `translate English to German: `, are text like any other."""
    content = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:3]
    content["model"]["vocab"] = {
        token: index
        for token, index in content["model"]["vocab"].items()
        if not token.startswith(">>")
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    folder = save(tmp_path / "checkpoint", tokenizer, config)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    assert languages_of(folder, config.model_type) is None
    assert not warnings_of(caplog)


def test_t5_with_its_own_tokenizer_has_none(
    tmp_path: Path, pieces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece models with it")
    T5Config().save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(pieces.read_bytes())
    assert languages_of(tmp_path, "t5") is None
    assert not warnings_of(caplog)


def test_a_checkpoint_without_tokenizer_has_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MBartConfig().save_pretrained(tmp_path)
    assert languages_of(tmp_path, "mbart") is None
    assert not warnings_of(caplog)


def spoil_file(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:-100])


def lose_vocabulary(folder: Path) -> None:
    """Transformers then makes up a tokenizer of a few tokens."""
    (folder / "tokenizer.json").unlink()
    assert len(AutoTokenizer.from_pretrained(folder)) < 40


def lose_languages(folder: Path) -> None:
    """Transformers then encodes every language as the unknown token."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    codes = MBartTokenizer().lang_code_to_id
    content["model"]["vocab"] = [
        entry for entry in content["model"]["vocab"] if entry[0] not in codes
    ]
    content["added_tokens"] = []
    path.write_text(json.dumps(content))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": []}))
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][-1] == UNKNOWN


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_file, "EOF while parsing"),
        (lose_vocabulary, "none of sentencepiece.bpe.model, tokenizer.json"),
        (lose_languages, "no id of any"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_a_warning(
    spoil: Callable[[Path], None],
    reason: str,
    tmp_path: Path,
    pieces: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = save_mbart(tmp_path / "checkpoint", pieces)
    assert languages_of(folder, "mbart")
    spoil(folder)
    assert languages_of(folder, "mbart") is None
    (record,) = warnings_of(caplog)
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert "does not list its languages" in record.getMessage()


def test_code_of_a_checkpoint_is_not_run(
    tmp_path: Path, pieces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_m2m100(tmp_path / "checkpoint", pieces)
    path = folder / "tokenizer_config.json"
    changes = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    languages_of(folder, "m2m_100")
    assert not (tmp_path / "ran").exists()


def test_languages_that_the_model_was_cut_down_by_are_left_out(
    tmp_path: Path, pieces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """M2M100's tokenizer always has all of its languages, one after the other."""
    size = len(vocabulary(pieces, SPECIAL)) + 3
    folder = save_m2m100(tmp_path / "checkpoint", pieces, vocab_size=size)
    tokenizer = M2M100Tokenizer.from_pretrained(folder)
    assert len(tokenizer.lang_code_to_id) == 100
    languages = languages_of(folder, "m2m_100")
    assert languages
    assert languages.ids == {name: tokenizer.get_lang_id(name) for name in ("af", "am", "ar")}
    (record,) = warnings_of(caplog)
    assert f"ast ({size})" in record.getMessage()
    assert "and 85 more" in record.getMessage()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, pieces: Path) -> None:
    size = len(vocabulary(pieces, SPECIAL))
    folder = save_m2m100(tmp_path / "checkpoint", pieces, vocab_size=size)
    with pytest.raises(CheckpointError, match=rf"tokenizer of another model.* af \({size}\)"):
        languages_of(folder, "m2m_100")


@pytest.mark.parametrize(
    ("config", "generation", "forced_bos", "forced_eos"),
    [
        ({}, None, None, None),
        ({"forced_bos_token_id": 0}, None, 0, None),
        ({}, {"forced_bos_token_id": 5, "forced_eos_token_id": [2, 3]}, 5, 2),
        ({"forced_bos_token_id": 4}, {"forced_bos_token_id": 5, "forced_eos_token_id": 2}, 4, 2),
        ({"forced_bos_token_id": None}, {"forced_bos_token_id": 5}, 5, None),
    ],
)
def test_ids_are_those_of_the_configuration_or_of_generation(
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    forced_bos: int | None,
    forced_eos: int | None,
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.json"
    M2M100Config().save_pretrained(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if generation is not None:
        GenerationConfig(**generation).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert generation_ids(tmp_path, loaded) == {
        "decoder_start_token_id": loaded.decoder_start_token_id,
        "pad_token_id": loaded.pad_token_id,
        "bos_token_id": loaded.bos_token_id,
        "eos_token_id": loaded.eos_token_id,
        "forced_bos_token_id": forced_bos,
        "forced_eos_token_id": forced_eos,
    }


def test_a_start_may_be_known_to_generation_only(tmp_path: Path) -> None:
    config = MBartConfig()
    config.save_pretrained(tmp_path)
    assert generation_ids(tmp_path, config)["decoder_start_token_id"] is None
    GenerationConfig(decoder_start_token_id=20).save_pretrained(tmp_path)
    ids = generation_ids(tmp_path, config)
    assert ids["decoder_start_token_id"] == 20
    assert ids["forced_eos_token_id"] == config.forced_eos_token_id


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_generation_config_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_ids(tmp_path, M2M100Config())
