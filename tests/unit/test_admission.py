"""Who may wait, who is told to come back when, and how much the device is given at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloss.batching.admission import Admission, DeviceBudget
from seqloss.errors import OverloadedError, RequestTooLargeError, UnmeetableDeadlineError
from seqloss.records import Priority

FOR_EVER = float("inf")


def measured(max_queue_tokens: int, tokens_per_second: float) -> Admission:
    admission = Admission(max_queue_tokens)
    admission.computed(int(tokens_per_second * 10), 10.0)
    return admission


priorities = st.sampled_from(["interactive", "bulk"])


@given(
    st.integers(1, 100),
    st.lists(st.tuples(priorities, st.integers(0, 150), st.booleans()), max_size=30),
)
def test_tokens_are_reserved_for_a_whole_request_or_not_at_all(
    most: int, requests: list[tuple[Priority, int, bool]]
) -> None:
    admission, held = Admission(most), []
    for priority, num_tokens, leaves in requests:
        before = sum(tokens for _, tokens in held)
        try:
            admission.reserve(priority, num_tokens, FOR_EVER)
        except RequestTooLargeError:
            assert num_tokens > most
        except OverloadedError:
            assert num_tokens <= most < before + num_tokens
        else:
            assert before + num_tokens <= most
            held.append((priority, num_tokens))
        if leaves and held:
            admission.release(*held.pop(0))
        assert admission.held == sum(tokens for _, tokens in held)


def test_a_full_queue_says_when_there_will_be_room() -> None:
    admission = measured(1000, tokens_per_second=50)
    admission.reserve("bulk", 900, FOR_EVER)
    with pytest.raises(OverloadedError) as caught:
        admission.reserve("interactive", 300, FOR_EVER)
    assert caught.value.retry_after_seconds == pytest.approx(200 / 50)


def test_nobody_is_asked_to_come_back_within_less_than_a_second() -> None:
    for admission in (Admission(10), measured(10, tokens_per_second=10**6)):
        admission.reserve("bulk", 10, FOR_EVER)
        with pytest.raises(OverloadedError) as caught:
            admission.reserve("bulk", 1, FOR_EVER)
        assert caught.value.retry_after_seconds == 1


def test_no_waiting_helps_a_request_that_an_empty_queue_does_not_hold() -> None:
    with pytest.raises(RequestTooLargeError, match="at most 10; split it"):
        Admission(10).reserve("bulk", 11, FOR_EVER)


def test_a_deadline_that_what_waits_ahead_makes_unmeetable_is_refused_at_the_door() -> None:
    admission = measured(10_000, tokens_per_second=100)
    admission.reserve("bulk", 500, FOR_EVER)
    admission.reserve("interactive", 200, FOR_EVER)
    with pytest.raises(UnmeetableDeadlineError) as caught:
        admission.reserve("bulk", 100, seconds_left=5.5)
    assert caught.value.retry_after_seconds == pytest.approx(2.5)
    assert admission.held == 700
    admission.reserve("bulk", 100, seconds_left=8.5)


def test_interactive_requests_do_not_wait_for_bulk() -> None:
    admission = measured(10_000, tokens_per_second=100)
    admission.reserve("bulk", 5000, FOR_EVER)
    admission.reserve("interactive", 200, FOR_EVER)
    assert admission.seconds_ahead("interactive") == pytest.approx(2)
    assert admission.seconds_ahead("bulk") == pytest.approx(52)
    admission.reserve("interactive", 100, seconds_left=3.5)


def test_no_deadline_is_unmeetable_before_anything_was_measured() -> None:
    admission = Admission(10_000)
    admission.reserve("bulk", 9_000, seconds_left=0.001)
    assert admission.seconds_ahead("bulk") == 0


def test_the_rate_is_that_of_the_last_seconds_of_the_device() -> None:
    admission = Admission(10)
    for _ in range(100):
        admission.computed(1000, 1.0)
    assert admission.seconds_of(1000) == pytest.approx(1)
    for _ in range(10):  # as many seconds as half of all that was measured counts
        admission.computed(100, 1.0)
    assert admission.seconds_of(550) == pytest.approx(1, rel=0.01)


def test_many_small_batches_and_one_large_batch_show_the_same_rate() -> None:
    many, one = Admission(10), Admission(10)
    for _ in range(1000):
        many.computed(3, 0.01)
    one.computed(3000, 10.0)
    assert many.seconds_of(700) == pytest.approx(one.seconds_of(700))


# ---------------------------------------------------------------- the device's budget


def test_a_batch_that_did_not_fit_leaves_seven_tenths() -> None:
    budget = DeviceBudget(1000)
    assert budget.tokens == 1000
    budget.did_not_fit()
    assert budget.tokens == 700
    budget.did_not_fit()
    assert budget.tokens == pytest.approx(490, abs=1)


def test_fifty_clean_batches_in_a_row_bring_back_a_twentieth() -> None:
    budget = DeviceBudget(1000)
    budget.did_not_fit()
    for _ in range(49):
        budget.fitted()
    assert budget.tokens == 700
    budget.fitted()
    assert budget.tokens == 735
    for _ in range(49):
        budget.fitted()
    budget.did_not_fit()
    shrunken = budget.tokens
    budget.fitted()
    assert budget.tokens == shrunken, "the forty-nine before are forgotten"


@given(st.integers(1, 10_000), st.lists(st.sampled_from([1, 10, 60, -1, -8]), max_size=60))
def test_the_budget_stays_between_one_token_and_what_was_proved(most: int, runs: list[int]) -> None:
    budget = DeviceBudget(most)
    for run in runs:
        for _ in range(abs(run)):
            if run > 0:
                budget.fitted()
            else:
                budget.did_not_fit()
            assert 1 <= budget.tokens <= most
    for _ in range(50 * 200):
        budget.fitted()
    assert budget.tokens == most, "in the end all of it is back"
