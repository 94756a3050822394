"""When the client tries again, and how long it waits, on a clock that nobody waits for."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from conversations import GOOD, FakeTime, converse, json_reply, problem
from seqloss_client import Chunk, LossClient, ScoringOptions, errors
from seqloss_client._pace import Pace
from seqloss_client._protocol import HowToScore, Protocol
from seqloss_client._steps import Lost, Reply

CHUNK = Chunk([[1]], [[2]])
BUSY = problem(429, "overloaded")
REFUSED = Lost("connection refused")
LATE = Lost("timed out", is_timeout=True)


def attempt(
    outcomes: list[Any],
    time: FakeTime,
    *,
    retries: int = 5,
    retry_for: float = 0.0,
    pace: Pace | None = None,
    **options: Any,
) -> Any:
    speaker = Protocol(
        "http://host",
        model="fake",
        headers={},
        retries=retries,
        reply_seconds=60,
        timing=time.timing,
    )
    how = HowToScore(ScoringOptions(**options), retry_for=retry_for)
    return converse(speaker.score(CHUNK, how, pace), outcomes, time)


@pytest.mark.parametrize(
    "failure",
    [
        BUSY,
        problem(503, "not_ready"),
        Reply(502, {}, b"<html>Bad Gateway</html>"),
        Reply(504, {}, b"<html>Gateway Timeout</html>"),
        REFUSED,
        LATE,
    ],
)
def test_what_may_pass_is_tried_again(failure: Any) -> None:
    talk = attempt([failure, failure, GOOD], FakeTime())
    assert talk.result.losses.tolist() == [1.0]
    assert len(talk.attempts) == 3


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (problem(400, "malformed_body"), errors.BadRequest),
        (problem(401, "unauthorized"), errors.Unauthorized),
        (problem(403, "forbidden"), errors.Forbidden),
        (problem(404, "unknown_model"), errors.NotFound),
        (problem(408, "body_timeout"), errors.ProblemError),
        (problem(413, "request_too_large"), errors.TooLarge),
        (problem(415, "unsupported_media_type"), errors.UnsupportedMedia),
        (problem(422, "invalid_request"), errors.InvalidRequest),
        (problem(500, "non_finite"), errors.ServiceError),
        (problem(504, "deadline_exceeded"), errors.DeadlineExceeded),
        (Reply(307, {"location": "https://host/loss"}, b""), errors.ProblemError),
        (Lost("there is no such protocol", is_final=True), errors.ConnectionFailed),
    ],
)
def test_what_will_be_the_same_is_not_tried_again(
    failure: Any, error: type[errors.SeqlossError]
) -> None:
    talk = attempt([failure, GOOD], FakeTime())
    assert type(talk.error) is error
    assert len(talk.attempts) == 1


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (BUSY, errors.Overloaded),
        (problem(503, "not_ready"), errors.Unavailable),
        (Reply(502, {}, b"<html>"), errors.Unavailable),
        # Ray Serve's proxy, when the process behind it has died.
        (Reply(500, {}, b"Internal Server Error"), errors.ServiceError),
        (REFUSED, errors.ConnectionFailed),
        (LATE, errors.RequestTimeout),
    ],
)
@pytest.mark.parametrize("retries", [0, 3])
def test_retries_are_bounded(failure: Any, error: type[Exception], retries: int) -> None:
    talk = attempt([failure] * 10, FakeTime(), retries=retries)
    assert type(talk.error) is error
    assert len(talk.attempts) == retries + 1


def test_pauses_double_up_to_a_bound() -> None:
    time = FakeTime(luck=1.0)
    attempt([BUSY] * 9 + [GOOD], time, retries=9)
    assert time.pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 8, 8, 8])


def test_chance_may_take_all_of_a_pause() -> None:
    time = FakeTime(luck=0.0)
    attempt([BUSY] * 3 + [GOOD], time)
    assert time.pauses == [0, 0, 0]


@pytest.mark.parametrize(
    ("busy", "seconds"),
    [
        (problem(429, "overloaded", retry_after_ms=1500), 1.5),
        (Reply(503, {"retry-after": "7"}, b""), 7),
        # 1000 seconds after 1970 by the clock of the test.
        (Reply(503, {"retry-after": "Thu, 01 Jan 1970 00:17:00 GMT"}, b""), 20),
        (Reply(503, {"retry-after": "Thu, 01 Jan 1970 00:00:01 GMT"}, b""), 0),
        (Reply(503, {"retry-after": "soon"}, b""), 0),
    ],
)
def test_the_service_says_how_long_to_wait(busy: Reply, seconds: float) -> None:
    least, most = FakeTime(luck=0.0), FakeTime(luck=1.0)
    attempt([busy, GOOD], least)
    attempt([busy, GOOD], most)
    assert least.pauses == [seconds]
    assert most.pauses == [pytest.approx(seconds + 0.2)]


def test_the_body_is_finer_than_the_header() -> None:
    busy = json_reply(
        429, {"detail": "full", "code": "overloaded", "retry_after_ms": 20}, retry_after="1"
    )
    time = FakeTime(luck=0.0)
    attempt([busy, GOOD], time)
    assert time.pauses == [0.02]


def test_nobody_sits_for_an_hour_because_a_reply_says_so() -> None:
    away = Reply(503, {"retry-after": "3600"}, b"")
    talk = attempt([away, GOOD], FakeTime())
    assert isinstance(talk.error, errors.Unavailable)
    assert talk.error.retry_after == 3600


def test_every_attempt_says_what_is_left_of_the_deadline() -> None:
    time = FakeTime(luck=1.0, seconds_per_attempt=2.0)
    talk = attempt([BUSY, BUSY, GOOD], time, timeout=10.0)
    left = [json.loads(one.request.body)["timeout_ms"] for one in talk.attempts]
    assert left == pytest.approx([10_000, 10_000 - 2200, 10_000 - 4600])
    # The service's own word on the deadline is waited for a little.
    assert [one.reply_seconds for one in talk.attempts] == pytest.approx([11, 8.8, 6.4])


def test_without_a_deadline_the_clients_timeout_holds_for_each_reply() -> None:
    talk = attempt([BUSY, GOOD], FakeTime())
    assert [one.reply_seconds for one in talk.attempts] == [60, 60]


def test_no_retry_comes_after_the_deadline() -> None:
    time = FakeTime()
    busy = problem(429, "overloaded", retry_after_ms=9000)
    talk = attempt([busy, GOOD], time, timeout=9.0)
    assert isinstance(talk.error, errors.Overloaded)
    assert (len(talk.attempts), time.pauses) == (1, [])


def test_a_reply_that_takes_the_whole_deadline_is_a_timeout() -> None:
    time = FakeTime(seconds_per_attempt=11.0)
    talk = attempt([LATE, GOOD], time, timeout=10.0)
    assert isinstance(talk.error, errors.RequestTimeout)
    assert len(talk.attempts) == 1


def test_patience_outlasts_the_number_of_retries() -> None:
    time = FakeTime()
    talk = attempt([REFUSED] * 11 + [GOOD], time, retries=1, retry_for=60.0)
    assert talk.error is None
    # 12.6 seconds in six pauses, then 8 each
    assert time.now - 1000 == pytest.approx(12.6 + 5 * 8)


def test_patience_ends() -> None:
    time = FakeTime()
    talk = attempt([REFUSED] * 99, time, retries=1, retry_for=60.0)
    assert isinstance(talk.error, errors.ConnectionFailed)
    assert 60 - 8 <= time.now - 1000 < 60


def test_patience_begins_with_the_first_failure() -> None:
    # A reply that took longer than the patience is tried again no less than a quick one.
    time = FakeTime(seconds_per_attempt=50.0)
    talk = attempt([BUSY, BUSY, GOOD], time, retries=0, retry_for=60.0)
    assert talk.error is None


def test_refusals_slow_a_run_down_and_successes_speed_it_up() -> None:
    pace = Pace(16)
    for _ in range(6):
        attempt([GOOD], FakeTime(), pace=pace)
    assert pace.limit == 4  # after rounds of two, and of three
    attempt([BUSY, problem(503, "not_ready"), REFUSED, GOOD], FakeTime(), pace=pace)
    assert pace.limit == 2  # the success makes a round of one


def test_a_run_waits_longer_for_replies_than_a_call() -> None:
    talk = attempt([GOOD], FakeTime(), pace=Pace(4))
    assert talk.attempts[0].reply_seconds == 600


# ---------------------------------------------------------------- what errors say


def test_a_problem_has_all_that_the_service_said() -> None:
    fault = {"index": 2, "loc": ["target_ids", 2, 0], "code": "token_out_of_range", "detail": "no"}
    refused = problem(422, "invalid_request", errors=[fault], request_id="r-7")
    error = attempt([refused], FakeTime()).error
    assert error.status == 422
    assert error.code == "invalid_request"
    assert error.detail == "what invalid_request means"
    assert error.errors == (errors.Fault("token_out_of_range", "no", 2, ("target_ids", 2, 0)),)
    assert error.request_id == "r-7"
    assert str(error) == "422 invalid_request: what invalid_request means [request r-7]\n  - no"


def test_what_a_proxy_says_is_shown() -> None:
    error = attempt([Reply(502, {}, b"<html>Bad Gateway</html>")], FakeTime(), retries=0).error
    assert str(error) == "502: something other than the service answered: <html>Bad Gateway</html>"


def _sent(error: Exception) -> Exception:
    copied: Exception = pickle.loads(pickle.dumps(error))  # noqa: S301 - it is our own
    return copied


@pytest.mark.parametrize("again", [copy.copy, _sent])
def test_errors_survive_the_way_to_another_process(again: Any) -> None:
    error = attempt([problem(429, "overloaded", retry_after_ms=5)], FakeTime(), retries=0).error
    assert str(again(error)) == str(error)
    assert again(error).retry_after == 0.005


def test_the_cause_of_a_lost_connection_is_kept() -> None:
    cause = OSError("refused")
    error = attempt([Lost("refused", cause=cause)], FakeTime(), retries=0).error
    assert error.__cause__ is cause


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = errors.__doc__ or ""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, Exception):
            assert f"{kind.__name__} " in drawn.replace("\n", " ")
    for status, kind in errors.PROBLEM_OF_STATUS.items():
        (line,) = (line for line in drawn.splitlines() if f" {kind.__name__} " in line)
        assert str(status) in line


@pytest.mark.parametrize("arguments", [{"retries": -1}, {"timeout": 0}, {"timeout": float("nan")}])
def test_clients_are_not_made_with_nonsense(arguments: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        LossClient(**arguments)
