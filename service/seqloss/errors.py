"""Everything that can go wrong, as one tree.

    SeqlossError
    ├── RequestError              the caller's request cannot be answered as it is
    │   ├── AuthenticationError       no API key, or one that nobody has
    │   ├── ForbiddenError            not with this API key
    │   ├── BodyTimeoutError          the body did not arrive in time
    │   ├── MalformedBodyError
    │   ├── UnsupportedMediaTypeError
    │   ├── UnknownModelError
    │   ├── InvalidRequestError       well-formed but wrong; lists every fault
    │   │   └── NoTokenizerError          texts for a model that takes ids only
    │   ├── RequestTooLargeError
    │   └── PairTooLargeError         one pair alone does not fit the device
    ├── ServiceError              a good request that cannot be answered now
    │   ├── OverloadedError
    │   │   ├── UnmeetableDeadlineError
    │   │   └── QuotaExceededError    the tenant had what it may have
    │   ├── DeadlineExceededError
    │   ├── NotReadyError
    │   └── NonFiniteError            the model produced NaN or infinity
    ├── EngineError
    │   ├── OutOfMemoryError          this batch does not fit; a smaller one may
    │   ├── EngineDeadError           the device is gone until a restart
    │   └── SelfTestError             the device computes other numbers than the bundle states
    ├── ReloadError               a bundle that cannot take the place of the one that is served
    ├── BundleError               a folder that is not a bundle that can be trusted
    ├── CheckpointError           a checkpoint that cannot be exported
    ├── KernelsUnavailableError   none can be compiled for this machine
    └── ConfigurationError        settings or arguments that contradict each other

Nothing here knows HTTP: `seqloss.http.problems` holds the one table from classes to statuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

# What can be wrong with a pair. Numbers on the wire count from 1 in this order: append only.
PAIR_CODES = (
    "token_out_of_range",
    "empty_source",
    "empty_target",
    "source_too_long",
    "target_too_long",
    "source_mask_not_trailing",
    "non_finite",
    "out_of_memory",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        code: a stable word for programs; that of a pair is one of `PAIR_CODES`.
        detail: a sentence for people.
        index: the target it concerns, or None where it concerns the whole request.
        loc: the path into the request's body, such as `("target_ids", 2, 0)`.
    """

    code: str
    detail: str
    index: int | None = None
    loc: tuple[str | int, ...] = ()


class SeqlossError(Exception):
    """The root of the tree."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class _ListsFaultsError(SeqlossError):
    """An error that names everything that is wrong, not only the first thing."""

    def __init__(self, detail: str, faults: Sequence[Fault | str] = ()) -> None:
        super().__init__(detail)
        self.faults = tuple(
            fault if isinstance(fault, Fault) else Fault(self.code, fault) for fault in faults
        )

    def __str__(self) -> str:
        return "\n".join([self.detail, *(f"  - {fault.detail}" for fault in self.faults)])


class RequestError(_ListsFaultsError):
    """The caller's request cannot be answered as it is."""

    code = "bad_request"


class AuthenticationError(RequestError):
    """An API key is needed, and none was given or nobody has it."""

    code = "unauthenticated"


class ForbiddenError(RequestError):
    """The API key is somebody's, and does not allow this."""

    code = "forbidden"


class BodyTimeoutError(RequestError):
    """The body did not arrive in time."""

    code = "body_timeout"


class MalformedBodyError(RequestError):
    """The body is not what its media type says."""

    code = "malformed_body"


class UnsupportedMediaTypeError(RequestError):
    """A media type or content encoding that this service does not read."""

    code = "unsupported_media_type"


class UnknownModelError(RequestError):
    """No model of this name is served."""

    code = "unknown_model"


class InvalidRequestError(RequestError):
    """Well-formed but wrong: shapes, counts, ids, lengths, unknown fields."""

    code = "invalid_request"


class NoTokenizerError(InvalidRequestError):
    """Texts for a model whose bundle, or whose service, has nothing to make ids of them."""

    code = "no_tokenizer"


class RequestTooLargeError(RequestError):
    """The request is over a limit that no waiting will change."""

    code = "request_too_large"


class PairTooLargeError(RequestError):
    """A single pair that does not fit the device's memory."""

    code = "out_of_memory"


class ServiceError(_ListsFaultsError):
    """A good request that cannot be answered now."""

    code = "unavailable"

    def __init__(
        self, detail: str, faults: Sequence[Fault] = (), *, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(detail, faults)
        self.retry_after_seconds = retry_after_seconds


class OverloadedError(ServiceError):
    """The queue has no room for the request's tokens."""

    code = "overloaded"


class UnmeetableDeadlineError(OverloadedError):
    """What waits ahead takes longer than the request's `timeout_ms` allows."""

    code = "deadline_unmeetable"


class QuotaExceededError(OverloadedError):
    """The tenant's tokens of this minute are used up."""

    code = "over_quota"


class DeadlineExceededError(ServiceError):
    """The request's `timeout_ms` passed before all of it was scored."""

    code = "deadline_exceeded"


class NotReadyError(ServiceError):
    """Loading, self-testing, draining or dead."""

    code = "not_ready"


class NonFiniteError(ServiceError):
    """The model produced NaN or infinity for a pair, and the request asked for all or nothing."""

    code = "non_finite"


class EngineError(SeqlossError):
    """The model's engine could not do its work."""

    code = "engine_error"


class OutOfMemoryError(EngineError):
    """This batch does not fit the device; a smaller one may."""

    code = "out_of_memory"


class EngineDeadError(EngineError):
    """The device is gone until the process is started again."""

    code = "engine_dead"


class SelfTestError(EngineError):
    """This device computes other numbers than the bundle states."""

    code = "self_test_failed"


class BundleError(_ListsFaultsError):
    """A folder that is not a bundle that can be trusted; lists every fault."""

    code = "bad_bundle"


class ReloadError(_ListsFaultsError):
    """A bundle that cannot take the place of the one that is served, which goes on serving."""

    code = "reload_failed"


class CheckpointError(_ListsFaultsError):
    """A checkpoint that cannot be exported; lists every fault."""

    code = "bad_checkpoint"


class KernelsUnavailableError(SeqlossError):
    """There are no kernels for this machine; its text says why."""

    code = "kernels_unavailable"


class ConfigurationError(SeqlossError):
    """Settings or arguments that contradict each other."""

    code = "bad_configuration"
