"""A client for seqloss, the loss of an encoder-decoder model as a service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seqloss_client._client import LossClient
from seqloss_client.errors import (
    BadRequest,
    ConnectionFailed,
    DeadlineExceeded,
    Fault,
    Forbidden,
    InvalidReply,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProblemError,
    RequestTimeout,
    SeqlossError,
    ServiceError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedMedia,
)
from seqloss_client.models import (
    Aggregate,
    Chunk,
    LossResult,
    ModelInfo,
    PairError,
    PairScore,
    Ragged,
    ScoringOptions,
    Usage,
)

if TYPE_CHECKING:
    from seqloss_client._async_client import AsyncLossClient

__version__ = "0.1.0"

__all__ = [
    "Aggregate",
    "AsyncLossClient",
    "BadRequest",
    "Chunk",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Fault",
    "Forbidden",
    "InvalidReply",
    "InvalidRequest",
    "LossClient",
    "LossResult",
    "ModelInfo",
    "NotFound",
    "Overloaded",
    "PairError",
    "PairScore",
    "ProblemError",
    "Ragged",
    "RequestTimeout",
    "ScoringOptions",
    "SeqlossError",
    "ServiceError",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnsupportedMedia",
    "Usage",
]


def __getattr__(name: str) -> Any:
    """Imports the asynchronous client for those who use it: asyncio takes its time."""
    if name != "AsyncLossClient":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from seqloss_client._async_client import AsyncLossClient  # noqa: PLC0415 - see above

    return AsyncLossClient
