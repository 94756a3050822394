"""Everything that a client raises of its own accord, as one tree.

    SeqlossError
    ├── ConnectionFailed          no connection, or one that broke before the reply
    ├── RequestTimeout            the reply did not come in time
    ├── InvalidReply              what came is no reply of this service
    └── ProblemError              the service said no: a status and a problem document
        ├── BadRequest                400  not JSON, not a tensor body
        ├── Unauthorized              401  the key is missing or wrong
        ├── Forbidden                 403  the key is not for this model
        ├── NotFound                  404  no such model or path
        ├── TooLarge                  413  over a limit that no waiting will change
        ├── UnsupportedMedia          415  a media type or encoding that is not read
        ├── InvalidRequest            422  well-formed but wrong; `errors` lists every fault
        ├── Overloaded                429  the queue is full, or the deadline cannot be met
        ├── ServiceError              500  a bug of the service, or a model that gave no number
        ├── Unavailable               502, 503  loading, draining, dead, or a proxy without service
        └── DeadlineExceeded          504  the request's own deadline, or a proxy's

Statuses that are not listed are a plain `ProblemError`. Arguments of the wrong kind are a
`TypeError` or a `ValueError` before anything is sent.
"""

from __future__ import annotations

from dataclasses import dataclass


class SeqlossError(Exception):
    """The root of the tree."""


class ConnectionFailed(SeqlossError):
    """No connection could be made, or it broke before the reply was whole."""


class RequestTimeout(SeqlossError):
    """The reply did not come within the request's deadline or the client's `timeout`."""


class InvalidReply(SeqlossError):
    """A reply that is not this service's; the address may be that of something else."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a request.

    Attributes:
        code: a stable word for programs.
        detail: a sentence for people.
        index: the target it concerns, None where it concerns the whole request.
        loc: the path into the request's body.
    """

    code: str
    detail: str
    index: int | None = None
    loc: tuple[str | int, ...] = ()


class ProblemError(SeqlossError):
    """The service refused the request, or failed.

    Attributes:
        status: of HTTP.
        code: a stable word for programs, such as `invalid_request`; "" where something else than
            the service answered, a proxy for example.
        detail: a sentence for people.
        errors: every fault, where the service lists them.
        request_id: what the service's log calls the request; None where it gave no id.
        retry_after: seconds after which the service asks to be tried again, or None.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        errors: tuple[Fault, ...] = (),
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        # All of them, so that a copy in another process is whole.
        super().__init__(status, code, detail, errors, request_id, retry_after)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = errors
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        named = f" [request {self.request_id}]" if self.request_id else ""
        first = f"{self.status} {self.code}".rstrip()
        return "\n".join(
            [f"{first}: {self.detail}{named}", *(f"  - {fault.detail}" for fault in self.errors)]
        )


class BadRequest(ProblemError):
    """400: not JSON, not a tensor body."""


class Unauthorized(ProblemError):
    """401: the key is missing or wrong."""


class Forbidden(ProblemError):
    """403: the key is not for this model."""


class NotFound(ProblemError):
    """404: no such model or path."""


class TooLarge(ProblemError):
    """413: over a limit that no waiting will change; split the request."""


class UnsupportedMedia(ProblemError):
    """415: a media type or encoding that the service does not read."""


class InvalidRequest(ProblemError):
    """422: well-formed but wrong; `errors` lists every fault."""


class Overloaded(ProblemError):
    """429: the queue is full, or what waits ahead takes longer than the deadline allows."""


class ServiceError(ProblemError):
    """500: a bug of the service, or a model that gave no number."""


class Unavailable(ProblemError):
    """502, 503: loading, draining or dead, or a proxy that reaches no service."""


class DeadlineExceeded(ProblemError):
    """504: the request's own deadline passed, or a proxy's."""


PROBLEM_OF_STATUS: dict[int, type[ProblemError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    413: TooLarge,
    415: UnsupportedMedia,
    422: InvalidRequest,
    429: Overloaded,
    500: ServiceError,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}
