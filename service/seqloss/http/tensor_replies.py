"""Scores to named tensors: what can be asked for, and what is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from seqloss.errors import PAIR_CODES, Fault, InvalidRequestError
from seqloss.http.columns import errors_body, usage_body
from seqloss.http.tensors import (
    InferRequest,
    OutputTensor,
    RequestedOutput,
    encode_infer_reply,
)
from seqloss.loss.reduce import aggregate, mean_losses
from seqloss.records import Int32Array, Ragged
from seqloss.scorer import ScoredRequest


def _error_codes(scored: ScoredRequest) -> Int32Array:
    codes = np.zeros(len(scored.scores.losses), np.int32)
    for fault in scored.faults:
        if fault.index is not None:
            codes[fault.index] = 1 + PAIR_CODES.index(fault.code)
    return codes


def _all_of(rows: Ragged | None) -> NDArray[Any]:
    assert rows is not None  # noqa: S101 - for mypy; they were asked for
    return rows.values


# What can be asked for: datatype, and where it comes from. N entries, or one per target token.
OUTPUTS: dict[str, tuple[str, Callable[[ScoredRequest], NDArray[Any]]]] = {
    "loss": ("FP64", lambda scored: scored.scores.losses),
    "nll": ("FP64", lambda scored: scored.scores.nlls),
    "mean_loss": ("FP64", lambda scored: mean_losses(scored.scores)),
    "num_tokens": ("INT32", lambda scored: scored.scores.num_tokens),
    "error_code": ("INT32", _error_codes),
    "token_losses": ("FP32", lambda scored: scored.scores.token_losses.values),
    "token_nlls": ("FP32", lambda scored: scored.scores.token_nlls.values),
    "token_ranks": ("INT32", lambda scored: _all_of(scored.scores.token_ranks)),
    "token_entropies": ("FP32", lambda scored: _all_of(scored.scores.token_entropies)),
    "num_truncated_source_tokens": ("INT32", lambda scored: scored.cut_source_tokens),
    "num_truncated_target_tokens": ("INT32", lambda scored: scored.cut_target_tokens),
}
_DEFAULT_OUTPUTS = tuple(
    RequestedOutput(name=name) for name in ("loss", "nll", "num_tokens", "error_code")
)


def requested_outputs(request: InferRequest) -> Sequence[RequestedOutput]:
    """Those that were asked for, or the default ones."""
    return request.outputs or _DEFAULT_OUTPUTS


def refuse_unknown_outputs(request: InferRequest) -> None:
    """Raises InvalidRequestError where outputs are asked for that are none, or twice."""
    names = [output.name for output in request.outputs or ()]
    faults = []
    for place, name in enumerate(names):
        if name not in OUTPUTS:
            detail = f"there is no output {name[:100]!r}; these are: {', '.join(OUTPUTS)}"
            faults.append(Fault("unknown_tensor", detail, loc=("outputs", place, "name")))
        elif name in names[:place]:
            detail = f"the output {name} is asked for twice"
            faults.append(Fault("duplicate_tensor", detail, loc=("outputs", place, "name")))
    if faults:
        raise InvalidRequestError("outputs are unknown or doubled", faults)


def encode_scores(
    model: str, version: str, request: InferRequest, scored: ScoredRequest
) -> tuple[bytes, int | None]:
    """A reply's body, and how long its JSON is; None where that is all of it."""
    by_default = request.options.binary_data_output
    outputs = []
    for asked in requested_outputs(request):
        datatype, values_of = OUTPUTS[asked.name]
        binary = asked.parameters.binary_data if asked.parameters else None
        outputs.append(
            OutputTensor(
                asked.name,
                datatype,
                values_of(scored),
                by_default if binary is None else binary,
            )
        )
    parameters = {"aggregate": orjson.dumps(aggregate(scored.scores)).decode()}
    if scored.faults:
        parameters["errors"] = orjson.dumps(errors_body(scored)).decode()
    reply: dict[str, Any] = {
        "model_name": model,
        "model_version": version,
        "parameters": parameters | usage_body(scored),
    }
    if request.id:
        reply["id"] = request.id
    return encode_infer_reply(reply, outputs)
