"""Whose turn it is: classes, tenants and deadlines, one batch after the other."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass
from itertools import count
from unittest.mock import Mock

from hypothesis import given, settings
from hypothesis import strategies as st
from test_collate import request_of
from test_packing import KnownCost

from seqloss.batching.cost import CostModel
from seqloss.batching.jobs import Job
from seqloss.batching.queues import MAX_BYPASS, BatchingLimits, Formed, Queue
from seqloss.batching.shapes import PaddedShape
from seqloss.records import Priority

LIMITS = BatchingLimits(max_batch_tokens=40, max_batch_pairs=16, max_queue_tokens=10**9)
_numbers = count(1)
_ids = count(10)


def job_of(
    lengths: list[tuple[int, int]],
    priority: Priority = "bulk",
    *,
    tenant: str = "",
    arrived: float = 0.0,
    deadline: float = float("inf"),
    all_terms: bool = False,
    reproducible: bool = False,
) -> Job:
    """Pairs of these source and target lengths; no two sources of the process are equal."""
    request = request_of(
        [[next(_ids)] * source for source, _ in lengths],
        list(range(len(lengths))),
        [[5] * target for _, target in lengths],
        [[True] * target for _, target in lengths],
        start_ids=[9] * len(lengths),
    )
    return Job(
        request.pairs,
        priority,
        all_terms,
        arrived,
        Mock(),
        next(_numbers),
        tenant,
        deadline,
        reproducible,
    )


def even(num_pairs: int, length: int = 5, priority: Priority = "bulk", **options: object) -> Job:
    return job_of([(length, length)] * num_pairs, priority, **options)


def queue_of(*jobs: Job, limits: BatchingLimits = LIMITS, cost: CostModel | None = None) -> Queue:
    queue = Queue(limits, cost or CostModel())
    for job in jobs:
        queue.add(job)
    return queue


def measured() -> CostModel:
    """One that believes to know the device; riders need that."""
    cost = CostModel()
    cost.observe(PaddedShape(1, 5, 1, 5), 0.01)
    return cost


def take(queue: Queue, priority: Priority = "bulk", now: float = 0.0) -> Formed:
    formed = queue.take(priority, now, LIMITS.max_batch_tokens)
    assert formed is not None
    return formed


def jobs_in(formed: Formed) -> list[Job]:
    return [job for job, _ in formed.selection]


def tokens_by_tenant(formed: Formed) -> Counter[str]:
    tokens: Counter[str] = Counter()
    for job, rows in formed.selection:
        tokens[job.tenant] += int(job.source_lengths[rows].sum() + job.target_lengths[rows].sum())
    return tokens


# ---------------------------------------------------------------- everybody, once

lengths_of_pairs = st.tuples(st.integers(1, 8), st.integers(1, 8))


@dataclass(frozen=True)
class Coming:
    """A request that is yet to come."""

    lengths: list[tuple[int, int]]
    priority: Priority
    tenant: str
    all_terms: bool
    seconds_left: float
    reproducible: bool

    def job(self, now: float) -> Job:
        return job_of(
            self.lengths,
            self.priority,
            tenant=self.tenant,
            arrived=now,
            deadline=now + self.seconds_left,
            all_terms=self.all_terms,
            reproducible=self.reproducible,
        )


coming = st.builds(
    Coming,
    st.lists(lengths_of_pairs, min_size=1, max_size=12),
    st.sampled_from(["interactive", "bulk"]),
    st.sampled_from("abc"),
    st.booleans(),
    st.sampled_from([float("inf"), 5.0, 30.0]),
    st.sampled_from([False, False, True]),
)
limits_of_queue = st.builds(
    BatchingLimits,
    # With one token a window holds four batches of a pair: requests are much larger than it.
    max_batch_tokens=st.sampled_from([1, 10, 60]),
    max_batch_pairs=st.sampled_from([1, 4, 100]),
    max_queue_tokens=st.just(10**9),
    max_block_seconds=st.sampled_from([0.001, float("inf")]),
)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(coming, st.integers(0, 3)), min_size=1, max_size=10),
    limits_of_queue,
    st.booleans(),
)
def test_every_pair_is_taken_once_and_batches_keep_to_the_caps(
    requests: list[tuple[Coming, int]], limits: BatchingLimits, is_measured: bool
) -> None:
    queue = queue_of(limits=limits, cost=measured() if is_measured else None)
    jobs: list[Job] = []
    taken: Counter[tuple[int, int]] = Counter()

    def take_one(now: float) -> bool:
        priority = queue.turn()
        if priority is None:
            return False
        formed = queue.take(priority, now, limits.max_batch_tokens)
        assert formed is not None
        assert formed.priority == priority
        assert formed.selection[0][0].priority == priority
        queue.started(priority)
        pairs = [(job, int(row)) for job, rows in formed.selection for row in rows]
        taken.update((job.number, row) for job, row in pairs)
        shape = formed.shape
        assert shape.num_targets == len(pairs) <= limits.max_batch_pairs
        assert len(pairs) == 1 or shape.tokens <= limits.max_batch_tokens
        assert shape.source_length == max(job.source_lengths[row] for job, row in pairs)
        assert shape.target_length == max(job.target_lengths[row] for job, row in pairs)
        assert len({job.all_terms for job, _ in pairs}) == 1, "ranks are for those who want them"
        company = {job for job, _ in pairs}
        assert len(company) == 1 or not any(job.reproducible for job in company)
        return True

    for now, (request, num_batches) in enumerate(requests):
        jobs.append(request.job(float(now)))
        queue.add(jobs[-1])
        for _ in range(num_batches):
            take_one(float(now))
    assert queue.num_waiting == sum(job.num_waiting for job in jobs)
    while take_one(100.0):
        pass
    assert taken == Counter((job.number, row) for job in jobs for row in range(len(job.pairs)))
    assert queue.num_waiting == 0
    assert queue.jobs == jobs, "they stay until they are removed"


@given(
    st.lists(lengths_of_pairs, min_size=1, max_size=30),
    st.lists(coming, max_size=5),
    st.booleans(),
    st.integers(1, 100),
)
def test_a_reproducible_request_has_the_same_batches_whatever_else_there_is(
    lengths: list[tuple[int, int]], others: list[Coming], is_measured: bool, fitting: int
) -> None:
    """Whatever waits beside it, was measured, and does not fit the device any more."""

    def batches(queue: Queue, max_batch_tokens: int) -> list[list[int]]:
        mine = job_of(lengths, reproducible=True)
        queue.add(mine)
        found = []
        while mine.num_waiting:
            turn = queue.turn()
            assert turn is not None
            formed = queue.take(turn, 0.0, max_batch_tokens)
            assert formed is not None
            queue.started(turn)
            if jobs_in(formed) == [mine]:
                found.append(formed.selection[0][1].tolist())
        return found

    busy = queue_of(*(one.job(0.0) for one in others), cost=measured() if is_measured else None)
    assert batches(busy, fitting) == batches(queue_of(), LIMITS.max_batch_tokens)


def test_a_request_larger_than_the_window_is_taken_to_the_end() -> None:
    window_tokens = 64 * LIMITS.max_batch_tokens
    large = even(3 * window_tokens // 10)
    queue = queue_of(large)
    num_batches = 0
    while queue.take("bulk", 0.0, LIMITS.max_batch_tokens):
        num_batches += 1
    assert num_batches == 3 * window_tokens / LIMITS.max_batch_tokens


def test_nothing_is_taken_of_a_class_in_which_nothing_waits() -> None:
    queue = queue_of(even(2))
    assert queue.take("interactive", 0.0, 40) is None
    assert queue_of().turn() is None


def test_who_leaves_is_in_no_batch_and_does_not_count() -> None:
    leaves, stays = even(3), even(3)
    queue = queue_of(leaves, stays, limits=BatchingLimits(10, 1, 10**9))
    assert jobs_in(take(queue)) == [leaves]
    queue.remove(leaves)
    queue.remove(leaves)
    assert (queue.num_waiting, queue.jobs) == (3, [stays])
    assert [jobs_in(take(queue)) for _ in range(3)] == [[stays]] * 3
    assert queue.turn() is None


def test_the_oldest_is_the_first_that_is_here_still() -> None:
    first, second = even(1, arrived=3.0), even(1, arrived=4.0)
    queue = queue_of(first, second)
    assert queue.oldest_arrival == 3.0
    queue.remove(first)
    assert queue.oldest_arrival == 4.0
    queue.remove(second)
    assert queue.oldest_arrival is None


# ---------------------------------------------------------------- classes


def test_interactive_goes_first_and_bulk_is_passed_over_four_times_at_most() -> None:
    alone = BatchingLimits(10, 1, 10**9)
    queue = queue_of(even(9), even(20, priority="interactive"), limits=alone)
    turns = []
    for _ in range(12):
        turn = queue.turn()
        assert turn is not None
        queue.take(turn, 0.0, 10)
        queue.started(turn)
        turns.append(turn)
    assert turns == ["interactive"] * 4 + ["bulk"] + ["interactive"] * 4 + ["bulk"] + [
        *("interactive", "interactive")
    ]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_bulk_is_passed_over_four_times_at_most_however_requests_come(
    steps: list[tuple[bool, bool]],
) -> None:
    queue = queue_of(limits=BatchingLimits(10, 1, 10**9))
    bypassed = 0
    for interactive_comes, bulk_comes in steps:
        if interactive_comes:
            queue.add(even(3, priority="interactive"))
        if bulk_comes:
            queue.add(even(1))
        turn = queue.turn()
        if turn is not None:
            assert queue.take(turn, 0.0, 10)
            queue.started(turn)
            waits = any(job.num_waiting for job in queue.jobs if job.priority == "bulk")
            bypassed = bypassed + 1 if turn == "interactive" and waits else 0
            assert bypassed <= MAX_BYPASS


def test_a_bulk_batch_that_is_formed_waits_as_bulk_pairs_do() -> None:
    queue = queue_of(even(9, priority="interactive"), limits=BatchingLimits(10, 1, 10**9))
    for _ in range(MAX_BYPASS):
        assert queue.turn({"bulk"}) == "interactive"
        queue.started("interactive", {"bulk"})
    assert queue.turn({"bulk"}) == "bulk"
    assert queue.turn() == "interactive", "there is nothing else of bulk"


def test_what_is_formed_of_interactive_pairs_waits_as_they_do() -> None:
    queue = queue_of(even(1))
    assert queue.turn({"interactive"}) == "interactive"
    for _ in range(MAX_BYPASS):
        queue.started("interactive", {"interactive"})
    assert queue.turn({"interactive"}) == "bulk"


def test_bulk_pairs_ride_where_an_interactive_batch_has_room() -> None:
    anchor = even(1, priority="interactive")
    fitting, longer = even(1), job_of([(5, 6)])
    queue = queue_of(anchor, fitting, longer, cost=KnownMeasured())
    formed = take(queue, "interactive")
    assert jobs_in(formed) == [anchor, fitting]
    assert formed.shape == PaddedShape(2, 5, 2, 5)
    assert queue.num_waiting == longer.num_waiting == 1


def test_interactive_pairs_ride_in_bulk_batches_too() -> None:
    anchor, fitting = even(1), even(1, priority="interactive")
    queue = queue_of(anchor, fitting, cost=KnownMeasured())
    assert jobs_in(take(queue, "bulk")) == [anchor, fitting]


def test_nobody_rides_before_it_is_known_what_that_costs() -> None:
    queue = queue_of(even(1, priority="interactive"), even(1))
    assert len(jobs_in(take(queue, "interactive"))) == 1


def test_who_wants_ranks_does_not_ride_with_those_who_do_not() -> None:
    queue = queue_of(even(1, priority="interactive"), even(1, all_terms=True), cost=KnownMeasured())
    assert len(jobs_in(take(queue, "interactive"))) == 1


def test_bulk_batches_are_short_while_interactive_requests_are_expected() -> None:
    cost = KnownMeasured(0.005, 0.0005, 0.0005, 0.0)
    limits = BatchingLimits(1000, 1000, 10**9, max_block_seconds=0.05)
    queue = queue_of(
        even(1, priority="interactive", arrived=100.0), even(200), limits=limits, cost=cost
    )
    assert queue.take("interactive", 100.0, 1000)
    hurried, calm = queue.take("bulk", 104.9, 1000), queue.take("bulk", 105.1, 1000)
    assert hurried is not None
    assert calm is not None
    assert (hurried.shape.num_targets, calm.shape.num_targets) == (9, 100)


class KnownMeasured(KnownCost):
    """One that says that it was measured. A batch costs so much that riders hardly add to it."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(*(numbers or (0.01, 1e-5, 2e-5, 0.0)))
        self.is_measured = True


