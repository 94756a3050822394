"""How often something was begun: a process that ends in the midst of it cannot say so itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray


class Attempts:
    """Counts what was begun and is not done."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, what: str) -> int:
        """How often it was begun by now."""
        self._begun[what] += 1
        return self._begun[what]

    def done(self, what: str) -> None:
        """The next time is the first one again."""
        del self._begun[what]


@dataclass(frozen=True, slots=True)
class SharedAttempts:
    """The same in a process of its own, for workers on all machines.

    Attributes:
        actor: counts.
    """

    actor: Any

    @classmethod
    def started(cls) -> SharedAttempts:
        """It ends with the last of those who hold it."""
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        return cls(ray.remote(**options)(Attempts).remote())

    def begin(self, what: str) -> int:
        """As of `Attempts`."""
        count: int = ray.get(self.actor.begin.remote(what))
        return count

    def done(self, what: str) -> None:
        """As of `Attempts`."""
        ray.get(self.actor.done.remote(what))


def this_worker() -> str:
    """Which actor of Ray this is; it has the same name when it is started again."""
    return str(ray.get_runtime_context().get_actor_id()) if ray.is_initialized() else "here"
