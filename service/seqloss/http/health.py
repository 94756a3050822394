"""Health and metrics: on the first port, and on the second one where there is one."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.responses import Response

from seqloss.errors import NotReadyError
from seqloss.http.problems import responses
from seqloss.http.scoring import Models, metrics_of, models_of
from seqloss.metrics import Metrics

health = APIRouter()
metrics = APIRouter()


class HealthBody(BaseModel):
    """A healthy service."""

    status: Literal["live", "ready"]


@health.head("/health/live", include_in_schema=False)
@health.get("/health/live", summary="Should the process live on?", responses=responses(503))
async def get_live(models: Annotated[Models, Depends(models_of)]) -> HealthBody:
    """503 once a model failed to load or lost its engine: only a new process helps."""
    for runtime in models.values():
        if runtime.state == "failed":
            raise NotReadyError(f"model {runtime.name!r}: {runtime.reason}")
    return HealthBody(status="live")


@health.head("/health/ready", include_in_schema=False)
@health.get("/health/ready", summary="Does it take requests?", responses=responses(503))
async def get_ready(models: Annotated[Models, Depends(models_of)]) -> HealthBody:
    """503 with the reason while any model is loading, draining or dead."""
    for runtime in models.values():
        if runtime.state != "ready":
            raise NotReadyError(f"model {runtime.name!r}: {runtime.reason}", retry_after_seconds=1)
    return HealthBody(status="ready")


@metrics.get(
    "/metrics",
    summary="Prometheus or OpenMetrics",
    response_class=Response,
    responses={
        200: {
            "description": "Every metric with its meaning",
            "content": {
                media_type: {"schema": {"type": "string"}}
                for media_type in ("text/plain", "application/openmetrics-text")
            },
        }
    },
)
async def get_metrics(
    request: Request, service_metrics: Annotated[Metrics, Depends(metrics_of)]
) -> Response:
    """All metrics of the process."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service_metrics.registry), headers={"Content-Type": content_type})
