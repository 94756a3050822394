"""An event loop whose clock jumps to the next timer, and threads that only take virtual time.

What runs on it is deterministic and never sleeps: a test of hours takes milliseconds.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any


class StuckError(Exception):
    """Nothing is ready and no timer is set: what is awaited would never come."""


class NeverReturns(BaseException):
    """Raised in a `VirtualThread`, its work hangs: there is no result, and the thread is lost."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time passes where nothing is ready, or in a `VirtualThread`; there are no files to watch."""

    def __init__(self) -> None:
        self._now = 0.0
        self._spent = 0.0
        super().__init__(_Jumping(self))
        # What was there before is not looked at in `unread_errors`: after other tests that would be
        # millions of objects.
        gc.freeze()

    def close(self) -> None:
        """Closes the loop, and gives the collector back what it was to leave alone."""
        gc.unfreeze()
        super().close()

    def time(self) -> float:
        """Virtual seconds; in a `VirtualThread` what its work has taken so far is added."""
        return self._now + self._spent

    def spend(self, seconds: float) -> None:
        """The work of the `VirtualThread` that calls it takes so long, while the loop goes on."""
        self._spent += seconds

    def advance(self, seconds: float) -> None:
        """Runs what happens within so many seconds."""
        self.call_at(self._now + seconds, self.stop)
        self.run_forever()
        self.settle()

    def settle(self) -> None:
        """Runs what can happen before the clock moves."""
        while self._ready or (self._scheduled and self._scheduled[0].when() <= self._now):
            self.call_soon(self.stop)
            self.run_forever()

    def unread_errors(self) -> list[BaseException | None]:
        """Of futures and tasks that are still about; those that are gone told the handler."""
        return [
            one._exception
            for one in gc.get_objects()
            if issubclass(type(one), asyncio.Future) and one._loop is self and one._log_traceback
        ]

    def jump(self) -> None:
        """Moves the clock to the next timer: to the very number, so that nothing is early."""
        self._now = max(self._now, self._scheduled[0].when())

    def work_off(self, work: Callable[[], Any], done: Callable[[Any, Any], None]) -> None:
        """Calls `done` with the work's result or its error, when the time that it takes is over."""
        result, error = None, None
        try:
            result = work()
        except NeverReturns:
            return
        except Exception as raised:
            error = raised
        finally:
            seconds, self._spent = self._spent, 0.0
        self.call_at(self._now + seconds, done, result, error)

    def _write_to_self(self) -> None:
        """Nobody sleeps that would have to be woken."""


class _Jumping(selectors.SelectSelector):
    """Instead of waiting, moves the clock."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StuckError("nothing is ready, and no timer is set")
        if timeout > 0:
            self._loop.jump()
        return []


class VirtualThread(Executor):
    """One thread: it works when it is free, in order, and calls `loop.spend` for what that takes.

    Attributes:
        seconds: that each piece of work takes beside what it spends itself.
    """

    def __init__(self, loop: VirtualTimeLoop, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._loop = loop
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._is_busy = False

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, partial(work, *args, **kwargs)))
        self._loop.call_soon(self._start_next)
        return future

    def _start_next(self) -> None:
        while self._waiting and not self._is_busy:
            future, work = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                self._is_busy = True
                self._loop.work_off(partial(self._run, work), partial(self._deliver, future))

    def _run(self, work: Callable[[], Any]) -> Any:
        self._loop.spend(self.seconds)
        return work()

    def _deliver(self, future: Future[Any], result: Any, error: Exception | None) -> None:
        self._is_busy = False
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        self._start_next()
