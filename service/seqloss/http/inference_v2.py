"""The bulk wire: the Open Inference Protocol (KServe v2, as Triton speaks it), tensors as bytes.

Its clients come with KServe and Triton; docs/inference-protocol.md has the tensors and parameters.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

from seqloss.errors import InvalidRequestError
from seqloss.http.body import read_body
from seqloss.http.problems import responses
from seqloss.http.scoring import (
    Models,
    metrics_of,
    models_of,
    off_loop_if,
    score,
    seconds_since_arrival,
    settings_of,
    stream_of,
    timed_parse,
)
from seqloss.http.served_v2 import MEDIA_TYPES, NAME, VERSION, model_of
from seqloss.http.tensor_columns import INPUTS, arrays_of_tensors, options_of_parameters
from seqloss.http.tensor_replies import encode_scores, refuse_unknown_outputs
from seqloss.http.tensors import InferRequest, parse_infer_request, read_tensors, split_body
from seqloss.metrics import Metrics
from seqloss.records import RequestArrays
from seqloss.runtime import LossRuntime
from seqloss.settings import Settings

_HEADER_LENGTH = "Inference-Header-Content-Length"

# More than half a millisecond's work: JSON as for /loss, and bytes, which are not parsed.
_JSON_ON_LOOP_BYTES = 64 * 1024
_BINARY_ON_LOOP_BYTES = 1024 * 1024

router = APIRouter(prefix="/v2")


class ReplyTensor(BaseModel):
    """An output."""

    name: str
    datatype: Literal["FP64", "FP32", "INT32"]
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float | None] | None = None


class InferReply(BaseModel):
    """The JSON of a reply; the bytes of binary outputs follow it."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str | float]
    outputs: list[ReplyTensor]


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references, which would be relative to the whole OpenAPI document."""
    definitions = schema.pop("$defs")

    def resolved(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return resolved(definitions[part["$ref"].rpartition("/")[2]])
            return {name: resolved(value) for name, value in part.items()}
        return [resolved(value) for value in part] if isinstance(part, list) else part

    inlined: dict[str, Any] = resolved(schema)
    return inlined


_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_LENGTH = {
    "name": _HEADER_LENGTH,
    "in": "header",
    "description": "Where the JSON ends and the bytes of binary inputs begin.",
    "schema": {"type": "integer", "minimum": 0},
}


@router.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
@router.post(
    "/models/{name}/infer",
    summary="Losses of targets given their sources, as tensors",
    response_class=Response,
    responses={
        200: {"model": InferReply, "description": "The outputs asked for", "content": _BYTES},
        **responses(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "parameters": [NAME, _LENGTH],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _inlined(InferRequest.model_json_schema())},
                **_BYTES,
            },
        },
    },
)
async def post_infer(
    request: Request,
    models: Annotated[Models, Depends(models_of)],
    settings: Annotated[Settings, Depends(settings_of)],
    metrics: Annotated[Metrics, Depends(metrics_of)],
) -> Response:
    """Masked per-token and aggregate losses of token ids, in nats."""
    with metrics.inflight_requests.track_inprogress():
        body = await read_body(request, settings, MEDIA_TYPES)
        model_of(request, models)  # a name that is wrong is not parsed for
        header, binary = split_body(body, request.headers.get(_HEADER_LENGTH))
        large = len(header) > _JSON_ON_LOOP_BYTES or len(binary) > _BINARY_ON_LOOP_BYTES
        with timed_parse(request, metrics, "binary" if binary else "tensors_json"):
            infer, arrays = await off_loop_if(large, _parse, header, binary, settings)
        options = options_of_parameters(
            infer, stream_of(request, settings), seconds_since_arrival(request)
        )
        with model_of(request, models).held() as runtime:
            _refuse_another_model(infer, runtime)
            scored = await score(request, runtime, arrays, options)
        content, length = await off_loop_if(
            large, encode_scores, runtime.name, VERSION, infer, scored
        )
        if length is None:
            return Response(content, media_type="application/json")
        return Response(
            content, headers={_HEADER_LENGTH: str(length)}, media_type="application/octet-stream"
        )


def _parse(
    header: bytes, binary: memoryview, settings: Settings
) -> tuple[InferRequest, RequestArrays]:
    infer = parse_infer_request(header, settings.max_pairs_per_request)
    refuse_unknown_outputs(infer)
    return infer, arrays_of_tensors(infer, read_tensors(infer.inputs, binary, INPUTS))


def _refuse_another_model(infer: InferRequest, runtime: LossRuntime) -> None:
    for what, given, actual in (
        ("model_name", infer.model_name, runtime.name),
        ("model_version", infer.model_version, VERSION),
    ):
        if given is not None and given != actual:
            raise InvalidRequestError(
                f"{what} is {given[:100]!r} in the body and {actual!r} in the path"
            )
