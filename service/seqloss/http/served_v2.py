"""What is served, in the words of the Open Inference Protocol: health, models, statistics."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from seqloss import __version__
from seqloss.errors import PAIR_CODES, NotReadyError, UnknownModelError
from seqloss.http.body import read_body
from seqloss.http.health import get_live, get_ready
from seqloss.http.problems import responses
from seqloss.http.schemas import parse_body
from seqloss.http.scoring import Models, metrics_of, model_named, models_of, settings_of, tenant_of
from seqloss.http.tensor_columns import INPUTS, REQUIRED
from seqloss.http.tensor_replies import OUTPUTS
from seqloss.metrics import Metrics
from seqloss.runtime import LossRuntime
from seqloss.settings import Settings

VERSION = "1"
_EXTENSIONS = ["binary_tensor_data", "model_configuration", "parameters", "statistics"]

# Triton's clients for Python name no media type, those for C++ the second one, whatever they send.
MEDIA_TYPES = ("application/json", "application/octet-stream", "")
# What curl, and so the client for C++, says of a body when nobody says what it is.
_CURLS_OWN = "application/x-www-form-urlencoded"

# Declared by hand: for a parameter of the function FastAPI promises a 422 that never comes.
NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}

_STATES = {"loading": "LOADING", "ready": "READY", "draining": "UNLOADING", "failed": "UNAVAILABLE"}

router = APIRouter(prefix="/v2")


def model_of(request: Request, models: Models) -> LossRuntime:
    """The model of the path, which has one version.

    Raises:
        UnknownModelError: there is no such model, or no such version of it.
    """
    runtime = model_named(models, request.path_params["name"], tenant_of(request))
    version = request.path_params.get("version", VERSION)
    if version != VERSION:
        raise UnknownModelError(
            f"there is no version {version!r} of model {runtime.name!r}; there is {VERSION!r}"
        )
    return runtime


# ---------------------------------------------------------------- health


class LiveBody(BaseModel):
    """A process that should live on."""

    live: Literal[True]


class ReadyBody(BaseModel):
    """A service that takes requests."""

    ready: Literal[True]


class ModelReadyBody(BaseModel):
    """A model that takes requests."""

    name: str
    ready: Literal[True]


@router.get("/health/live", summary="Should the process live on?", responses=responses(503))
async def get_v2_live(models: Annotated[Models, Depends(models_of)]) -> LiveBody:
    """As /health/live."""
    await get_live(models)
    return LiveBody(live=True)


@router.get("/health/ready", summary="Does it take requests?", responses=responses(503))
async def get_v2_ready(models: Annotated[Models, Depends(models_of)]) -> ReadyBody:
    """As /health/ready."""
    await get_ready(models)
    return ReadyBody(ready=True)


@router.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
@router.get(
    "/models/{name}/ready",
    summary="Does the model take requests?",
    responses=responses(404, 503),
    openapi_extra={"parameters": [NAME]},
)
async def get_model_ready(
    request: Request, models: Annotated[Models, Depends(models_of)]
) -> ModelReadyBody:
    """503 with the reason while it does not."""
    runtime = model_of(request, models)
    if runtime.state != "ready":
        raise NotReadyError(f"model {runtime.name!r}: {runtime.reason}", retry_after_seconds=1)
    return ModelReadyBody(name=runtime.name, ready=True)


# ---------------------------------------------------------------- what is served


class ServerBody(BaseModel):
    """The service."""

    name: str
    version: str
    extensions: list[str]


class TensorBody(BaseModel):
    """An input or output; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class MetadataBody(BaseModel):
    """A model's tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorBody]
    outputs: list[TensorBody]


@router.get("", summary="The service's version and extensions")
async def get_server() -> ServerBody:
    """What of the protocol there is."""
    return ServerBody(name="seqloss", version=__version__, extensions=_EXTENSIONS)


class IndexRequest(BaseModel):
    """Which models to list."""

    ready: bool = False


@router.post("/repository/index", include_in_schema=False)
async def post_index(
    request: Request,
    models: Annotated[Models, Depends(models_of)],
    settings: Annotated[Settings, Depends(settings_of)],
) -> list[dict[str, str]]:
    """The served models with their states."""
    body = await read_body(request, settings, (*MEDIA_TYPES, _CURLS_OWN))
    tenant = tenant_of(request)
    only_ready = parse_body(IndexRequest, body).ready if body else False
    return [
        {
            "name": runtime.name,
            "version": VERSION,
            "state": _STATES[runtime.state],
            "reason": "" if runtime.state == "ready" else runtime.reason,
        }
        for runtime in models.values()
        if tenant.may_use(runtime.name) and (runtime.state == "ready" or not only_ready)
    ]


# Before what has a name in this place.
@router.get("/models/stats", include_in_schema=False)
async def get_all_stats(
    request: Request,
    models: Annotated[Models, Depends(models_of)],
    metrics: Annotated[Metrics, Depends(metrics_of)],
) -> dict[str, Any]:
    """Of all models that the key may use."""
    tenant = tenant_of(request)
    return {"model_stats": [_stats(name, metrics) for name in models if tenant.may_use(name)]}


@router.get("/models/{name}/versions/{version}/stats", include_in_schema=False)
@router.get("/models/{name}/stats", include_in_schema=False)
async def get_stats(
    request: Request,
    models: Annotated[Models, Depends(models_of)],
    metrics: Annotated[Metrics, Depends(metrics_of)],
) -> dict[str, Any]:
    """Counts and durations since the start."""
    return {"model_stats": [_stats(model_of(request, models).name, metrics)]}


def _stats(name: str, metrics: Metrics) -> dict[str, Any]:
    """As Triton has them; what it counts and this service does not is left out."""
    totals = metrics.model(name).totals()

    def duration(seconds: float) -> dict[str, int]:
        # Of batches that requests share too: perf_analyzer gives up where counts differ.
        return {"count": totals.num_requests, "ns": round(seconds * 1e9)}

    return {
        "name": name,
        "version": VERSION,
        "inference_count": totals.num_pairs,
        "execution_count": totals.num_batches,
        "inference_stats": {
            "success": duration(totals.request_seconds),
            "queue": duration(totals.queue_seconds),
            "compute_input": duration(totals.collate_seconds),
            "compute_infer": duration(totals.compute_seconds),
            "compute_output": duration(totals.scatter_seconds),
            # There is no cache of replies.
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
    }


@router.get("/models/{name}/versions/{version}", include_in_schema=False)
@router.get(
    "/models/{name}",
    summary="One model's tensors",
    responses=responses(404),
    openapi_extra={"parameters": [NAME]},
)
async def get_metadata(
    request: Request, models: Annotated[Models, Depends(models_of)]
) -> MetadataBody:
    """The inputs that it takes and the outputs that it has."""
    runtime = model_of(request, models)
    return MetadataBody(
        name=runtime.name,
        versions=[VERSION],
        platform=_platform(runtime),
        inputs=[
            TensorBody(name=name, datatype=datatypes[0], shape=[-1])
            for name, datatypes in INPUTS.items()
        ],
        outputs=[
            TensorBody(name=name, datatype=datatype, shape=[-1])
            for name, (datatype, _) in OUTPUTS.items()
        ],
    )


@router.get("/models/{name}/versions/{version}/config", include_in_schema=False)
@router.get("/models/{name}/config", include_in_schema=False)
async def get_config(
    request: Request, models: Annotated[Models, Depends(models_of)]
) -> dict[str, Any]:
    """The model's configuration as Triton would have it; perf_analyzer reads it."""
    runtime = model_of(request, models)
    return {
        "name": runtime.name,
        "platform": _platform(runtime),
        "backend": "seqloss",
        # Requests say themselves how many pairs they hold; the first dimension is not theirs.
        "max_batch_size": 0,
        "input": [
            {
                "name": name,
                "data_type": f"TYPE_{datatypes[0]}",
                "dims": [-1],
                "optional": name not in REQUIRED,
            }
            for name, datatypes in INPUTS.items()
        ],
        "output": [
            {"name": name, "data_type": f"TYPE_{datatype}", "dims": [-1]}
            for name, (datatype, _) in OUTPUTS.items()
        ],
        "dynamic_batching": {"priority_levels": 2, "default_priority_level": 1},
        "parameters": {"error_codes": {"string_value": ",".join(PAIR_CODES)}},
    }


def _platform(runtime: LossRuntime) -> str:
    """What runs the model, once it is loaded."""
    return f"seqloss_{runtime.engine.info.engine}" if runtime.engine else "seqloss"
