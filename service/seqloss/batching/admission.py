"""How much may wait, how long that takes, and how much the device holds at a time. Pure."""

from __future__ import annotations

from seqloss.errors import OverloadedError, RequestTooLargeError, UnmeetableDeadlineError
from seqloss.records import PRIORITIES, Priority

# Seconds of the device after which a measurement counts half.
_HALF_LIFE_SECONDS = 10.0

# When a batch does not fit the device, and how the budget comes back.
_SHRINK = 0.7
_GROW = 1.05
_CLEAN_BATCHES = 50


class Admission:
    """The queue's budget of tokens: reserved for a whole request at once, or not at all."""

    def __init__(self, max_queue_tokens: int) -> None:
        self._max = max_queue_tokens
        self._held: dict[Priority, int] = dict.fromkeys(PRIORITIES, 0)
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def held(self) -> int:
        """Tokens of admitted pairs that are not scored yet."""
        return sum(self._held.values())

    def reserve(self, priority: Priority, num_tokens: int, seconds_left: float) -> None:
        """Takes the tokens of a request into the budget.

        Raises:
            RequestTooLargeError: it would not fit an empty queue.
            OverloadedError: it does not fit now.
            UnmeetableDeadlineError: it fits, and would not be done in the seconds it has.
        """
        if num_tokens > self._max:
            raise RequestTooLargeError(
                f"the request has {num_tokens} tokens, and the queue holds at most {self._max}; "
                "split it"
            )
        if self.held + num_tokens > self._max:
            raise OverloadedError(
                f"{self.held} tokens wait, {num_tokens} more are over the limit of {self._max}; "
                "try again later",
                retry_after_seconds=max(1.0, self.seconds_of(self.held + num_tokens - self._max)),
            )
        seconds = self.seconds_ahead(priority) + self.seconds_of(num_tokens)
        if seconds > seconds_left:
            raise UnmeetableDeadlineError(
                f"this would be done in about {seconds:.1f} s, and has {seconds_left:.1f} s; allow "
                "more time, send less, or try again later",
                retry_after_seconds=max(1.0, seconds - seconds_left),
            )
        self._held[priority] += num_tokens

    def release(self, priority: Priority, num_tokens: int) -> None:
        """Gives tokens back: of pairs that were scored, or for which nobody waits any more."""
        self._held[priority] -= num_tokens

    def computed(self, num_tokens: int, seconds: float) -> None:
        """The device took so long for so many tokens without padding."""
        keep = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._tokens = self._tokens * keep + num_tokens
        self._seconds = self._seconds * keep + seconds

    def seconds_of(self, num_tokens: int) -> float:
        """What so many tokens take at the measured rate; 0 while there is none."""
        return num_tokens * self._seconds / self._tokens if self._tokens else 0.0

    def seconds_ahead(self, priority: Priority) -> float:
        """What waits before a request of this class that comes now: bulk waits for both."""
        return self.seconds_of(
            self._held["interactive"] if priority == "interactive" else self.held
        )


class DeviceBudget:
    """Tokens that a batch may have: fewer after one did not fit, and slowly more again."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._max = self._tokens = float(max_batch_tokens)
        self._clean = 0

    @property
    def tokens(self) -> int:
        """Padded, both sides together."""
        return max(1, int(self._tokens))

    def did_not_fit(self) -> None:
        """A batch that was formed within the budget ran out of memory."""
        self._tokens = max(1.0, self._tokens * _SHRINK)
        self._clean = 0

    def fitted(self) -> None:
        """A batch was computed."""
        self._clean += 1
        if self._clean >= _CLEAN_BATCHES:
            self._tokens = min(self._max, self._tokens * _GROW)
            self._clean = 0
