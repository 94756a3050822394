"""Small random checkpoints with SentencePiece tokenizers that are really trained."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import (
    AutoTokenizer,
    M2M100Tokenizer,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PegasusTokenizer,
    PLBartTokenizer,
    T5Tokenizer,
)

from checkpoints import save_checkpoint

ENGLISH = [
    "The quick brown fox jumps over the lazy dog.",
    "It was the 3rd of March 2024, and nobody (except for her) had noticed it!",
    "Where is the museum? I don't know; ask the woman at the door.",
    "Prices rose by 12.5% to £4,300, which is more than we had expected.",
    "for (int i = 0; i < n; ++i) { total += price[i]; }",
]
GERMAN = [
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Es war der 3. März 2024, und niemand (außer ihr) hatte es bemerkt!",
    "Wo ist das Museum? Ich weiß es nicht; frag die Frau an der Tür.",
    "Die Preise stiegen um 12,5 % auf 4.300 €, mehr als erwartet.",
]
CHINESE = [
    "敏捷的棕色狐狸跳过懒狗。",
    "今天是三月五日\uff0c天气很好\uff01",
    "博物馆在哪里\uff1f我不知道。",
]
EVERY = [*ENGLISH, *GERMAN, *CHINESE]


def train(path: Path, texts: list[str], **options: Any) -> Path:
    """A small SentencePiece model, with the normalisation that all have by default."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            **{
                "sentence_iterator": iter(texts * 3),
                "model_writer": file,
                "vocab_size": 220,
                "hard_vocab_limit": False,
                "num_threads": 1,
                "minloglevel": 2,
            }
            | options
        )
    return path


def pieces_of(path: Path) -> list[str]:
    """All but the three that are no pieces of texts."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(index) for index in range(3, len(model))]


def save_marian(folder: Path) -> None:
    """Two models, and a vocabulary that lacks pieces of both and knows one that neither has."""
    source = train(folder / "source.spm", ENGLISH)
    target = train(folder / "target.spm", [*GERMAN, *CHINESE])
    names = sorted({*pieces_of(source), *pieces_of(target)})
    generator = random.Random(3)
    generator.shuffle(names)
    kept = [name for name in names if name not in generator.sample(names, 12)]
    words = ["</s>", "<unk>", *kept, "Ω", ">>deu<<", ">>zho<<", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(words)}))
    tokenizer = MarianTokenizer(
        str(source), str(target), str(folder / "vocab.json"), source_lang="en", target_lang="mul"
    )
    tokenizer.save_pretrained(folder)


def save_marian_of_two_vocabularies(folder: Path) -> None:
    source = train(folder / "source.spm", ENGLISH)
    target = train(folder / "target.spm", GERMAN)
    for name, path in (("vocab.json", source), ("target_vocab.json", target)):
        words = ["</s>", "<unk>", "<pad>", *sorted(pieces_of(path))]
        (folder / name).write_text(json.dumps({word: i for i, word in enumerate(words)}))
    tokenizer = MarianTokenizer(
        str(source),
        str(target),
        str(folder / "vocab.json"),
        str(folder / "target_vocab.json"),
        separate_vocabs=True,
    )
    tokenizer.save_pretrained(folder)


def save_m2m100(folder: Path, **options: Any) -> None:
    path = train(folder / "sentencepiece.bpe.model", EVERY, vocab_size=260, **options)
    words = ["<s>", "<pad>", "</s>", "<unk>", *reversed(pieces_of(path)[:-5]), "Ω"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    M2M100Tokenizer(str(folder / "vocab.json"), str(path)).save_pretrained(folder)


def save_plbart(folder: Path) -> None:
    path = train(folder / "sentencepiece.bpe.model", EVERY, vocab_size=260)
    PLBartTokenizer(str(path)).save_pretrained(folder)


def save_nllb(folder: Path) -> None:
    """With a tokenizer.json, as the published ones: transformers finds no languages without it."""
    path = train(folder / "sentencepiece.bpe.model", EVERY, vocab_size=260, model_type="bpe")
    content = json.loads(NllbTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    path.unlink()
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    NllbTokenizer(vocab=content["model"]["vocab"], merges=merges).save_pretrained(folder)


def save_model_alone(tokenizer: Any, **options: Any) -> Callable[[Path], None]:
    """What such checkpoints on the hub have: a SentencePiece model and no tokenizer.json."""

    def save(folder: Path) -> None:
        name = tokenizer.vocab_files_names["vocab_file"]
        train(folder / name, EVERY, **{"vocab_size": 260} | options)
        settings = {"tokenizer_class": tokenizer.__name__}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    return save


# As the T5 and the Pegasus that were published number them.
_T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


@dataclass(frozen=True)
class Tokenized:
    """A family whose tokenizer is one of SentencePiece.

    Attributes:
        model: the random checkpoint's family, as in `checkpoints.py`.
        save: writes the tokenizer's files.
        languages: source and target language, as requests name them.
        num_files: of tokenizers in a bundle.
    """

    model: str
    save: Callable[[Path], None]
    languages: tuple[str | None, str | None] = (None, None)
    num_files: int = 1


TOKENIZED = {
    "marian": Tokenized("marian", save_marian, (None, "deu"), num_files=2),
    "marian of two vocabularies": Tokenized("marian", save_marian_of_two_vocabularies, num_files=2),
    "m2m100": Tokenized("m2m_100", save_m2m100, ("en", "de")),
    "m2m100 of BPE": Tokenized(
        "m2m_100", lambda folder: save_m2m100(folder, model_type="bpe"), ("zh", "en")
    ),
    "nllb": Tokenized("m2m_100", save_nllb, ("eng_Latn", "deu_Latn")),
    "mbart-25": Tokenized("mbart", save_model_alone(MBartTokenizer), ("en_XX", "de_DE")),
    "mbart-50": Tokenized("mbart", save_model_alone(MBart50Tokenizer), ("en_XX", "zh_CN")),
    "plbart": Tokenized("plbart", save_plbart, ("java", "en_XX")),
    "t5": Tokenized("t5", save_model_alone(T5Tokenizer, **_T5_IDS)),
    "pegasus": Tokenized("pegasus", save_model_alone(PegasusTokenizer, **_T5_IDS)),
}


def save_tokenized(name: str, folder: Path) -> Path:
    """A random checkpoint with a tokenizer."""
    family = TOKENIZED[name]
    folder.mkdir()
    family.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family.model}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # M2M100 does not count its languages among its vocabulary.
    last = max((*tokenizer.get_vocab().values(), *getattr(tokenizer, "id_to_lang_token", ())))
    ids = {
        "vocab_size": last + 1,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    starts_with_pad = family.model in ("marian", "t5", "pegasus")
    ids["decoder_start_token_id"] = ids["pad_token_id" if starts_with_pad else "eos_token_id"]
    if family.model == "marian":
        ids["forced_eos_token_id"] = ids["eos_token_id"]
    if (folder / "target_vocab.json").exists():
        ids["decoder_vocab_size"] = len(tokenizer.target_encoder)
        ids["share_encoder_decoder_embeddings"] = False
    return save_checkpoint(family.model, folder, **ids)
