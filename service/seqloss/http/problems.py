"""Errors as RFC 9457 problem documents; the one table from error classes to statuses."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from seqloss import errors
from seqloss.errors import Fault, SeqlossError

_LOG = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
# Not registered anywhere, but what proxies write down for a client that left.
CLIENT_CLOSED_REQUEST = 499

STATUS_OF: dict[type[SeqlossError], int] = {
    errors.MalformedBodyError: 400,
    errors.AuthenticationError: 401,
    errors.ForbiddenError: 403,
    errors.UnknownModelError: 404,
    errors.BodyTimeoutError: 408,
    errors.RequestTooLargeError: 413,
    errors.PairTooLargeError: 413,
    errors.UnsupportedMediaTypeError: 415,
    errors.InvalidRequestError: 422,
    errors.ReloadError: 422,
    errors.OverloadedError: 429,
    errors.NonFiniteError: 500,
    errors.NotReadyError: 503,
    errors.EngineDeadError: 503,
    errors.DeadlineExceededError: 504,
    SeqlossError: 500,
}

# After a dead engine the process is started again; loading takes about so long.
_RESTART_SECONDS = 10.0


class FaultBody(BaseModel):
    """One thing that is wrong."""

    index: int | None = Field(description="The target it concerns, null for the whole request.")
    loc: list[str | int] = Field(description="The path into the body.")
    code: str
    detail: str


class Problem(BaseModel):
    """RFC 9457, with what a program needs to act on it."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[FaultBody]
    retry_after_ms: int | None = None
    error: str = Field(
        description="A copy of `detail`, for clients of the Open Inference Protocol."
    )


def _schema() -> dict[str, Any]:
    """`Problem` without references, which would be relative to the whole OpenAPI document."""
    schema = Problem.model_json_schema()
    definitions = schema.pop("$defs")
    schema["properties"]["errors"]["items"] = definitions["FaultBody"]
    return schema


_SCHEMA = _schema()


def install(app: FastAPI) -> None:
    """Makes every error of the application a problem document."""
    app.add_exception_handler(SeqlossError, response_to)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


def status_of(error: SeqlossError) -> int:
    """The status of the nearest class in the table."""
    return next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI schema says of errors."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": _SCHEMA}},
        }
        for status in statuses
    }


async def response_to(request: Request, error: Exception) -> Response:
    """The problem document of an error of ours, which is counted."""
    assert isinstance(error, SeqlossError)  # noqa: S101 - for mypy; it is registered so
    status = status_of(error)
    request.app.state.metrics.rejected.labels(error.code).inc()
    if status == 500 and not isinstance(error, errors.NonFiniteError):
        return await on_bug(request, error)
    retry_after = getattr(error, "retry_after_seconds", None)
    if isinstance(error, errors.EngineDeadError):
        retry_after = _RESTART_SECONDS
    return _problem(
        request, status, error.code, error.detail, getattr(error, "faults", ()), retry_after
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - for mypy; it is registered so
    code = HTTPStatus(error.status_code).name.lower()
    path, method = request.url.path, request.method
    detail = {
        404: f"there is nothing at {path}; /docs lists what there is",
        405: f"{path} does not answer {method}",
    }.get(error.status_code, str(error.detail))
    response = _problem(request, error.status_code, code, detail)
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(_: Request, __: Exception) -> Response:
    """Nobody reads it; the status is for the metrics and the log."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def on_bug(request: Request, error: Exception) -> Response:
    """The answer to what nobody foresaw; the log has the cause, the client its id."""
    request_id = request.state.request_id
    _LOG.error("request %s failed", request_id, exc_info=error)
    return _problem(
        request,
        500,
        "internal_error",
        f"this is a bug of the service; its log has the cause under {request_id}",
    )


def _problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    faults: Sequence[Fault] = (),
    retry_after_seconds: float | None = None,
) -> Response:
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request.state.request_id,
        "errors": list(faults),
        "error": detail,
    }
    request.state.facts["code"] = code
    headers = {}
    if status == HTTPStatus.REQUEST_TIMEOUT:
        headers["Connection"] = "close"  # what comes of the body now is nobody's request
    if retry_after_seconds is not None:
        body["retry_after_ms"] = round(retry_after_seconds * 1000)
        headers["Retry-After"] = str(math.ceil(retry_after_seconds))
    return Response(orjson.dumps(body), status, headers, MEDIA_TYPE)
