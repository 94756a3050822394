"""Named tensors to the arrays of a request: what `columns.py` does for lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqloss.errors import Fault, InvalidRequestError
from seqloss.http.tensor_replies import requested_outputs
from seqloss.http.tensors import InferParameters, InferRequest
from seqloss.loss.reduce import LabelSmoothing
from seqloss.records import (
    BoolArray,
    Int64Array,
    Priority,
    Ragged,
    RequestArrays,
    offsets_of,
    ranges,
)
from seqloss.scorer import ScoreOptions

_INTEGERS = ("INT32", "INT64")
_FLAGS = ("BOOL", "UINT8", "INT8", *_INTEGERS)

# Which datatypes each input may have; the first one is what metadata name.
INPUTS: dict[str, tuple[str, ...]] = {
    "source_ids": _INTEGERS,
    "source_lengths": _INTEGERS,
    "target_ids": _INTEGERS,
    "target_lengths": _INTEGERS,
    "source_index": _INTEGERS,
    "source_mask": _FLAGS,
    "target_mask": _FLAGS,
    "decoder_input_ids": _INTEGERS,
    "prefix_length": _INTEGERS,
    "decoder_start_token_id": _INTEGERS,
}
REQUIRED = ("source_ids", "source_lengths", "target_ids", "target_lengths")

_PRIORITIES: tuple[Priority, ...] = ("interactive", "interactive", "bulk")


def options_of_parameters(
    request: InferRequest, stream: str, seconds_since_arrival: float
) -> ScoreOptions:
    """What the request chooses beside its pairs."""
    parameters = request.options
    asked = {output.name for output in requested_outputs(request)}
    return ScoreOptions(
        smoothing=LabelSmoothing(parameters.label_smoothing, parameters.smoothing),
        with_ranks_and_entropies=bool({"token_ranks", "token_entropies"} & asked),
        on_error=parameters.on_error,
        priority=_PRIORITIES[parameters.priority],
        seconds_left=(
            parameters.timeout / 1e6 - seconds_since_arrival if parameters.timeout else None
        ),
        stream=stream,
        reproducible=parameters.reproducible,
    )


def arrays_of_tensors(request: InferRequest, tensors: Mapping[str, NDArray[Any]]) -> RequestArrays:
    """The pairs, flat.

    Args:
        request: whose parameters hold for all pairs.
        tensors: its inputs, of integers.

    Raises:
        InvalidRequestError: inputs that are missing, or that contradict each other; all of them.
    """
    return _Assembler(request.options, tensors).arrays()


@dataclass(frozen=True, slots=True)
class _Side:
    """Sources or targets.

    Attributes:
        rows: the ids without padding.
        shape: the ids' as sent.
        kept: where the entries of `rows` stand in padded ids; None where there is no padding.
    """

    rows: Ragged
    shape: tuple[int, ...]
    kept: Int64Array | None


class _Assembler:
    """Turns tensors into the arrays of a request and collects what does not fit together."""

    def __init__(self, parameters: InferParameters, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._parameters = parameters
        self._tensors = tensors
        self._faults: list[Fault] = []

    def arrays(self) -> RequestArrays:
        for name in REQUIRED:
            if name not in self._tensors:
                self._fault(name, f"the input {name} is missing")
        self._raise_faults()
        sources, targets = self._side("source"), self._side("target")
        self._raise_faults()
        num_targets = len(targets.rows)
        arrays = {
            "source_index": self._source_index(len(sources.rows), num_targets),
            "source_mask": self._mask("source_mask", sources, "source_ids"),
            "target_mask": self._mask("target_mask", targets, "target_ids"),
            "decoder_input_ids": self._aligned("decoder_input_ids", targets, "target_ids"),
            "start_ids": self._per_target("decoder_start_token_id", num_targets),
            "prefix_lengths": self._per_target("prefix_length", num_targets, 0),
        }
        if arrays["decoder_input_ids"] is not None and arrays["start_ids"] is not None:
            self._fault(
                "decoder_start_token_id",
                "decoder_input_ids begin with their own start; give one of the two",
            )
        self._raise_faults()
        return RequestArrays(
            source_ids=sources.rows,
            target_ids=targets.rows,
            pad_token_id=self._parameters.pad_token_id,
            truncation=self._parameters.truncation,
            **arrays,  # type: ignore[arg-type]  # a fault is raised above where one is None
        )

    def _fault(self, name: str, detail: str) -> None:
        self._faults.append(Fault("inconsistent", detail, loc=("inputs", name)))

    def _raise_faults(self) -> None:
        if self._faults:
            raise InvalidRequestError("inputs are missing or contradict each other", self._faults)

    def _side(self, side: str) -> _Side:
        ids, lengths = self._tensors[f"{side}_ids"], self._tensors[f"{side}_lengths"]
        lengths = lengths.astype(np.int64)
        flat = ids.reshape(-1).astype(np.int64)
        if not self._lengths_fit(side, ids.shape, lengths):
            return _Side(Ragged(flat, offsets_of([len(flat)])), ids.shape, None)
        kept = None
        if ids.ndim == 2:
            kept = ranges(np.arange(len(lengths)) * ids.shape[1], lengths)
            flat = flat[kept]
        return _Side(Ragged(flat, offsets_of(lengths)), ids.shape, kept)

    def _lengths_fit(self, side: str, shape: tuple[int, ...], lengths: Int64Array) -> bool:
        name, ids = f"{side}_lengths", f"{side}_ids"
        if lengths.ndim != 1:
            self._fault(name, f"{name} has the shape {lengths.shape}, and needs one dimension")
            return False
        if len(shape) == 2 and shape[0] != len(lengths):
            self._fault(name, f"{name} has {len(lengths)} entries for {shape[0]} rows of {ids}")
            return False
        # Each by itself first: then no sum of them is too large for 64 bits.
        wrong = np.flatnonzero((lengths < 0) | (lengths > shape[-1]))
        if len(wrong):
            what = "rows of" if len(shape) == 2 else "all of"
            self._fault(
                name,
                f"{name} is {lengths[wrong[0]]} at {wrong[0]}; {what} {ids} have {shape[-1]} "
                f"entries ({len(wrong)} lengths are wrong)",
            )
            return False
        if len(shape) == 1 and lengths.sum() != shape[0]:
            self._fault(
                name, f"{name} make {lengths.sum()} entries together, and {ids} has {shape[0]}"
            )
            return False
        return True

    def _source_index(self, num_sources: int, num_targets: int) -> Int64Array | None:
        if "source_index" not in self._tensors:
            if num_sources != num_targets:
                self._fault(
                    "source_lengths",
                    f"there are {num_sources} sources and {num_targets} targets; without "
                    "source_index target i goes with source i, and the counts must match",
                )
            return np.arange(num_targets)
        index = self._per_target("source_index", num_targets)
        if index is None:
            return None
        wrong = np.flatnonzero((index < 0) | (index >= num_sources))
        if len(wrong):
            self._fault(
                "source_index",
                f"target {wrong[0]} names source {index[wrong[0]]}, and there are {num_sources}, "
                f"from 0 ({len(wrong)} such targets)",
            )
        return index

    def _per_target(
        self, name: str, num_targets: int, default: int | None = None
    ) -> Int64Array | None:
        tensor, value = self._tensors.get(name), getattr(self._parameters, name, None)
        if tensor is None:
            value = default if value is None else value
            return None if value is None else np.full(num_targets, value, np.int64)
        if value is not None:
            self._fault(name, f"{name} is an input and a parameter; give one of the two")
        if tensor.shape != (num_targets,):
            self._fault(name, f"{name} has the shape {tensor.shape} for {num_targets} targets")
            return None
        if name == "prefix_length" and (tensor < 0).any():
            self._fault(name, f"prefix_length is negative: {tensor.min()}")
        return tensor.astype(np.int64)

    def _mask(self, name: str, side: _Side, of: str) -> BoolArray | None:
        flags = self._aligned(name, side, of)
        if flags is None:
            return None
        if ((flags < 0) | (flags > 1)).any():
            self._fault(name, f"{name} holds other entries than 0 and 1")
        return flags.astype(np.bool_)

    def _aligned(self, name: str, side: _Side, of: str) -> Int64Array | None:
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if tensor.shape != side.shape:
            self._fault(name, f"{name} has the shape {tensor.shape}, {of} has {side.shape}")
            return None
        flat = tensor.reshape(-1).astype(np.int64)
        return flat if side.kept is None else flat[side.kept]
