"""How many requests of a bulk run are under way, and in which order they are given out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from seqloss_client._chunks import Grouping, chunks_of
from seqloss_client._pace import Next, Pace, Window


@dataclass(eq=False)
class FakeTask:
    is_done: bool = False

    def done(self) -> bool:
        return self.is_done


def limits(pace: Pace, successes: int) -> list[int]:
    found = []
    for _ in range(successes):
        pace.succeeded()
        found.append(pace.limit)
    return found


def test_a_round_without_refusals_makes_room_for_one_more() -> None:
    assert limits(Pace(16), 9) == [2, 3, 3, 3, 4, 4, 4, 4, 5]


def test_there_are_never_more_than_were_allowed() -> None:
    assert limits(Pace(3), 20)[-1] == 3
    assert limits(Pace(1), 20) == [1] * 20


def test_a_refusal_halves() -> None:
    pace = Pace(16)
    limits(pace, 2 + 3 + 4 + 5 + 6 + 7 + 8)
    assert pace.limit == 9
    pace.refused(pace.round)
    assert pace.limit == 4


def test_refusals_of_one_round_halve_once() -> None:
    pace = Pace(16)
    limits(pace, 2 + 3 + 4 + 5 + 6 + 7)
    sent = pace.round
    for _ in range(8):
        pace.refused(sent)
    assert pace.limit == 4
    pace.refused(pace.round)
    assert pace.limit == 2


def test_one_request_is_always_allowed() -> None:
    pace = Pace(16)
    for _ in range(10):
        pace.refused(pace.round)
    assert pace.limit == 1


def test_successes_before_a_refusal_do_not_count_after_it() -> None:
    pace = Pace(16)
    limits(pace, 2 + 2)
    pace.refused(pace.round)
    assert limits(pace, 2) == [2, 2]


def test_a_pace_without_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="max_requests is 0"):
        Pace(0)


def test_chunks_are_read_while_there_is_room() -> None:
    window: Window[FakeTask] = Window(Pace(16))
    for _ in range(2):
        assert window.next_step() is Next.READ
        window.add(FakeTask())
    assert window.next_step() is Next.WAIT


def test_results_come_in_order() -> None:
    pace = Pace(16)
    window: Window[FakeTask] = Window(pace)
    first, second = FakeTask(), FakeTask()
    window.add(first)
    window.add(second)
    second.is_done = True
    assert window.next_step() is Next.READ  # nothing to give out, and room
    window.end()
    assert window.next_step() is Next.WAIT
    first.is_done = True
    assert window.next_step() is Next.YIELD
    assert window.pop() is first
    assert window.pop() is second
    assert window.next_step() is Next.END


def test_a_chunk_is_read_before_each_result_and_no_more() -> None:
    window: Window[FakeTask] = Window(Pace(16))
    window.add(FakeTask(is_done=True))
    assert window.next_step() is Next.YIELD  # one was just read
    window.add(FakeTask(is_done=True))
    window.pop()
    assert window.next_step() is Next.READ
    window.add(FakeTask())
    assert window.next_step() is Next.YIELD


def test_a_slow_first_request_does_not_let_the_rest_of_the_input_in() -> None:
    pace = Pace(4)
    window: Window[FakeTask] = Window(pace)
    window.add(FakeTask())
    for _ in range(3):
        assert window.next_step() is Next.READ
        window.add(FakeTask(is_done=True))
    assert window.next_step() is Next.WAIT
    assert len(window.running()) == 1


def test_an_error_of_the_input_waits_for_its_turn() -> None:
    window: Window[FakeTask] = Window(Pace(4))
    task = FakeTask()
    window.add(task)
    window.end(RuntimeError("the disk is gone"))
    assert window.next_step() is Next.WAIT
    task.is_done = True
    assert window.next_step() is Next.YIELD
    window.pop()
    assert window.next_step() is Next.END
    with pytest.raises(RuntimeError, match="the disk is gone"):
        window.raise_input_error()


def test_pairs_become_chunks_and_the_last_one_is_shorter() -> None:
    chunks = list(chunks_of((([number], [number + 1]) for number in range(5)), Grouping(2)))
    assert [chunk.sources for chunk in chunks] == [[[0], [1]], [[2], [3]], [[4]]]
    assert [chunk.targets for chunk in chunks] == [[[1], [2]], [[3], [4]], [[5]]]


def test_no_pairs_are_no_chunks() -> None:
    assert list(chunks_of([], Grouping(2))) == []


def test_pairs_before_an_error_are_not_lost() -> None:
    def pairs():  # type: ignore[no-untyped-def]
        yield "a", "b"
        raise OSError("the disk is gone")

    chunks = chunks_of(pairs(), Grouping(100))
    assert next(chunks).sources == ["a"]
    with pytest.raises(OSError, match="the disk is gone"):
        next(chunks)


@pytest.mark.parametrize("pair", ["ab", ("a",), ("a", "b", "c")])
def test_what_is_no_pair_is_refused(pair: object) -> None:
    with pytest.raises(TypeError, match="no pair"):
        Grouping(2).add(pair)  # type: ignore[arg-type]


def test_chunks_have_pairs() -> None:
    with pytest.raises(ValueError, match="pairs_per_request is 0"):
        Grouping(0)
