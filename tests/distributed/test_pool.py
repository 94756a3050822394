"""Workers have a place, or somebody hears that they have none."""

from __future__ import annotations

from typing import Any

import pytest

from seqloss.distributed.pool import Placement, Pool, device_of_workers
from seqloss.errors import ConfigurationError


def machines(*processors: int, gpus: int = 0) -> list[dict[str, float]]:
    """As Ray lists them, which leaves out what a machine has none of."""
    return [
        {name: float(number) for name, number in (("CPU", size), ("GPU", gpus)) if number}
        for size in processors
    ]


@pytest.mark.parametrize(
    ("pool", "device", "cluster", "placement"),
    [
        (Pool(), "cpu", machines(8, 8), (2, 8, 0)),
        (Pool(), "cpu", machines(8, 16), (2, 8, 0)),
        (Pool(), "cpu", machines(0, 8), (1, 8, 0)),
        (Pool(workers=3), "cpu", machines(8, 8), (3, 4, 0)),
        (Pool(workers=2), "cpu", machines(8), (2, 4, 0)),
        (Pool(workers=1), "cpu", machines(4, 16), (1, 16, 0)),
        (Pool(workers=2), "cpu", machines(2), (2, 1, 0)),
        (Pool(cpus_per_worker=4), "cpu", machines(8, 2, 8), (2, 4, 0)),
        (Pool(workers=5, cpus_per_worker=3), "cpu", machines(8, 8, 4), (5, 3, 0)),
        (Pool(), "auto", machines(8, 8), (2, 8, 0)),
        (Pool(), "auto", machines(16, 16, gpus=4), (8, 1, 1)),
        (Pool(), "cuda", machines(16, gpus=4), (4, 1, 1)),
        (Pool(), "auto", machines(2, gpus=4), (2, 1, 1)),
        (Pool(cpus_per_worker=8), "cuda:0", machines(16, gpus=4), (2, 8, 1)),
        (Pool(workers=1), "auto", machines(0, gpus=0) + machines(4, gpus=1), (1, 1, 1)),
        (Pool(), "cpu", machines(16, gpus=4), (1, 16, 0)),
    ],
)
def test_a_pool_has_places(
    pool: Pool, device: str, cluster: Any, placement: tuple[int, int, int]
) -> None:
    assert Placement.of(pool, device, cluster) == Placement(*placement)


@pytest.mark.parametrize(
    ("pool", "device", "cluster", "message"),
    [
        (Pool(), "cuda:0", machines(8), "has 1 processors and a GPU .* have 8 and 0 GPUs:"),
        (Pool(cpus_per_worker=64), "cpu", machines(16, 16), "has 64 processors .* have 16, 16:"),
        (Pool(), "auto", machines(0, gpus=4), "has 1 processors and a GPU .* have 0 and 4 GPUs:"),
        (Pool(), "cpu", machines(0), "has 1 processors .* have 0:"),
        (Pool(workers=2), "auto", [], "has 1 processors .* have nothing:"),
    ],
)
def test_a_pool_that_has_none_is_refused(
    pool: Pool, device: str, cluster: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"no machine of the cluster {message}"):
        Placement.of(pool, device, cluster)


@pytest.mark.parametrize(
    ("pool", "cluster", "places"),
    [
        (Pool(workers=3, cpus_per_worker=5), machines(8, 8), 2),
        (Pool(workers=3), machines(2), 2),
        (Pool(workers=5), machines(8, gpus=4), 4),
    ],
)
def test_who_has_a_place_begins(
    pool: Pool, cluster: Any, places: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A cluster may grow, and Ray Data does not wait for it."""
    assert Placement.of(pool, "auto", cluster).workers == pool.workers
    (record,) = caplog.records
    assert f"are asked for, and {places} have a place" in record.getMessage()


@pytest.mark.parametrize(
    ("device", "expected"), [("auto", "auto"), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:0", "cuda")]
)
def test_a_worker_s_card_is_its_first(device: str, expected: str) -> None:
    assert device_of_workers(device) == expected


def test_no_worker_has_another_card_than_its_first() -> None:
    with pytest.raises(ConfigurationError, match=r"'cuda:1' was asked for, .* say cuda"):
        device_of_workers("cuda:1")
