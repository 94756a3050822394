"""How many requests of a bulk run are under way, and in which order their results are given out."""

from __future__ import annotations

import enum
import threading
from collections import deque
from typing import Generic, Protocol, TypeVar

_FIRST_REQUESTS = 2


class Pace:
    """How many requests may be under way: one more after a round without refusal, half after one.

    A round is as many successes as requests may be under way. Refusals of requests that were sent
    before the last halving say nothing new, and do not halve again.

    Args:
        most: never more than so many.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"max_requests is {most} and must be at least 1")
        self.most = most
        self.limit = min(_FIRST_REQUESTS, most)
        self.round = 0
        """Counts halvings; a request notes it when it is sent."""
        self._successes = 0
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        """A request was answered."""
        with self._lock:
            self._successes += 1
            if self._successes >= self.limit:
                self._successes = 0
                self.limit = min(self.limit + 1, self.most)

    def refused(self, round_: int) -> None:
        """A request that was sent in this round was refused."""
        with self._lock:
            if round_ == self.round:
                self.round += 1
                self._successes = 0
                self.limit = max(1, self.limit // 2)


class Task(Protocol):
    """What runs: futures of threads, and tasks of asyncio."""

    def done(self) -> bool:
        """Whether there is a result, or an error."""


_TaskT = TypeVar("_TaskT", bound=Task)


class Next(enum.Enum):
    """What a bulk run does next."""

    YIELD = "give out the oldest result"
    READ = "read a chunk and start a request for it"
    WAIT = "wait for any request to end"
    END = "all is done"


class Window(Generic[_TaskT]):
    """The requests of a bulk run whose results were not given out, in the order of the input.

    Before each result one chunk is read, so that the service has work while the result is used; no
    more than one, so that a slow input does not hold up results that are there.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._tasks: deque[_TaskT] = deque()
        self._input_ended = False
        self._input_error: Exception | None = None
        self._has_read = False

    def next_step(self) -> Next:
        """What to do now."""
        is_first_done = bool(self._tasks) and self._tasks[0].done()
        if self._may_read() and not (is_first_done and self._has_read):
            return Next.READ
        if is_first_done:
            return Next.YIELD
        return Next.WAIT if self._tasks else Next.END

    def add(self, task: _TaskT) -> None:
        """A request was started for the chunk that was read."""
        self._tasks.append(task)
        self._has_read = True

    def end(self, error: Exception | None = None) -> None:
        """The input has no more, or broke: what was read before it is given out first."""
        self._input_ended, self._input_error = True, error

    def pop(self) -> _TaskT:
        """The oldest."""
        self._has_read = False
        return self._tasks.popleft()

    def running(self) -> list[_TaskT]:
        """Those without a result."""
        return [task for task in self._tasks if not task.done()]

    def _may_read(self) -> bool:
        has_room = len(self._tasks) < self._pace.most and len(self.running()) < self._pace.limit
        return has_room and not self._input_ended

    def rest(self) -> list[_TaskT]:
        """All whose results were not given out."""
        return list(self._tasks)

    def raise_input_error(self) -> None:
        """Raises what the input broke with."""
        if self._input_error is not None:
            raise self._input_error
