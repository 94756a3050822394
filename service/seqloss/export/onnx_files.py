"""Reads ONNX encoder-decoders that others exported, in Optimum's layout, and runs them as they are.

A folder has `encoder_model.onnx` and `decoder_model.onnx`, maybe files of weights beside them, and
the `config.json` of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
from torch import Tensor

from seqloss.bundle.manifest import SpecialIds
from seqloss.engines.onnx_options import session_options
from seqloss.errors import CheckpointError
from seqloss.export.families import FAMILIES, REFUSED, Family
from seqloss.export.huggingface import config_of, special_ids_of
from seqloss.export.int8_copies import unshare
from seqloss.export.reference import TokenReference

HIDDEN, LOGITS = "last_hidden_state", "logits"
IDS, MASK = "input_ids", "attention_mask"
ENCODED, ENCODED_MASK = "encoder_hidden_states", "encoder_attention_mask"

# What a part must take, and what it must give.
_SIGNATURES = {
    "encoder_model.onnx": ((IDS, MASK), HIDDEN),
    "decoder_model.onnx": ((IDS, ENCODED_MASK, ENCODED), LOGITS),
}
_MERGED_DECODER = "decoder_model_merged.onnx"
_FATAL = 4


@dataclass(frozen=True, slots=True)
class OnnxFiles:
    """A folder whose parts fit one another.

    Attributes:
        encoder: takes `input_ids` and `attention_mask`, gives `last_hidden_state`.
        decoder: takes `input_ids`, `encoder_attention_mask` and `encoder_hidden_states`, gives
            `logits`.
        weight_files: these two, and where their tensors lie; in name order.
        config: transformers' configuration.
        special_ids: ids with a meaning.
    """

    encoder: Path
    decoder: Path
    weight_files: list[Path]
    config: Any
    special_ids: SpecialIds

    @property
    def max_positions(self) -> tuple[int | None, int | None]:
        """The longest source and target, where the configuration bounds them."""
        family = FAMILIES.get(self.config.model_type)
        if family is not None:
            return family.max_positions(self.config)
        longest = getattr(self.config, "max_position_embeddings", None)
        return longest, longest

    @property
    def source_multiple(self) -> int:
        """See `seqloss.bundle.manifest.Graph`."""
        family = FAMILIES.get(self.config.model_type, Family("unknown"))
        return family.source_multiple(self.config)

    @property
    def num_ids(self) -> tuple[int, int]:
        """Rows of the source and target embeddings, by the configuration.

        Raises:
            CheckpointError: it does not say.
        """
        config = self.config
        parts = [getattr(config, name, None) for name in ("encoder", "decoder")]
        source, target = (
            next(
                (size for size in sizes if size is not None),
                getattr(config, "vocab_size", None),
            )
            for sizes in (
                (getattr(config, "src_vocab_size", None), getattr(parts[0], "vocab_size", None)),
                (
                    getattr(config, "tgt_vocab_size", None),
                    getattr(config, "decoder_vocab_size", None),
                    getattr(parts[1], "vocab_size", None),
                ),
            )
        )
        if source is None or target is None:
            raise CheckpointError("its configuration has no vocab_size")
        return source, target


def read_onnx_files(folder: Path, decoder_start: int | None) -> OnnxFiles:
    """Reads a folder, and runs nothing of it.

    Args:
        folder: where the files lie.
        decoder_start: instead of the configuration's decoder_start_token_id.

    Raises:
        CheckpointError: it is no encoder-decoder in this layout; all faults at once.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the one that holds the ONNX files")
    config, special_ids, faults = _configuration(folder, decoder_start)
    files: list[Path] = []
    for name in _SIGNATURES:
        found, more = _part(folder, name)
        files += found
        faults += more
    if faults or special_ids is None:
        raise CheckpointError(f"{folder} cannot be imported", faults)
    encoder, decoder = (folder / name for name in _SIGNATURES)
    return OnnxFiles(encoder, decoder, sorted(set(files)), config, special_ids)


def _configuration(
    folder: Path, decoder_start: int | None
) -> tuple[Any, SpecialIds | None, list[str]]:
    try:
        config = config_of(folder)
        special_ids, faults = special_ids_of(folder, config, decoder_start)
    except CheckpointError as error:
        return None, None, [error.detail]
    if not getattr(config, "is_encoder_decoder", False):
        faults.append(f"its family, {config.model_type!r}, is no encoder-decoder")
    if refusal := REFUSED.get(config.model_type):
        faults.append(f"its family, {config.model_type!r}, is not supported: {refusal.reason}")
    return config, special_ids, faults


def _part(folder: Path, name: str) -> tuple[list[Path], list[str]]:
    """A part's files, and what is wrong with them."""
    path = folder / name
    if not path.is_file():
        if name.startswith("decoder") and (folder / _MERGED_DECODER).is_file():
            fault = (
                f"it has no {name}: {_MERGED_DECODER} is two graphs in one, for generation; export "
                "it without a cache (optimum-cli: --task text2text-generation)"
            )
            return [], [fault]
        return [], [f"it has no {name}"]
    try:
        graph = onnx_ir.load(path).graph
    # Broken files surface as whatever their parser raises.
    except Exception as error:
        return [], [f"{name} cannot be read: {error}"]
    ends: dict[str, int] = {}
    for tensor in _external_tensors(graph):
        end = (tensor.offset or 0) + (tensor.length or 0)
        location = str(tensor.location)
        ends[location] = max(ends.get(location, 0), end)
    faults = _signature_faults(graph, *_SIGNATURES[name])
    for location, end in sorted(ends.items()):
        faults += _location_faults(folder, location, end)
    return [path, *(folder / location for location in ends)], [
        f"{name} {fault}" for fault in faults
    ]


