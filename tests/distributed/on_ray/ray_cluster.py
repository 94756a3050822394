"""A Ray of two processors on this machine, what is left of it, and what it is asked."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
from ray import serve

VOCABULARY = 90
_LAST_SECONDS = 60


@contextmanager
def ray_cluster(num_cpus: int = 2) -> Iterator[None]:
    """Starts one, and ends it with all of its processes."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else it warns of what is to come
    logging.getLogger("ray.data").propagate = False  # pytest would keep megabytes of it
    ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    session = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1].name
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
    # Who was about to start when all ended notices it a little later.
    deadline = time.monotonic() + _LAST_SECONDS
    while (left := processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def processes_of(session: str) -> dict[int, str]:
    """Processes whose command line names a session of Ray."""
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended
                continue
            if session in command:
                found[int(process.name)] = command
    return found


def actor_processes(name: str) -> list[int]:
    """The processes of living actors of a class; Ray names them so."""
    return [
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdecimal() and _title(process).startswith(f"ray::{name}")
    ]


def _title(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


def random_pairs(number: int, seed: int = 3) -> tuple[list[list[int]], list[list[int]]]:
    """Sources and targets of the demo model."""
    generator = np.random.default_rng(seed)

    def rows() -> list[list[int]]:
        return [
            generator.integers(3, VOCABULARY, length).tolist()
            for length in generator.integers(1, 30, number)
        ]

    return rows(), rows()
