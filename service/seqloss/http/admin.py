"""For operators, on the second port only: nobody is asked for a key there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from seqloss.errors import ForbiddenError, ReloadError, UnknownModelError
from seqloss.http.problems import responses
from seqloss.http.scoring import models_of
from seqloss.metrics import ReloadOutcome
from seqloss.models import ServedModels


async def _not_from_a_page(request: Request) -> None:
    """An operator's browser reaches this port, and so would any page that is open in it."""
    if "origin" in request.headers:
        raise ForbiddenError("no page of a browser may ask for this")


router = APIRouter(prefix="/admin", dependencies=[Depends(_not_from_a_page)])


class ReloadReply(BaseModel):
    """What became of each model."""

    outcomes: dict[str, ReloadOutcome]


@router.post("/reload", summary="Load all bundles and API keys anew", responses=responses(422, 503))
async def post_reload(request: Request) -> ReloadReply:
    """As SIGHUP does; answered when it is done. No request fails meanwhile.

    422 where a bundle cannot be served: it goes on as it was, and the others are loaded.
    """
    reload: Callable[[], Awaitable[dict[str, ReloadOutcome]]] = request.app.state.reload
    outcomes = await reload()
    if failed := [name for name, outcome in outcomes.items() if outcome == "failed"]:
        raise ReloadError(f"these go on as they were, the log says why: {', '.join(failed)}")
    return ReloadReply(outcomes=outcomes)


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
