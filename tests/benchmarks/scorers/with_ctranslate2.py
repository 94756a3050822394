"""CTranslate2's `score_batch`, at the best of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ctranslate2  # type: ignore[import-untyped]
from ctranslate2.converters import TransformersConverter  # type: ignore[import-untyped]
from transformers import AutoConfig

from benchmarks.pairs import Pairs
from benchmarks.processes import in_own_process
from benchmarks.scoring import Scorer, Setting, Setup, own_pid

_BATCH_TOKENS = (512, 1024, 2048, 4096, 8192)


def make(setup: Setup, precision: str) -> Scorer:
    """The converted model, loaded."""
    return _WithCTranslate2(setup, precision)


class _WithCTranslate2:
    def __init__(self, setup: Setup, precision: str) -> None:
        if not (setup.ctranslate2 / "model.bin").is_file():
            in_own_process(convert, setup.checkpoint, setup.ctranslate2)
        self._setup = setup
        self._precision = precision
        self._setting = self.candidates[0]
        self._tokens = tokens_of(AutoConfig.from_pretrained(setup.checkpoint))
        self._translator = self._loaded()

    def _loaded(self) -> Any:
        inter_threads = self._setting["inter_threads"]
        return ctranslate2.Translator(
            str(self._setup.ctranslate2),
            device="cpu",
            compute_type=self._precision,
            inter_threads=inter_threads,
            intra_threads=max(1, self._setup.threads // inter_threads),
        )

    @property
    def pid(self) -> int:
        return own_pid()

    @property
    def candidates(self) -> Sequence[Setting]:
        return [
            {"batch_tokens": tokens, "inter_threads": inter_threads}
            for inter_threads in sorted({1, min(2, self._setup.threads), self._setup.threads})
            for tokens in _BATCH_TOKENS
        ]

    def use(self, setting: Setting) -> None:
        changed = setting["inter_threads"] != self._setting["inter_threads"]
        self._setting = setting
        if changed:
            self._translator = None  # frees the old one's memory before the new one is loaded
            self._translator = self._loaded()

    def score(self, pairs: Pairs) -> list[float]:
        results = self._translator.score_batch(
            [[self._tokens[value] for value in row] for row in pairs.source_ids],
            # It adds the end of sentence to targets, and to targets only.
            [[self._tokens[value] for value in row[:-1]] for row in pairs.target_ids],
            max_batch_size=self._setting["batch_tokens"],
            batch_type="tokens",
        )
        means = []
        for result, length in zip(results, pairs.target_lengths, strict=True):
            if len(result.log_probs) != length:
                raise RuntimeError(f"{len(result.log_probs)} tokens were scored, and not {length}")
            means.append(-sum(result.log_probs) / length)
        return means

    def close(self) -> None:
        """The process ends."""


def convert(checkpoint: Path, output: Path) -> None:
    """Writes CTranslate2's form of a checkpoint, in float32; it is quantised when it is loaded."""
    _Converter(str(checkpoint)).convert(str(output), force=True)


class _Converter(TransformersConverter):  # type: ignore[misc]
    """Makes the tokenizer up: the checkpoint has none, and ids are all that is scored."""

    def load_tokenizer(self, _class: Any, folder: str, **_: Any) -> Any:
        """What the converter asks of a tokenizer."""
        config = AutoConfig.from_pretrained(folder)
        tokens = tokens_of(config)
        begin = _begin_id(config)
        return SimpleNamespace(
            get_vocab=lambda: {token: index for index, token in enumerate(tokens)},
            convert_ids_to_tokens=tokens.__getitem__,
            special_tokens_map={},
            bos_token=tokens[config.eos_token_id if begin is None else begin],
            eos_token=tokens[config.eos_token_id],
            pad_token=tokens[config.pad_token_id],
            unk_token=tokens[_unknown_id(config)],
            unk_token_id=_unknown_id(config),
        )


def tokens_of(config: Any) -> list[str]:
    """One text per id."""
    tokens = [f"t{index}" for index in range(config.vocab_size)]
    tokens[_unknown_id(config)] = "<unk>"
    tokens[config.eos_token_id] = "</s>"
    tokens[config.pad_token_id] = "<pad>"
    return tokens


def _unknown_id(config: Any) -> int:
    """The least id without a meaning of its own."""
    taken = {config.eos_token_id, config.pad_token_id, _begin_id(config)}
    return next(index for index in range(config.vocab_size) if index not in taken)


def _begin_id(config: Any) -> int | None:
    """Of the beginning of a sentence; T5 and Marian have none."""
    begin: int | None = getattr(config, "bos_token_id", None)
    return begin
