"""How many replicas a load needs.

Ray Serve sends this module by value to its controller, so it imports nothing of ours.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

# What replicas report.
QUEUE_TOKENS, BUSY_SHARE = "queue_tokens", "busy_share"


class ByQueuedTokens:
    """A policy for Ray Serve: so many replicas that none has too many tokens, or is too busy.

    Requests say little of how much work waits: one may hold a pair or 50,000.  Tokens that wait say
    when more is wanted, and nothing of when less would do, since nothing waits where replicas keep
    up; that is said by the share of the time in which their devices compute.  Ray Serve averages
    both, and applies the bounds, delays and factors of the deployment's `autoscaling_config`.
    """

    def __init__(self, tokens_per_replica: float = 200_000, busy_share: float = 0.8) -> None:
        """Of one deployment.

        Args:
            tokens_per_replica: admitted and not yet computed, over which another replica is
                wanted: what one computes in as long as a client may well wait.
            busy_share: of the time, over which another replica is wanted.

        Raises:
            ValueError: the former is not above 0, or the latter not between 0 and 1.
        """
        if not tokens_per_replica > 0:
            raise ValueError(f"tokens_per_replica is {tokens_per_replica} and must be above 0")
        if not 0 < busy_share <= 1:
            raise ValueError(f"busy_share is {busy_share} and must be above 0 and at most 1")
        self._tokens_per_replica = tokens_per_replica
        self._busy_share = busy_share

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The replicas that are wanted, at least one, and no state."""
        reported = context.aggregated_metrics or {}
        if not reported.get(QUEUE_TOKENS):  # nobody has said anything yet
            return max(1, context.target_num_replicas), {}
        queued = sum(reported[QUEUE_TOKENS].values())
        busy = sum(reported.get(BUSY_SHARE, {}).values())
        by_queue = math.ceil(queued / self._tokens_per_replica)
        # Two of 0.8 are two replicas, whatever a sum of floats makes of it.
        by_share = math.ceil(round(busy / self._busy_share, 6))
        return max(1, by_queue, by_share), {}