# ---------------------------------------------------------------- tenants


@given(
    st.lists(lengths_of_pairs, min_size=10, max_size=40),
    st.lists(lengths_of_pairs, min_size=10, max_size=40),
    st.sampled_from([1, 20]),
)
def test_two_tenants_take_turns_by_what_they_had(
    first: list[tuple[int, int]], second: list[tuple[int, int]], batch_tokens: int
) -> None:
    jobs = job_of(first, tenant="a"), job_of(second, tenant="b")
    queue = queue_of(*jobs, limits=BatchingLimits(batch_tokens, 1, 10**9))
    served: Counter[str] = Counter()
    longest_pair = max(map(sum, first + second))
    while all(job.num_waiting for job in jobs):
        formed = queue.take("bulk", 0.0, batch_tokens)
        assert formed is not None
        served += tokens_by_tenant(formed)
        assert abs(served["a"] - served["b"]) <= longest_pair


def test_a_tenant_of_few_odd_pairs_is_not_outpaced_by_the_one_that_fills_its_batches() -> None:
    """Each batch of the one is filled up with pairs of the other."""
    odd = job_of([(5, length) for length in range(1, 21)] * 2, tenant="odd")
    many = job_of([(5, length) for length in range(1, 21)] * 20, tenant="many")
    limits = BatchingLimits(200, 100, 10**9)
    queue = queue_of(odd, many, limits=limits)
    served: Counter[str] = Counter()
    while odd.num_waiting and many.num_waiting:
        formed = queue.take("bulk", 0.0, 200)
        assert formed is not None
        served += tokens_by_tenant(formed)
        assert abs(served["odd"] - served["many"]) <= 2 * 200


