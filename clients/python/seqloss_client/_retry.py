"""When to try again, and how long to wait before."""

from __future__ import annotations

import email.utils
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from seqloss_client._pace import Pace
from seqloss_client._steps import Attempt, Conversation, Lost, Pause, Reply, Request, Timing
from seqloss_client.errors import (
    PROBLEM_OF_STATUS,
    ConnectionFailed,
    Fault,
    InvalidReply,
    ProblemError,
    RequestTimeout,
    SeqlossError,
)

_FIRST_BACKOFF_SECONDS = 0.2
_LONGEST_BACKOFF_SECONDS = 8.0
# A service that asks for more is away; nobody should sit there that long without a word.
_LONGEST_RETRY_AFTER_SECONDS = 120.0
# The service's own 504 says more than a connection that was dropped: it is waited for.
_GRACE_SECONDS = 1.0
# Of a page that something else sent.
_LONGEST_EXCERPT = 200

_BUSY_OR_AWAY = frozenset({429, 502, 503, 504})
# Of the service itself it is a bug, and would be one again. Without the service's code a proxy said
# so, such as Ray Serve's when the process behind it died.
_INTERNAL_ERROR = 500
_REFUSALS = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a call is kept up.

    Attributes:
        retries: how often a request is sent again at most.
        retry_for: seconds since the first failure for which it is sent again beyond that.
        reply_seconds: how long to wait for each reply where there is no deadline.
        deadline: on the clock; None where there is none.
    """

    retries: int
    retry_for: float
    reply_seconds: float
    deadline: float | None = None


def exchange(
    encode: Callable[[float | None], Request],
    patience: Patience,
    timing: Timing,
    pace: Pace | None = None,
) -> Conversation[Reply]:
    """Sends a request until there is a good reply, or no hope for one.

    Args:
        encode: makes the request, given the seconds that are left of its deadline.
        patience: when to give up.
        timing: clocks and chance.
        pace: told of refusals and successes.

    Returns:
        A reply with a status of 200 to 299.

    Raises:
        SeqlossError: what the last attempt came to.
    """
    failures, first_failure = 0, timing.clock()
    while True:
        left = _seconds_left(patience, timing)
        request = encode(left)
        round_ = pace.round if pace else 0
        wait = patience.reply_seconds if left is None else left + _GRACE_SECONDS
        outcome = yield Attempt(request, wait)
        error = _error_of(outcome, timing)
        if error is None:
            assert isinstance(outcome, Reply)  # noqa: S101 - for mypy; there would be an error
            if pace:
                pace.succeeded()
            return outcome
        if pace and isinstance(error, ProblemError) and error.status in _REFUSALS:
            pace.refused(round_)
        if failures == 0:
            first_failure = timing.clock()
        delay = _delay(error, failures, timing)
        if not _may_retry(outcome, error) or not _is_worth(
            delay, failures, first_failure, patience, timing
        ):
            raise error from (outcome.cause if isinstance(outcome, Lost) else None)
        failures += 1
        yield Pause(delay)


def _seconds_left(patience: Patience, timing: Timing) -> float | None:
    if patience.deadline is None:
        return None
    left = patience.deadline - timing.clock()
    if left <= 0:
        raise RequestTimeout("the deadline passed before the request could be sent")
    return left


def _may_retry(outcome: Reply | Lost | None, error: SeqlossError) -> bool:
    """Scoring changes nothing, so whatever may be otherwise next time is tried again."""
    if isinstance(outcome, Lost):
        return not outcome.is_final
    if not isinstance(error, ProblemError):
        return False
    if error.status == _INTERNAL_ERROR:
        return not error.code
    return error.status in _BUSY_OR_AWAY and error.code != "deadline_exceeded"


def _delay(error: SeqlossError, failures: int, timing: Timing) -> float:
    """Exponential with full jitter, on top of what the service asks for.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
    """
    ceiling = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 30))
    asked = getattr(error, "retry_after", None) or 0.0
    return asked + ceiling * timing.random()


def _is_worth(
    delay: float, failures: int, first_failure: float, patience: Patience, timing: Timing
) -> bool:
    """Whether the retry comes in time."""
    due = timing.clock() + delay
    if patience.deadline is not None and due >= patience.deadline:
        return False
    if delay > _LONGEST_RETRY_AFTER_SECONDS:
        return False
    return failures < patience.retries or due < first_failure + patience.retry_for


# ---------------------------------------------------------------- what went wrong


def _error_of(outcome: Reply | Lost | None, timing: Timing) -> SeqlossError | None:
    if isinstance(outcome, Lost):
        return (RequestTimeout if outcome.is_timeout else ConnectionFailed)(outcome.detail)
    if outcome is None:
        raise TypeError("an attempt is answered with a Reply or a Lost. This is a bug.")
    return None if 200 <= outcome.status < 300 else problem_of(outcome, timing.wall_clock())


def problem_of(reply: Reply, wall_clock: float) -> ProblemError:
    """The error that a reply stands for.

    Args:
        reply: with any status but 200 to 299.
        wall_clock: seconds since 1970, for a `Retry-After` that is a date.
    """
    kind = PROBLEM_OF_STATUS.get(reply.status, ProblemError)
    body = _object_of(reply.body)
    request_id = body.get("request_id") or reply.headers.get("x-request-id")
    retry_after = _retry_after(body, reply, wall_clock)
    if not isinstance(body.get("detail"), str):
        excerpt = reply.body[:_LONGEST_EXCERPT].decode("utf-8", "replace").strip()
        detail = f"something other than the service answered: {excerpt or 'nothing'}"
        return kind(reply.status, "", detail, (), request_id, retry_after)
    faults = tuple(
        Fault(one["code"], one["detail"], one.get("index"), tuple(one.get("loc", ())))
        for one in body.get("errors", ())
        if isinstance(one, dict) and {"code", "detail"} <= one.keys()
    )
    code = str(body.get("code", ""))
    return kind(reply.status, code, body["detail"], faults, request_id, retry_after)


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        read = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return read if isinstance(read, dict) else {}


def _retry_after(body: dict[str, Any], reply: Reply, wall_clock: float) -> float | None:
    """Seconds; the body is finer than the header, which is in seconds or a date (RFC 9110)."""
    milliseconds = body.get("retry_after_ms")
    if isinstance(milliseconds, int | float):
        return max(0.0, milliseconds / 1000)
    header = reply.headers.get("retry-after")
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - wall_clock)
    except ValueError:
        return None


def read_object(reply: Reply) -> dict[str, Any]:
    """The JSON object of a good reply.

    Raises:
        InvalidReply: it is none.
    """
    read = _object_of(reply.body)
    if not read:
        raise not_ours(reply)
    return read


def not_ours(reply: Reply) -> InvalidReply:
    """The error for a good reply that this client cannot read."""
    excerpt = reply.body[:_LONGEST_EXCERPT].decode("utf-8", "replace").strip()
    return InvalidReply(
        f"the reply is not one of seqloss; is base_url the address of something else? {excerpt!r}"
    )
