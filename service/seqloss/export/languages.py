"""Finds out how a multilingual checkpoint is told its languages, by asking its tokenizer.

Families place the ids of languages differently, and versions of one tokenizer do too. So a short
text is encoded as a source and as a target in every language, and the language's id is looked for.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from seqloss.bundle.manifest import Languages
from seqloss.errors import CheckpointError

_LOG = logging.getLogger(__name__)

_Place = Literal["first", "last", "none"]

_TOKENIZER_FILES = ("tokenizer*.json", "*vocab*", "*.model", "*.spm")
_TEXT = "a"
# NLLB's tokenizer has no list of its languages, only special tokens: `deu_Latn`; mBART's are alike.
_CODE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")
# Marian's, which are a part of the text.
_TAG = re.compile(r">>([^<>\s]+)<<")
# Families whose decoder starts with the last label. Their `shift_tokens_right` wraps it round.
_START_WITH_LAST_LABEL = ("mbart", "plbart")
_SPECIAL_IDS = (
    "decoder_start_token_id",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
# More names than these help nobody.
_MOST_NAMES = 12


def languages_of(folder: Path, model_type: str) -> Languages | None:
    """The checkpoint's languages, named as users of its tokenizer name them.

    Names are what is given as `src_lang`: `eng_Latn` (NLLB), `en` (M2M100, whose token is
    `__en__`), `en_XX` (mBART), `java` (PLBart, `__java__`). Marian's are what stands between the
    marks of `>>deu<<`.

    None where there is no tokenizer or no language, and also, with a warning in the log, where the
    tokenizer does not load: losses can be computed without it. Languages whose id the model has no
    embedding of are left out, with a warning: tokenizer classes add all languages of their family,
    also to a checkpoint that was cut down to a few.

    Args:
        folder: of the checkpoint, with its config.json.
        model_type: transformers' name of the family.

    Raises:
        CheckpointError: the model has no embedding of any of the languages, so the tokenizer
            belongs to another model.
    """
    if not has_tokenizer(folder):
        return None
    try:
        with silence():
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            languages = _asked(folder, config, model_type)
    # What is wrong with a tokenizer surfaces as whatever its class raises.
    except Exception as error:
        _LOG.warning(
            "%s: the bundle does not list its languages, because its tokenizer cannot be read: %s. "
            "Losses are the same without the list.",
            folder,
            one_line(error),
        )
        return None
    return languages and _embedded(languages, getattr(config, "vocab_size", None), folder)


def generation_ids(folder: Path, config: Any) -> dict[str, int | None]:
    """The ids with a meaning, by their names in config.json; None where none is stated.

    Transformers 5 drops the forced ones when it loads a config.json, and expects them in
    generation_config.json; checkpoints have them in either. The configuration counts first, as the
    file has it or else by the default of the family. Of a list the first counts.

    Raises:
        CheckpointError: one of the files cannot be read.
    """
    stated = _json(folder / "config.json")
    generation = _json(folder / "generation_config.json")

    def one(name: str) -> int | None:
        values = (stated.get(name), getattr(config, name, None), generation.get(name))
        value = next((value for value in values if value is not None), None)
        return next(iter(value), None) if isinstance(value, list) else value

    return {name: one(name) for name in _SPECIAL_IDS}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


@contextmanager
def silence() -> Iterator[None]:
    """Keeps to themselves what tokenizers recommend to those who want to encode texts."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _asked(folder: Path, config: Any, model_type: str) -> Languages | None:
    tokenizer = tokenizer_of(folder, config)
    # On the class: transformers sets any keyword of tokenizer_config.json on the instance.
    if hasattr(type(tokenizer), "src_lang"):
        return _switched(tokenizer, model_type)
    return _tagged(tokenizer)


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint has any file of a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def tokenizer_of(folder: Path, config: Any) -> Any:
    """Transformers' tokenizer of a checkpoint, which has files of one.

    Raises:
        Exception: whatever its class raises.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception:
        # tokenizer.json is complete in itself, whatever else the family's class wants. But it does
        # not say how its languages are switched, and so is enough only where texts are tagged.
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            if _tagged(tokenizer):
                return tokenizer
        raise
    # Without them transformers makes up a tokenizer with a handful of tokens, and wrong ids.
    files = {
        name for key, name in tokenizer.vocab_files_names.items() if key != "tokenizer_config_file"
    }
    if not any((folder / name).is_file() for name in files):
        raise FileNotFoundError(f"there is none of {', '.join(sorted(files))}")
    return tokenizer


def _tagged(tokenizer: Any) -> Languages | None:
    """Languages of a tokenizer whose sources begin with a tag, such as `>>deu<<`."""
    ids = {
        match[1]: index
        for token, index in tokenizer.get_vocab().items()
        if (match := _TAG.fullmatch(token))
        and tokenizer(f"{token} {_TEXT}")["input_ids"][:1] == [index]
    }
    return Languages(ids=_sorted(ids), source="none", target="first_of_source") if ids else None


def _switched(tokenizer: Any, model_type: str) -> Languages | None:
    """Languages of a tokenizer that is switched by its `src_lang` and `tgt_lang`."""
    ids: dict[str, int] = {}
    places: set[tuple[_Place, _Place]] = set()
    for code in _codes(tokenizer):
        tokenizer.src_lang = tokenizer.tgt_lang = code
        source, source_place = _mark(tokenizer, text=_TEXT)
        target, target_place = _mark(tokenizer, text_target=_TEXT)
        # A code that the vocabulary has not is encoded as the unknown token.
        if target in (None, tokenizer.unk_token_id) or source not in (None, target):
            continue
        ids[code.strip("_")] = target
        places.add((source_place, target_place))
    if len(places) != 1:
        raise ValueError(
            "its languages have ids at several places"
            if places
            else "it has languages, but no id of any at a place that is known here"
        )
    ((source_place, target_place),) = places
    # A target that ends in the language's id is not what models of the other families get: that is
    # NLLB's `legacy_behaviour`, and generation forces the id to the first position.
    starts = target_place == "last" and model_type in _START_WITH_LAST_LABEL
    return Languages(
        ids=_sorted(ids), source=source_place, target="decoder_start" if starts else "first"
    )


def _codes(tokenizer: Any) -> list[str]:
    """What `src_lang` may be set to; some of it may be absent from the vocabulary."""
    listed = getattr(tokenizer, "lang_code_to_id", {})
    added = [token for token in tokenizer.get_added_vocab() if _CODE.fullmatch(token)]
    # PLBart lists tokens, `__java__`, and takes them as well as the names without the underscores.
    return list(dict.fromkeys([*listed, *added]))


def _mark(tokenizer: Any, **text: str) -> tuple[int | None, _Place]:
    """The id that stands before or after the text and its end, and where."""
    ids = tokenizer(**text)["input_ids"]
    content = tokenizer(**text, add_special_tokens=False)["input_ids"]
    content = [*content, tokenizer.eos_token_id]
    if ids[1:] == content:
        return ids[0], "first"
    if ids[:-1] == content:
        return ids[-1], "last"
    return None, "none"


def _embedded(languages: Languages, num_ids: int | None, folder: Path) -> Languages:
    """The languages whose ids the model has embeddings of."""
    absent = {
        name: index
        for name, index in languages.ids.items()
        if num_ids is not None and index >= num_ids
    }
    if not absent:
        return languages
    named = ", ".join(f"{name} ({index})" for name, index in [*absent.items()][:_MOST_NAMES])
    if len(absent) > _MOST_NAMES:
        named += f" and {len(absent) - _MOST_NAMES} more"
    if len(absent) == len(languages.ids):
        raise CheckpointError(
            f"{folder} has the tokenizer of another model: the model has {num_ids} ids, and the "
            f"languages have others: {named}"
        )
    _LOG.warning(
        "%s: the bundle does not list languages that the tokenizer has and the model, with its %s "
        "ids, has not: %s",
        folder,
        num_ids,
        named,
    )
    return languages.model_copy(
        update={"ids": {name: i for name, i in languages.ids.items() if name not in absent}}
    )


def _sorted(ids: dict[str, int]) -> dict[str, int]:
    return dict(sorted(ids.items()))


def one_line(error: Exception) -> str:
    """An error in one line: those of transformers about missing packages have many."""
    return " ".join(f"{error}".split()).rstrip(".") or type(error).__name__