def test_a_tenant_that_comes_later_gets_no_claim_on_the_past() -> None:
    limits = BatchingLimits(10, 1, 10**9)
    early = even(100, tenant="early")
    queue = queue_of(early, limits=limits)
    for _ in range(50):
        take(queue)
    queue.add(even(100, tenant="late"))
    tenants = [jobs_in(take(queue))[0].tenant for _ in range(20)]
    assert abs(Counter(tenants)["early"] - 10) <= 1, "by turns from now on"


def test_a_tenant_that_was_away_gets_no_claim_on_that_time() -> None:
    limits = BatchingLimits(10, 1, 10**9)
    queue = queue_of(even(2, tenant="a"), even(100, tenant="b"), limits=limits)
    for _ in range(60):
        take(queue)
    queue.add(even(40, tenant="a"))
    tenants = Counter(jobs_in(take(queue))[0].tenant for _ in range(20))
    assert abs(tenants["a"] - 10) <= 1


def test_going_away_for_a_moment_does_not_wipe_out_what_one_had() -> None:
    limits = BatchingLimits(100, 1, 10**9)
    queue = queue_of(job_of([(45, 45)], tenant="a"), limits=limits)
    queue.add(even(40, tenant="b"))
    take(queue)
    take(queue)
    queue.add(even(40, tenant="a"))
    tenants = [jobs_in(take(queue))[0].tenant for _ in range(8)]
    assert tenants.count("b") >= 7, "until it has had as much"


