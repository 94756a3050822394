"""POST /v2/models/{model}/infer: the Open Inference Protocol with binary tensors, for much at once.

Neither side makes an object per token or per pair: arrays are sent as they lie in memory.
https://github.com/kserve/open-inference-protocol
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from seqloss_client._json_wire import pair_errors, record
from seqloss_client._pairs import IdPairs
from seqloss_client._retry import not_ours
from seqloss_client._steps import Reply
from seqloss_client.models import Aggregate, LossResult, Ragged, ScoringOptions, Usage

_SIZE_OF_JSON = "Inference-Header-Content-Length"

_DATATYPES = {np.dtype("<i4"): "INT32", np.dtype("<i8"): "INT64"}
_DTYPES: dict[str, np.dtype[Any]] = {
    "INT32": np.dtype("<i4"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_PRIORITIES = {"interactive": 1, "bulk": 2}
_TRUNCATED = ("num_truncated_source_tokens", "num_truncated_target_tokens")


def encode_ids(
    pairs: IdPairs, options: ScoringOptions, seconds_left: float | None
) -> tuple[dict[str, str], bytes]:
    """Headers and body of an inference request."""
    parameters = _parameters(options, seconds_left)
    tensors = {
        "source_ids": pairs.sources.values,
        "source_lengths": pairs.sources.lengths,
        "target_ids": pairs.targets.values,
        "target_lengths": pairs.targets.lengths,
    }
    if pairs.source_index is not None:
        tensors["source_index"] = pairs.source_index
    for name, value in (
        ("prefix_length", pairs.prefix_length),
        ("decoder_start_token_id", pairs.decoder_start_token_id),
    ):
        if isinstance(value, np.ndarray):
            tensors[name] = value
        elif value is not None:
            parameters[name] = value
    names = ["loss", "nll", "num_tokens", *options.per_token]
    head = orjson.dumps(
        {
            "inputs": [_described(name, values) for name, values in tensors.items()],
            "outputs": [
                {"name": name, "parameters": {"binary_data": True}}
                for name in names + list(_TRUNCATED if options.truncation else ())
            ],
            "parameters": parameters,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,  # an option may be a number of NumPy's
    )
    headers = {"Content-Type": "application/octet-stream", _SIZE_OF_JSON: str(len(head))}
    return headers, b"".join([head, *(values.data for values in tensors.values())])


def _parameters(options: ScoringOptions, seconds_left: float | None) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "label_smoothing": options.label_smoothing,
        "smoothing": options.smoothing,
        "on_error": options.on_error,
        "truncation": options.truncation,
        "priority": _PRIORITIES[options.priority],
        "reproducible": options.reproducible,
    }
    if options.pad_token_id is not None:
        parameters["pad_token_id"] = options.pad_token_id
    if seconds_left is not None:
        parameters["timeout"] = max(1, round(seconds_left * 1e6))  # 0 would be none
    return parameters


def _described(name: str, values: NDArray[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "shape": [len(values)],
        "datatype": _DATATYPES[values.dtype],
        "parameters": {"binary_data_size": values.nbytes},
    }


def read_result(reply: Reply, target_lengths: NDArray[Any]) -> LossResult:
    """The reply to an inference request.

    Args:
        reply: with status 200.
        target_lengths: of targets as they were sent.

    Raises:
        InvalidReply: it is none, or its arrays are not those of so many targets.
    """
    try:
        size = int(reply.headers[_SIZE_OF_JSON.lower()])
        head = orjson.loads(reply.body[:size])
        arrays = _arrays(head["outputs"], reply.body, size)
        return _result(head, arrays, target_lengths, reply.headers.get("x-request-id"))
    except (KeyError, TypeError, ValueError) as error:
        raise not_ours(reply) from error


def _arrays(outputs: list[dict[str, Any]], body: bytes, place: int) -> dict[str, NDArray[Any]]:
    arrays = {}
    for output in outputs:
        size, dtype = output["parameters"]["binary_data_size"], _DTYPES[output["datatype"]]
        values = np.frombuffer(body[place : place + size], dtype)
        if [len(values)] != output["shape"]:
            raise ValueError(f"{output['name']} has {len(values)} values, not {output['shape']}")
        # A copy of its own: aligned, in the machine's byte order, and it may be written to.
        arrays[output["name"]] = values.astype(dtype.newbyteorder("="))
        place += size
    if place != len(body):
        raise ValueError(f"{len(body) - place} bytes belong to no output")
    return arrays


def _result(
    head: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    target_lengths: NDArray[Any],
    request_id: str | None,
) -> LossResult:
    parameters = head["parameters"]

    def per_token(name: str) -> Ragged | None:
        return Ragged(arrays[name], target_lengths) if name in arrays else None

    losses = arrays["loss"]
    if len(losses) != len(target_lengths):
        raise ValueError(f"there are {len(losses)} losses for {len(target_lengths)} targets")
    return LossResult(
        model=head["model_name"],
        losses=losses,
        nlls=arrays["nll"],
        num_tokens=arrays["num_tokens"],
        errors=pair_errors(orjson.loads(parameters.get("errors", "[]"))),
        aggregate=record(Aggregate, orjson.loads(parameters["aggregate"])),
        usage=record(Usage, parameters),
        token_losses=per_token("token_losses"),
        token_nlls=per_token("token_nlls"),
        token_ranks=per_token("token_ranks"),
        token_entropies=per_token("token_entropies"),
        num_truncated_source_tokens=arrays.get("num_truncated_source_tokens"),
        num_truncated_target_tokens=arrays.get("num_truncated_target_tokens"),
        request_id=request_id,
    )
