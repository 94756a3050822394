"""What Ray Serve hands to a policy."""

from __future__ import annotations

from typing import Any

from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingContext

DEPLOYMENT = DeploymentID("seqloss", "seqloss")


def context(
    queued: list[float] | None, busy: list[float] | None = None, *, target: int = 3
) -> AutoscalingContext:
    """Of replicas that report so many tokens, and so much of their time."""

    def by_replica(values: list[float]) -> dict[ReplicaID, float]:
        return {ReplicaID(str(index), DEPLOYMENT): value for index, value in enumerate(values)}

    reported: dict[str, Any] | None = None
    if queued is not None:
        reported = {"queue_tokens": by_replica(queued), "busy_share": by_replica(busy or [])}
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="seqloss",
        app_name="seqloss",
        current_num_replicas=target,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics=reported,
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=100,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=None,
    )