def test_within_a_tenant_the_earliest_deadline_is_next() -> None:
    alone = BatchingLimits(10, 1, 10**9)
    none, late, soon = even(1), even(1, deadline=50.0), even(1, deadline=7.0)
    queue = queue_of(none, late, soon, limits=alone)
    assert [jobs_in(take(queue))[0] for _ in range(3)] == [soon, late, none]


def test_a_request_without_a_deadline_is_as_urgent_as_its_class_is_patient() -> None:
    """A minute for bulk, a second for interactive: nobody waits for ever."""
    alone = BatchingLimits(10, 1, 10**9)
    for priority, patience in (("bulk", 60.0), ("interactive", 1.0)):
        old = even(1, priority=priority, arrived=0.0)
        before = even(1, priority=priority, arrived=5.0, deadline=patience - 0.1)
        after = even(1, priority=priority, arrived=5.0, deadline=patience + 0.1)
        queue = queue_of(after, old, before, limits=alone)
        found = [jobs_in(take(queue, priority))[0] for _ in range(3)]
        assert found == [before, old, after]


# ---------------------------------------------------------------- deadlines


def test_each_request_whose_time_is_over_is_named_once() -> None:
    first, second, third = even(1, deadline=2.0), even(1, deadline=1.0), even(1)
    queue = queue_of(first, second, third)
    assert queue.expired(0.9) == []
    assert queue.expired(1.0) == [second]
    assert queue.expired(5.0) == [first]
    assert queue.expired(10**9) == []


def test_who_is_gone_before_its_deadline_is_not_named() -> None:
    job = even(1, deadline=1.0)
    queue = queue_of(job)
    queue.remove(job)
    assert queue.expired(2.0) == []


def test_who_is_gone_is_not_kept_in_memory_until_its_deadline() -> None:
    """A client that allows an hour would fill the memory with what was answered in a moment."""
    job = even(1, deadline=3600.0)
    queue = queue_of(job)
    take(queue)
    queue.remove(job)
    assert queue.turn() is None
    assert not _holds(queue, job)


def _holds(queue: Queue, job: Job) -> bool:
    """Whether the job can be reached from the queue."""
    seen, left = set(), [queue]
    while left:
        one = left.pop()
        if one is job:
            return True
        if id(one) not in seen and not isinstance(one, type) and not callable(one):
            seen.add(id(one))
            left.extend(gc.get_referents(one))
    return False
