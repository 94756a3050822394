"""Turns a SentencePiece model and the vocabulary of its pieces' ids into one tokenizer.

Transformers' tokenizers of Marian, M2M100 and PLBart run SentencePiece on a text and look the
pieces up by their names. Here both steps are one tokenizer of the library `tokenizers`, whose ids
are those of the vocabulary; `seqloss.bundle.manifest.Pieces` says what remains to be done to them.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import generate_merges

from seqloss.bundle.manifest import Pieces

_SPACE = "▁"
# Types of pieces, as SentencePiece numbers them.
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True, slots=True)
class ConvertedPieces:
    """A tokenizer that adds nothing to a text, and what is to be done with its ids."""

    tokenizer: Tokenizer
    pieces: Pieces


def converted_pieces(tokenizer: Any) -> ConvertedPieces:
    """Of the side that a tokenizer of transformers is switched to.

    Raises:
        ValueError: it does something that the library `tokenizers` cannot.
    """
    model = _model_of(tokenizer)
    named = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    vocabulary = _vocabulary_of(tokenizer)
    own = {name: score for name, score, kind in named if kind in (_NORMAL, _BYTE)}
    names = _names(vocabulary, own, set(_added(tokenizer)))
    if model.trainer_spec.model_type == _UNIGRAM:
        unknown = vocabulary[tokenizer.unk_token]
        made = Tokenizer(
            models.Unigram(
                [(name, own.get(name, 0.0)) for name in names],
                unk_id=unknown,
                byte_fallback=model.trainer_spec.byte_fallback,
            )
        )
    else:
        scores = {name: score for name, score, kind in named if kind == _NORMAL}
        made = Tokenizer(
            models.BPE(
                {name: index for index, name in enumerate(names)},
                generate_merges({name: i for i, (name, _, _) in enumerate(named)}, scores),
                unk_token=tokenizer.unk_token,
                fuse_unk=True,
                byte_fallback=model.trainer_spec.byte_fallback,
            )
        )
    made.normalizer = _normalizer(model.normalizer_spec)
    # Words are encoded, and remembered, one by one where no piece reaches over a space.
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE,
        prepend_scheme="always" if model.normalizer_spec.add_dummy_prefix else "never",
        split=not any(_SPACE in name[1:] for name in own),
    )
    made.decoder = decoders.Metaspace(replacement=_SPACE)
    made.add_tokens(list(_added(tokenizer).values()))
    return ConvertedPieces(
        made,
        Pieces(
            num_ids=max(vocabulary.values()) + 1,
            unknown=vocabulary[tokenizer.unk_token],
            has_tags=hasattr(tokenizer, "remove_language_code"),
            composes=_composes(tokenizer),
        ),
    )


def _processor_of(tokenizer: Any) -> Any:
    processor = getattr(tokenizer, "current_spm", None) or getattr(tokenizer, "sp_model", None)
    if processor is None:
        raise ValueError("it is neither a fast tokenizer nor one of SentencePiece")
    return processor


def _composes(tokenizer: Any) -> bool:
    """Whether a text has the same pieces in composed and decomposed form: Latin, kana, hangul."""
    processor = _processor_of(tokenizer)
    return all(
        processor.encode(unicodedata.normalize("NFD", text), out_type=str)
        == processor.encode(text, out_type=str)
        for text in ("\u00e9", "\u304c", "\uac01")
    )


def _model_of(tokenizer: Any) -> Any:
    """The SentencePiece model's description."""
    processor = _processor_of(tokenizer)
    # protobuf makes its classes when they are imported, where no type checker sees them.
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(processor.serialized_model_proto())
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise ValueError("its SentencePiece model is neither a unigram model nor of BPE")
    if any(piece.type == _USER_DEFINED for piece in model.pieces):
        raise ValueError("its SentencePiece model has symbols that users defined")
    normalizer = model.normalizer_spec
    if not normalizer.escape_whitespaces or model.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError("its SentencePiece model does not mark the beginnings of words")
    return model


def _vocabulary_of(tokenizer: Any) -> dict[str, int]:
    """Ids by the names of all that has one."""
    names = getattr(tokenizer, "current_encoder", None) or tokenizer.get_vocab()
    return {name: tokenizer.convert_tokens_to_ids(name) for name in (*names, *_added(tokenizer))}


def _added(tokenizer: Any) -> dict[str, AddedToken]:
    """Tokens that are looked for in a text before anything else."""
    known = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    names = dict.fromkeys((*known, *tokenizer.get_added_vocab(), *tokenizer.all_special_tokens))
    return {name: _as_found(name, known.get(name)) for name in names}


def _as_found(name: str, token: AddedToken | None) -> AddedToken:
    """Transformers looks for them in the text as it is, whatever their flags say."""
    if token is None:
        return AddedToken(name, normalized=False, special=True)
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=token.special,
    )


def _names(vocabulary: dict[str, int], own: dict[str, float], added: set[str]) -> list[str]:
    """What each id is called, so that texts match pieces only; then the pieces that have no id."""
    by_id = {index: name for name, index in vocabulary.items()}
    names = [
        name if (name := by_id.get(index, f" {index}")) in own or name in added else f" {name}"
        for index in range(max(by_id) + 1)
    ]
    return [*names, *(name for name in own if name not in vocabulary)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    return normalizers.Sequence(steps)
