"""What the endpoints that score have in common, whatever the format of their bodies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, TypeVarTuple

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from seqloss.errors import ForbiddenError, InvalidRequestError, UnknownModelError
from seqloss.metrics import Metrics
from seqloss.records import RequestArrays
from seqloss.runtime import LossRuntime
from seqloss.scorer import ScoredRequest, ScoreOptions
from seqloss.settings import Settings
from seqloss.tenants import Tenant

Models = Mapping[str, LossRuntime]
_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")


async def models_of(request: Request) -> Models:
    """What is served, by name."""
    models: Models = request.app.state.models
    return models


async def settings_of(request: Request) -> Settings:
    """The application's."""
    settings: Settings = request.app.state.settings
    return settings


async def metrics_of(request: Request) -> Metrics:
    """The application's."""
    metrics: Metrics = request.app.state.metrics
    return metrics


def tenant_of(request: Request) -> Tenant:
    """Whose the request is."""
    tenant: Tenant = request.state.tenant
    return tenant


def model_named(models: Models, name: str | None, tenant: Tenant) -> LossRuntime:
    """The model of this name, or the only one that the tenant may use.

    Raises:
        UnknownModelError: there is none of this name.
        ForbiddenError: it is not for this tenant.
        InvalidRequestError: there are several, and none is named.
    """
    its = [one for one in models if tenant.may_use(one)]
    served = ", ".join(its) or "none"
    if name is None and len(its) > 1:
        raise InvalidRequestError(f"several models are served; name one of: {served}")
    if name is None:
        if not its:
            raise ForbiddenError("this key may use none of the models that are served")
        return models[its[0]]
    if name not in models:
        raise UnknownModelError(f"there is no model {name[:100]!r}; served are: {served}")
    if name not in its:
        raise ForbiddenError(f"this key may not use model {name!r}, but: {served}")
    return models[name]


def stream_of(request: Request, settings: Settings) -> str:
    """The label of the loss histograms: only names that the operator allowed."""
    stream = request.headers.get("x-seqloss-stream", "other")
    return stream if stream in settings.streams else "other"


async def off_loop_if(
    large: bool, work: Callable[[*_Arguments], _T], *arguments: *_Arguments
) -> _T:
    """Does the work here, or on a worker thread where it would hold up other requests."""
    return await run_in_threadpool(work, *arguments) if large else work(*arguments)


@contextmanager
def timed_parse(request: Request, metrics: Metrics, body_format: str) -> Iterator[None]:
    """Times what stands in its `with`, for `Server-Timing` and the metrics, unless that fails."""
    started = time.monotonic()
    yield
    request.state.parsed = (started, time.monotonic())
    seconds = request.state.parsed[1] - started
    request.state.timings["parse"] = seconds
    metrics.parse_duration.labels(body_format).observe(seconds)


def seconds_since_arrival(request: Request) -> float:
    """What of its time the request has used up."""
    return time.monotonic() - float(request.state.started)


async def score(
    request: Request, runtime: LossRuntime, arrays: RequestArrays, options: ScoreOptions
) -> ScoredRequest:
    """Scores for as long as the client is there; the reply's `Server-Timing` says what it took.

    Raises:
        SeqlossError: as `LossRuntime.score` does.
        ForbiddenError: the tenant may not use the priority.
        ClientDisconnect: the client went away.
    """
    tenant = tenant_of(request)
    facts: dict[str, Any] = request.state.facts
    facts |= {"model": runtime.name, "priority": options.priority, "pairs": len(arrays.target_ids)}
    tenant.require_priority(options.priority)
    scored = await _while_connected(request, runtime.score(arrays, replace(options, tenant=tenant)))
    usage = scored.usage
    facts |= {
        "bad_pairs": len(scored.faults),
        "source_tokens": usage.source_tokens,
        "target_tokens": usage.target_tokens,
        "encoded_sources": usage.encoded_sources,
        "batches": usage.batches,
    }
    request.state.times = scored.times
    request.state.timings["queue"] = usage.queue_seconds
    request.state.timings["compute"] = usage.compute_seconds
    return scored


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Does the work, and drops it when the client goes away."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
