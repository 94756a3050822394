"""Reads a Hugging Face checkpoint, and says everything that is wrong with it at once."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.utils import logging as transformers_logging

from seqloss.bundle.manifest import Languages, SpecialIds, sha256_of
from seqloss.errors import CheckpointError
from seqloss.export.families import FAMILIES, REFUSED, Family
from seqloss.export.languages import generation_ids, languages_of
from seqloss.export.texts import StoredText, stored_text_of

# In the order in which transformers prefers them. It unpickles the latter with `weights_only`.
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
# Beside JSON files; tokenizers are made of them.
_VOCABULARIES = ("*.model", "*.spm", "merges.txt", "vocab.txt")
# More names than these help nobody.
_MOST_NAMES = 12


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint with complete weights, in float32, in inference mode.

    Attributes:
        name: as it was asked for, without the folders before it.
        digest: SHA-256 over the digests of its weight files.
        model: the `PreTrainedModel`.
        special_ids: ids with a meaning.
        languages: how it is told the languages of a pair, where it is.
        text: what makes ids of texts, where it has a tokenizer that can be stored.
    """

    name: str
    digest: str
    model: Any
    special_ids: SpecialIds
    languages: Languages | None
    text: StoredText | None

    @property
    def model_type(self) -> str:
        """Transformers' name of the family."""
        return str(self.model.config.model_type)

    @property
    def family(self) -> Family:
        """What is known of the family."""
        return FAMILIES[self.model_type]

    @property
    def max_positions(self) -> tuple[int | None, int | None]:
        """The longest source and target, where the family bounds them."""
        return self.family.max_positions(self.model.config)


def load_checkpoint(name: str, decoder_start: int | None = None) -> LoadedCheckpoint:
    """Loads a local folder, or a repository of the hub by its name.

    Args:
        name: the folder or the repository.
        decoder_start: instead of the configuration's decoder_start_token_id.

    Raises:
        CheckpointError: it is not there, is not an encoder-decoder of a known family, or its
            weights are incomplete; all faults at once.
    """
    folder = _folder(name)
    config = config_of(folder)
    special_ids, faults = special_ids_of(folder, config, decoder_start)
    faults = _family_faults(config) + faults
    weight_files = _weight_files(folder)
    if not weight_files:
        faults.append("it has no weights: neither *.safetensors nor pytorch_model*.bin")
    model = None
    if weight_files and config.model_type in FAMILIES:
        model, weight_faults = _model(folder, FAMILIES[config.model_type])
        faults += weight_faults
    if faults or model is None or special_ids is None:
        raise CheckpointError(f"{name} cannot be exported", faults)
    languages = languages_of(folder, config.model_type)
    return LoadedCheckpoint(
        name=name if folder != Path(name) else folder.resolve().name,
        digest=digest_of(weight_files),
        model=model,
        special_ids=special_ids,
        languages=languages,
        text=stored_text_of(folder, languages),
    )


def digest_of(files: list[Path]) -> str:
    """SHA-256 over the digests of weight files, in the order given."""
    return hashlib.sha256("".join(sha256_of(path) for path in files).encode()).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    found = (sorted(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS)
    return next(filter(None, found), [])


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise CheckpointError(f"{name} is a file; give the folder of a checkpoint")
    try:
        files = HfApi().list_repo_files(name)
        weights = next(
            (pattern for pattern in _WEIGHT_PATTERNS if fnmatch.filter(files, pattern)), ""
        )
        return Path(snapshot_download(name, allow_patterns=["*.json", *_VOCABULARIES, weights]))
    # Beside errors of its own the hub's client raises those of whatever HTTP library it uses.
    except Exception as error:
        raise CheckpointError(
            f"{name} is neither a folder nor a checkpoint that the hub gave: {error}"
        ) from error


def config_of(folder: Path) -> Any:
    """The configuration of a folder, by transformers.

    Raises:
        CheckpointError: there is none, or none that it reads.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # What is wrong with a configuration surfaces as whatever its class raises.
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no configuration that transformers reads: {error}"
        ) from error


def _family_faults(config: Any) -> list[str]:
    if not getattr(config, "is_encoder_decoder", False):
        return [
            f"its family, {config.model_type!r}, is no encoder-decoder: it has no targets to score"
        ]
    if refusal := REFUSED.get(config.model_type):
        return [f"its family, {config.model_type!r}, is not supported: {refusal.reason}"]
    if config.model_type not in FAMILIES:
        return [
            f"its family, {config.model_type!r}, is not supported; these are: {', '.join(FAMILIES)}"
        ]
    return []


def _model(folder: Path, family: Family) -> tuple[Any, list[str]]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=family.attention,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    # Broken files surface as whatever their parser raises: OSError, SafetensorError, ValueError...
    except Exception as error:
        return None, [f"its weights do not load: {error}"]
    finally:
        transformers_logging.set_verbosity(verbosity)
    family.prepare(model)
    faults = []
    if missing := sorted(info["missing_keys"]):
        faults.append(f"its weights lack {_some(missing)}")
    if mismatched := sorted(str(entry[0]) for entry in info["mismatched_keys"]):
        faults.append(f"its weights have another shape than its configuration: {_some(mismatched)}")
    if unexpected := sorted(info["unexpected_keys"]):
        faults.append(f"its weights hold what its family has not: {_some(unexpected)}")
    if broken := [
        name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()
    ]:
        faults.append(f"its weights hold NaN or infinity in {_some(broken)}")
    return model.eval(), faults


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def special_ids_of(
    folder: Path, config: Any, decoder_start: int | None
) -> tuple[SpecialIds | None, list[str]]:
    """The ids, or what is missing."""
    ids = generation_ids(folder, config)
    start = ids["decoder_start_token_id"] if decoder_start is None else decoder_start
    pad = ids["pad_token_id"]
    faults = []
    if start is None:
        faults.append(
            "its configuration has no decoder_start_token_id; give --decoder-start-token-id (a "
            "request may have its own, where each language has one)"
        )
    elif start < 0:
        faults.append(f"{start} is no id for the decoder to start with")
    if pad is None:
        faults.append("its configuration has no pad_token_id")
    if faults or start is None or pad is None:
        return None, faults
    special_ids = SpecialIds(
        decoder_start=start,
        pad=pad,
        bos=ids["bos_token_id"],
        eos=ids["eos_token_id"],
        forced_bos=ids["forced_bos_token_id"],
        forced_eos=ids["forced_eos_token_id"],
    )
    return special_ids, []
