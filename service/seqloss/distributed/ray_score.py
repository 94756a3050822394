"""The command `seqloss ray-score`: a dataset on a cluster, and a line now and then."""

from __future__ import annotations

import logging
import os
import sys
import time

import ray
from ray.exceptions import RayError

from seqloss.distributed.pool import Pool
from seqloss.distributed.ray_data import Progress, score_dataset
from seqloss.distributed.workers import Work
from seqloss.errors import ConfigurationError

_LINE_EVERY_SECONDS = 5.0


def score_and_show(work: Work, pool: Pool, address: str | None) -> int:
    """Scores a dataset, on a cluster or on a Ray of its own on this machine.

    Args:
        work: what, where and how.
        pool: by how many.
        address: of a cluster; None for `RAY_ADDRESS`, or this machine where that is not set.

    Returns:
        The exit status.

    Raises:
        ConfigurationError: the dataset, the output, the bundle or the cluster is not as it should
            be.
    """
    try:
        # Without a word it would join whatever Ray was started on this machine last.
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address, include_dashboard=False, logging_level=logging.WARNING)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"there is no Ray to be had at {address}: {error}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would repeat what is said here
    try:
        _show(work, pool)
    except OSError as error:  # of files and stores
        raise ConfigurationError(str(error)) from error
    finally:
        ray.shutdown()
    return 0


def _show(work: Work, pool: Pool) -> None:
    earlier: Progress | None = None
    said = 0.0
    for progress in score_dataset(work, pool):
        earlier = earlier or progress
        is_done = progress.partitions == progress.of_partitions
        if is_done or time.monotonic() - said >= _LINE_EVERY_SECONDS:
            said = time.monotonic()
            print(_line(progress, earlier), file=sys.stderr, flush=True)


def _line(progress: Progress, earlier: Progress) -> str:
    rate = (progress.pairs - earlier.pairs) / max(progress.seconds, 1e-9)
    left = (progress.of_pairs - progress.pairs) / rate if rate else None
    parts = [
        f"{progress.pairs:,} of {progress.of_pairs:,} pairs",
        f"{progress.partitions} of {progress.of_partitions} partitions",
        f"{progress.errors:,} errors",
    ]
    if rate:
        parts.append(f"{rate:,.0f} pairs/s")
    if left:
        parts.append(f"{left:,.0f} s left")
    return ", ".join(parts)
