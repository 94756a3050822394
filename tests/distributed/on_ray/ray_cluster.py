"""A Ray of two processors on this machine, what is left of it, and what it is asked."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import ray
from ray import serve

VOCABULARY = 90
_LAST_SECONDS = 120
# Where Ray is killed they tell it so for a minute, and end.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@contextmanager
def ray_cluster(num_cpus: int = 2) -> Iterator[None]:
    """Starts one, and ends it with all of its processes."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else it warns of what is to come
    logging.getLogger("ray.data").propagate = False  # pytest would keep megabytes of it
    ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    session = session_folder()
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
    require_none_left(session)


def session_folder() -> str:
    """Of the Ray that this process is a driver of."""
    return str(Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1])


def require_none_left(folder: str, *but: str) -> None:
    """Waits until the processes of a session, or of all sessions in a folder, have ended.

    Args:
        folder: in which they write.
        but: titles of those that may stay.
    """
    # Who was about to start when all ended notices it a little later.
    deadline = time.monotonic() + _LAST_SECONDS
    while (left := _others(folder, but)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        raise AssertionError(f"these were left: {left}")


def _others(folder: str, but: tuple[str, ...]) -> list[str]:
    return [title for title in processes_of(folder).values() if not title.startswith(but)]


def processes_of(folder: str) -> dict[int, str]:
    """Processes that name a folder of Ray in their command line, or have files in it open.

    Workers and replicas have a title in the place of their command line, and write their logs.
    """
    commands = {
        process: _command(process)
        for process in Path("/proc").iterdir()
        if process.name.isdecimal() and int(process.name) != os.getpid()
    }
    return {
        int(process.name): command
        for process, command in commands.items()
        if folder in command or any(file.startswith(folder) for file in _open_files(process))
    }


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:  # it has ended
        return ""


def _open_files(process: Path) -> list[str]:
    found = []
    with suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):  # it is closed by now
                found.append(str(descriptor.readlink()))
    return found


def actor_processes(name: str) -> list[int]:
    """The processes of living actors of a class, of this Ray; it names them so."""
    running = processes_of(session_folder())
    return sorted(pid for pid, title in running.items() if title.startswith(f"ray::{name}"))


def random_pairs(number: int, seed: int = 3) -> tuple[list[list[int]], list[list[int]]]:
    """Sources and targets of the demo model."""
    generator = np.random.default_rng(seed)

    def rows() -> list[list[int]]:
        return [
            generator.integers(3, VOCABULARY, length).tolist()
            for length in generator.integers(1, 30, number)
        ]

    return rows(), rows()
