"""The endpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from seqloss.http.body import read_json_body
from seqloss.http.columns import arrays_of, encode_loss_reply, options_of
from seqloss.http.problems import responses
from seqloss.http.schemas import LossReply, LossRequest, parse_loss_request
from seqloss.http.scoring import (
    Models,
    metrics_of,
    model_named,
    models_of,
    off_loop_if,
    score,
    seconds_since_arrival,
    settings_of,
    stream_of,
    tenant_of,
    timed_parse,
)
from seqloss.metrics import Metrics
from seqloss.records import RequestArrays
from seqloss.runtime import LossRuntime
from seqloss.settings import Settings

# Parsing a larger body takes more than half a millisecond. A thread lets others in between its
# steps, though not during them: each is one call that holds the interpreter.
_PARSE_ON_LOOP_BYTES = 64 * 1024

router = APIRouter()


@router.post(
    "/loss",
    summary="Losses of targets given their sources",
    response_class=Response,
    responses={
        200: {"model": LossReply, "description": "One array per quantity, entry i for target i"},
        **responses(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": LossRequest.model_json_schema()}},
        }
    },
)
async def post_loss(
    request: Request,
    models: Annotated[Models, Depends(models_of)],
    settings: Annotated[Settings, Depends(settings_of)],
    metrics: Annotated[Metrics, Depends(metrics_of)],
) -> Response:
    """Masked per-token and aggregate losses of token ids, in nats."""
    with metrics.inflight_requests.track_inprogress():
        body = await read_json_body(request, settings)
        large = len(body) > _PARSE_ON_LOOP_BYTES
        with timed_parse(request, metrics, "json"):
            loss_request, arrays = await off_loop_if(large, _parse, body, settings)
        options = options_of(
            loss_request, stream_of(request, settings), seconds_since_arrival(request)
        )
        with model_named(models, loss_request.model, tenant_of(request)).held() as runtime:
            scored = await score(request, runtime, arrays, options)
        content = await off_loop_if(large, encode_loss_reply, runtime.name, loss_request, scored)
        return Response(content, media_type="application/json")


def _parse(body: bytes, settings: Settings) -> tuple[LossRequest, RequestArrays]:
    request = parse_loss_request(body, settings.max_pairs_per_request)
    return request, arrays_of(request)


# ---------------------------------------------------------------- what is served


class GraphBody(BaseModel):
    """What the bundle has of one precision."""

    engine: str
    precision: str
    max_error: float = Field(
        description="The largest difference of a token's nll from transformers in float32, or "
        "from the ONNX files that were imported, in nats, measured when the bundle was made."
    )
    mean_error: float


class LanguagesBody(BaseModel):
    """How the model is told the languages of a pair.

    Requests to /loss carry these ids themselves; those to /loss/text name the languages.
    """

    ids: dict[str, int]
    source: Literal["first", "last", "none"] = Field(
        description="Where the id of the source's language stands in the source."
    )
    target: Literal["first", "decoder_start", "first_of_source"] = Field(
        description="Where the id of the target's language goes: first in the target "
        "(`prefix_length` 1 keeps it out of the loss), `decoder_start_token_id`, or first in the "
        "source."
    )


class ModelBody(BaseModel):
    """A served model."""

    name: str
    state: Literal["loading", "ready", "draining", "failed"]
    family: str
    checkpoint: str
    engine: str | None = Field(description="null while it is being loaded")
    device: str | None = Field(description="null while it is being loaded")
    precision: str | None = Field(description="null while it is being loaded")
    compiled_kernels: bool | None = Field(
        description="Whether kernels that were compiled for this CPU compute."
    )
    batch_invariant: bool | None = Field(
        description="Whether a pair's losses are the same bits whoever shares its batch."
    )
    graphs: list[GraphBody] = Field(description="What the bundle holds.")
    bundle_digest: str
    source_vocabulary_size: int
    target_vocabulary_size: int
    num_classes: int = Field(description="Classes of the softmax, excluded ones not counted.")
    decoder_start_token_id: int
    pad_token_id: int
    bos_token_id: int | None
    eos_token_id: int | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | None
    languages: LanguagesBody | None
    text: bool = Field(description="Whether `/loss/text` takes texts for it.")
    max_source_tokens: int
    max_target_tokens: int
    max_batch_tokens: int


class ModelsBody(BaseModel):
    """All served models."""

    models: list[ModelBody]


@router.get("/models", summary="What is served", responses=responses(401))
async def get_models(request: Request, models: Annotated[Models, Depends(models_of)]) -> ModelsBody:
    """Every model that the key may use, with its limits, special ids and measured error."""
    tenant = tenant_of(request)
    its = (runtime for name, runtime in models.items() if tenant.may_use(name))
    return ModelsBody(models=[_model_body(runtime) for runtime in its])


# Declared by hand: for a parameter of the function FastAPI promises a 422 that never comes.
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


@router.get(
    "/models/{name}",
    summary="One served model",
    responses=responses(401, 403, 404),
    openapi_extra={"parameters": [_NAME]},
)
async def get_model(
    request: Request,
    models: Annotated[Models, Depends(models_of)],
) -> ModelBody:
    """A model with its limits, special ids and measured error."""
    return _model_body(model_named(models, request.path_params["name"], tenant_of(request)))


def _model_body(runtime: LossRuntime) -> ModelBody:
    manifest = runtime.bundle.manifest
    ids, vocabulary = manifest.special_ids, manifest.vocabulary
    info = runtime.engine.info if runtime.engine else None
    return ModelBody(
        name=runtime.name,
        state=runtime.state,
        family=manifest.family,
        checkpoint=manifest.checkpoint.name,
        engine=info.engine if info else None,
        device=info.device if info else None,
        precision=info.precision if info else None,
        compiled_kernels=info.has_kernels if info else None,
        batch_invariant=info.is_batch_invariant if info else None,
        graphs=[
            GraphBody(
                engine=graph.engine,
                precision=graph.precision,
                max_error=graph.max_error,
                mean_error=graph.mean_error,
            )
            for graph in manifest.graphs
        ],
        bundle_digest=runtime.bundle.digest,
        source_vocabulary_size=vocabulary.source,
        target_vocabulary_size=vocabulary.target,
        num_classes=vocabulary.num_classes,
        decoder_start_token_id=ids.decoder_start,
        pad_token_id=ids.pad,
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        forced_bos_token_id=ids.forced_bos,
        forced_eos_token_id=ids.forced_eos,
        languages=manifest.languages
        and LanguagesBody.model_validate(manifest.languages.model_dump()),
        text=manifest.text is not None,
        max_source_tokens=runtime.limits.max_source_tokens,
        max_target_tokens=runtime.limits.max_target_tokens,
        max_batch_tokens=runtime.max_batch_tokens,
    )
