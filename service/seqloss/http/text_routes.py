"""The endpoint for texts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from seqloss.errors import InvalidRequestError
from seqloss.http.body import read_json_body
from seqloss.http.columns import options_of
from seqloss.http.problems import responses
from seqloss.http.scoring import (
    Models,
    metrics_of,
    model_named,
    models_of,
    score,
    seconds_since_arrival,
    settings_of,
    stream_of,
    tenant_of,
    timed_parse,
)
from seqloss.http.text_schemas import (
    TextReply,
    TextRequest,
    arrays_of,
    encode_text_reply,
    of_texts,
    parse_text_request,
    texts_of,
)
from seqloss.metrics import Metrics
from seqloss.settings import Settings
from seqloss.tokenization.encoder import EncodedPairs, TextEncoder

router = APIRouter()


@router.post(
    "/loss/text",
    summary="Losses of texts given their sources",
    response_class=Response,
    responses={
        200: {"model": TextReply, "description": "As of /loss, with the tokens of the texts"},
        **responses(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": TextRequest.model_json_schema()}},
        }
    },
)
async def post_loss_text(
    request: Request,
    models: Annotated[Models, Depends(models_of)],
    settings: Annotated[Settings, Depends(settings_of)],
    metrics: Annotated[Metrics, Depends(metrics_of)],
) -> Response:
    """The same as for ids: the model's own tokenizer makes them, and the reply has its tokens."""
    with metrics.inflight_requests.track_inprogress(), ExitStack() as stack:
        body = await read_json_body(request, settings)
        with timed_parse(request, metrics, "text"):
            text_request, index = await run_in_threadpool(
                parse_text_request, body, settings.max_pairs_per_request
            )
            found = model_named(models, text_request.model, tenant_of(request))
            # Until it is scored: the ids are this model's, and not those of its successor.
            runtime = stack.enter_context(found.held())
            pairs = await run_in_threadpool(_encoded, runtime.text_encoder, text_request)
        options = options_of(
            text_request, stream_of(request, settings), seconds_since_arrival(request)
        )
        try:
            scored = await score(request, runtime, arrays_of(text_request, index, pairs), options)
        except InvalidRequestError as error:
            raise of_texts(error) from error
        content = await run_in_threadpool(
            encode_text_reply, runtime.name, text_request, pairs, scored
        )
        return Response(content, media_type="application/json")


def _encoded(encoder: TextEncoder, request: TextRequest) -> EncodedPairs:
    return encoder.encode(texts_of(request), with_tokens=request.tokens)
