"""Worker processes: each holds one task, and works only when it is told to."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol, TypeVar

_Result = TypeVar("_Result")
# A server that drains has 30 seconds.
_STOP_SECONDS = 60
# Forked children would share Torch's threads and the memory that is measured.
_SPAWN = multiprocessing.get_context("spawn")


class Task(Protocol):
    """What a worker does; made in its own process."""

    @property
    def warm_up(self) -> Callable[..., Any]:
        """Gets ready, and chooses what there is to choose."""
        ...

    @property
    def run(self) -> Callable[..., Any]:
        """Does the work once."""
        ...

    def close(self) -> None:
        """Ends what it started."""
        ...


class WorkerError(Exception):
    """A worker could not do what it was told."""


@dataclass(frozen=True, slots=True)
class _Failure:
    summary: str
    details: str


class Worker:
    """One task in a process of its own; a context manager that ends it."""

    def __init__(self, make: Callable[[], Task]) -> None:
        self._connection, theirs = _SPAWN.Pipe()
        # No daemon: Python kills those, and a server that one started would live on.
        self._process = _SPAWN.Process(target=_work, args=(theirs, make))
        self._process.start()
        theirs.close()

    def warm_up(self, *arguments: Any) -> Any:
        """What the task's `warm_up` returns."""
        return self._ask("warm_up", arguments)

    def run(self, *arguments: Any) -> Any:
        """What the task's `run` returns."""
        return self._ask("run", arguments)

    def _ask(self, command: str, arguments: tuple[Any, ...]) -> Any:
        try:
            self._connection.send((command, arguments))
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_STOP_SECONDS)
            raise WorkerError(f"its process ended with {self._process.exitcode}") from error
        if isinstance(reply, _Failure):
            raise WorkerError(reply.summary) from WorkerError(reply.details)
        return reply

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()


def _work(connection: Connection, make: Callable[[], Task]) -> None:
    """Obeys until the other side hangs up."""
    task: Task | None = None
    try:
        with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
            while True:
                command, arguments = connection.recv()
                try:
                    task = task or make()
                    reply = getattr(task, command)(*arguments)
                except Exception as error:  # whatever it is, it is told, and others go on
                    reply = _Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
                connection.send(reply)
    finally:
        if task is not None:
            task.close()


def in_own_process(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Calls a function in a process that then ends, and gives all its memory back."""
    with ProcessPoolExecutor(1, mp_context=_SPAWN) as pool:
        return pool.submit(work, *arguments).result()
