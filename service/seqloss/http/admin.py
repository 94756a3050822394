"""For operators, on the second port only: nobody is asked for a key there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from seqloss.errors import UnknownModelError
from seqloss.http.problems import responses
from seqloss.http.scoring import models_of
from seqloss.metrics import ReloadOutcome
from seqloss.models import ServedModels

router = APIRouter(prefix="/admin")


class ReloadReply(BaseModel):
    """What became of each model: `failed` ones go on as they were, and the log says why."""

    outcomes: dict[str, ReloadOutcome]


@router.post("/reload", summary="Load all bundles and API keys anew", responses=responses(422, 503))
async def post_reload(request: Request) -> ReloadReply:
    """As SIGHUP does; answered when it is done. No request fails meanwhile."""
    reload: Callable[[], Awaitable[dict[str, ReloadOutcome]]] = request.app.state.reload
    return ReloadReply(outcomes=await reload())


@router.post(
    "/models/{name}/reload",
    summary="Load one bundle anew",
    responses=responses(404, 422, 503),
)
async def post_reload_model(
    name: str, models: Annotated[ServedModels, Depends(models_of)]
) -> ReloadReply:
    """422 with the reason where the bundle cannot be served; the old one goes on."""
    if name not in models:
        raise UnknownModelError(
            f"there is no model {name[:100]!r}; served are: {', '.join(models)}"
        )
    return ReloadReply(outcomes={name: await models.reload(name)})