def _external_tensors(graph: onnx_ir.Graph) -> Iterator[onnx_ir.ExternalTensor]:
    """Those whose values lie in other files, which nobody opened yet."""
    constants = (value.const_value for value in graph.initializers.values())
    attributes = (
        attribute.value
        for node in graph.all_nodes()
        for attribute in node.attributes.values()
        if attribute.type == onnx_ir.AttributeType.TENSOR
    )
    for tensor in chain(constants, attributes):
        if isinstance(tensor, onnx_ir.ExternalTensor):
            yield tensor


def _location_faults(folder: Path, location: str, end: int) -> list[str]:
    """What is wrong with a file of weights, the last of which end at a byte."""
    path = folder / location
    fault = None
    if not path.resolve().is_relative_to(folder.resolve()):
        # Links count as what they lead to.
        fault = "which is not inside the folder (of links make files: cp -rL)"
    elif not path.is_file():
        fault = "and that file is missing"
    elif path.stat().st_size < end:
        fault = "and that file is cut off"
    return [f"has weights in {location!r}, {fault}"] if fault else []


def _signature_faults(graph: onnx_ir.Graph, wanted: Sequence[str], output: str) -> list[str]:
    inputs = [str(value.name) for value in graph.inputs if value.name not in graph.initializers]
    outputs = [str(value.name) for value in graph.outputs]
    faults = [f"has no input {name!r}" for name in wanted if name not in inputs]
    if stray := [name for name in inputs if name not in wanted]:
        faults.append(f"has inputs that nobody gives: {', '.join(stray)}")
    if output not in outputs:
        faults.append(f"has no output {output!r}; it has {', '.join(outputs)}")
    return faults


class OnnxSessions:
    """Encoder and decoder as they came, in ONNX Runtime on the CPU."""

    def __init__(self, files: OnnxFiles) -> None:
        """Loads them.

        Raises:
            CheckpointError: ONNX Runtime does not take them.
        """
        options = session_options(_FATAL)  # the rest is raised
        try:
            with TemporaryDirectory() as folder:
                self._encoder, self._decoder = (
                    onnxruntime.InferenceSession(
                        _with_own_int8(path, Path(folder)),
                        options,
                        providers=["CPUExecutionProvider"],
                    )
                    for path in (files.encoder, files.decoder)
                )
        # Its errors have no common class but this one.
        except Exception as error:
            raise CheckpointError(f"ONNX Runtime does not load the files: {error}") from error

    def logits(self, source_ids: list[int], decoder_input_ids: list[list[int]]) -> Tensor:
        """Of several targets of one source. Shape: (B, T, V), float64.

        Raises:
            CheckpointError: ONNX Runtime fails: such as where an id is in no embedding.
        """
        sources = np.array([source_ids] * len(decoder_input_ids))
        targets, mask = np.array(decoder_input_ids), np.ones_like(sources)
        try:
            (hidden,) = _run(self._encoder, HIDDEN, {IDS: sources, MASK: mask})
            given = {IDS: targets, ENCODED_MASK: mask, ENCODED: hidden}
            (logits,) = _run(self._decoder, LOGITS, given)
        # As above.
        except Exception as error:
            raise CheckpointError(
                f"the files do not compute a source of {len(source_ids)} ids up to "
                f"{max(source_ids)} with a target of {targets.shape[1]} up to {targets.max()}: "
                f"{error}"
            ) from error
        return torch.from_numpy(logits.astype(np.float64))


def _with_own_int8(path: Path, folder: Path) -> Path:
    """The file, or one in the folder that computes the same, and that ONNX Runtime takes."""
    model = onnx_ir.load(path)
    if not unshare(model):
        return path
    changed = folder / path.name
    onnx_ir.save(model, changed, external_data=f"{path.name}.data")
    return changed


def _run(session: onnxruntime.InferenceSession, output: str, given: dict[str, Any]) -> list[Any]:
    kinds = {value.name: value.type for value in session.get_inputs()}
    cast = {
        name: value.astype(np.int32) if kinds[name] == "tensor(int32)" else value
        for name, value in given.items()
    }
    results: list[Any] = session.run([output], cast)
    return results


class OnnxReference(TokenReference):
    """By the files alone, in whatever precision they have."""

    def __init__(
        self,
        sessions: OnnxSessions,
        decoder_start: int,
        num_targets: int,
        excluded: Sequence[int],
    ) -> None:
        super().__init__(decoder_start, num_targets)
        self._sessions = sessions
        self._excluded = list(excluded)

    def _logprobs(self, source_ids: list[int], decoder_input_ids: list[list[int]]) -> Tensor:
        logits = self._sessions.logits(source_ids, decoder_input_ids)
        logits[..., self._excluded] = -torch.inf
        return torch.log_softmax(logits, -1)
