"""How many workers score a dataset, and what each of them has."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from seqloss.errors import ConfigurationError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pool:
    """How a dataset is cut, and for whom.

    Attributes:
        partition_rows: most rows of an output file; None chooses.
        workers: how many; None for one per GPU of the cluster, or per machine where it has none.
        cpus_per_worker: threads of each; None for one beside a GPU, and else for all processors of
            the smallest machine, or as many as leave all of so many workers a place.
    """

    partition_rows: int | None = None
    workers: int | None = None
    cpus_per_worker: int | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """A pool on a cluster.

    Attributes:
        workers: how many.
        cpus, gpus: of each.
    """

    workers: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, pool: Pool, device: str, machines: Sequence[Mapping[str, float]]) -> Placement:
        """What the cluster has a place for.

        Args:
            pool: what is asked for.
            device: `auto`, `cpu` or `cuda:N`.
            machines: how many of what each has: `CPU`, `GPU`.

        Raises:
            ConfigurationError: none of them has.
        """
        processors = [int(one.get("CPU", 0)) for one in machines]
        cards = [int(one.get("GPU", 0)) for one in machines]
        gpus = int(device.startswith("cuda") or (device == "auto" and any(cards)))
        cpus = pool.cpus_per_worker or (1 if gpus else _share(processors, pool.workers))
        places = [
            min(size // cpus, has) if gpus else size // cpus
            for size, has in zip(processors, cards, strict=True)
        ]
        wanted = pool.workers or (sum(places) if gpus else sum(map(bool, places)))
        each = f"{cpus} processors{' and a GPU' if gpus else ''}"
        if not any(places):
            found = ", ".join(
                f"{size} and {has} GPUs" if gpus else str(size)
                for size, has in zip(processors, cards, strict=True)
            )
            raise ConfigurationError(
                f"no machine of the cluster has {each} for a worker; they have {found or 'nothing'}"
                ": ask for less, or for another device"
            )
        if wanted > sum(places):
            _LOG.warning(
                "%d workers of %s each are asked for, and %d have a place; the others begin where "
                "more machines join the cluster",
                wanted,
                each,
                sum(places),
            )
        return cls(wanted, cpus, gpus)


def device_of_workers(device: str) -> str:
    """What each is told: Ray shows it one card, which is its first.

    Raises:
        ConfigurationError: another card is asked for.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device
    if index in ("", "0"):
        return kind
    raise ConfigurationError(
        f"device {device!r} was asked for, and Ray gives each worker a card of its own; say cuda"
    )


def _share(processors: Sequence[int], workers: int | None) -> int:
    """As many as each of so many workers can have on some machine."""
    smallest = min((size for size in processors if size), default=1)
    if workers is None:
        return smallest
    return next(
        (
            share
            for share in range(max(processors, default=1), 1, -1)
            if sum(size // share for size in processors) >= workers
        ),
        1,
    )
