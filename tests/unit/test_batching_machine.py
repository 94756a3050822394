"""Any order of requests, cancellations, waiting and faults, on a virtual clock: promises hold.

The promises are those at the end of docs about batching: one outcome for everyone, caps, tokens
given back, bulk passed over four times at most, results that are one's own, and nothing computed
for somebody who is gone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry
from test_collate import Request, Target, request_of, targets_of

from fakes import FakeEngine, fake_nll, padded_tokens
from seqloss.batching.jobs import Outcome
from seqloss.batching.loop import Batcher, Threads
from seqloss.batching.queues import MAX_BYPASS, BatchingLimits
from seqloss.errors import (
    DeadlineExceededError,
    EngineDeadError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    RequestTooLargeError,
    UnmeetableDeadlineError,
)
from seqloss.metrics import Metrics, ModelMetrics
from seqloss.records import Batch, Priority, TokenTerms
from virtual_time import NeverReturns, VirtualThread, VirtualTimeLoop

# Every target with this label is NaN, whatever shares its batch.
NAN_LABEL = 39
# A forward that takes longer is taken for dead; slow ones stay below it.
WATCHDOG_SECONDS = 20.0
# Longer than everything that waits can take.
LONG_ENOUGH = 100_000.0

PairKey = tuple[str, bool]


def key_of(target: Target, *, all_terms: bool) -> PairKey:
    """Equal for pairs that may be one target of a batch."""
    return repr(target), all_terms


@dataclass(eq=False)
class Call:
    """A request, from its submission to its end."""

    request: Request
    priority: Priority
    all_terms: bool
    tenant: str
    seconds_left: float
    # Whether no other request has any of its pairs.
    is_unique: bool
    reproducible: bool
    submitted: float
    task: asyncio.Task[Outcome] | None = None
    is_admitted: bool = False
    held_before: int = 0
    cancelled: bool = False
    result: Outcome | BaseException | None = None
    finished: float = float("inf")
    # The least memory that the device had, and the most, while it was under way.
    least_memory: float = float("inf")
    most_memory: float = 0.0

    @property
    def deadline(self) -> float:
        return self.submitted + self.seconds_left

    @property
    def is_live(self) -> bool:
        return self.result is None and not self.cancelled

    @property
    def num_tokens(self) -> int:
        pairs = self.request.pairs
        return len(pairs.sources.values) + len(pairs.labels.values)

    @property
    def keys(self) -> list[PairKey]:
        return [key_of(target, all_terms=self.all_terms) for target in self.request.targets]


def made_request(seed: int, num_pairs: int, first_start: int | None) -> Request:
    """Of few ids; with a `first_start` that is used once, its pairs are equal to no others."""
    random = np.random.default_rng(seed)
    sources = [
        random.integers(0, 2, int(length)).tolist()
        for length in random.choice([1, 2, 3, 12], int(random.integers(1, 5)))
    ]
    labels = [
        [NAN_LABEL if random.random() < 0.01 else int(random.integers(3, 6)) for _ in range(length)]
        for length in random.choice([1, 2, 3, 9], num_pairs).tolist()
    ]
    starts = random.integers(41, 43, num_pairs).tolist()
    fed = None
    if first_start is not None:
        starts = list(range(first_start, first_start + num_pairs))
    elif random.random() < 0.3:
        fed = [[41 + label % 2 for label in row] for row in labels]
    return request_of(
        sources,
        random.integers(0, len(sources), num_pairs).tolist(),
        labels,
        [[random.random() < 0.7 for _ in row[:-1]] + [True] for row in labels],
        start_ids=starts,
        fed=fed,
    )


class FaultyEngine(FakeEngine):
    """Takes virtual time, and fails where it is told to.

    Attributes:
        memory: tokens that fit the device, padding included.
        slowness: a factor.
        next_fault: what the next batch meets.
    """

    def __init__(
        self, loop: VirtualTimeLoop, watch: Callable[[Batch], None], *, is_packed: bool
    ) -> None:
        super().__init__(is_packed=is_packed)
        self.memory = float("inf")
        self.slowness = 1.0
        self.next_fault: BaseException | None = None
        self._loop = loop
        self._watch = watch

    def score(self, batch: Batch) -> TokenTerms:
        self._watch(batch)
        self._loop.spend(self.slowness * (1e-3 + 1e-4 * self.tokens(batch)))
        if self.next_fault is not None:
            fault, self.next_fault = self.next_fault, None
            raise fault
        if self.tokens(batch) > self.memory:
            raise OutOfMemoryError("too many tokens")
        terms = super().score(batch)
        row = batch.decoder_input_ids.row_of_value
        is_bad = np.isin(row, row[batch.labels == NAN_LABEL])[batch.counted]
        for values in (terms.target_logprob, terms.mean_logprob, terms.entropy):
            if values is not None:
                values[is_bad] = np.nan
        return terms

    def tokens(self, batch: Batch) -> int:
        """What it computes for the batch, both sides together."""
        if self.info.is_packed:
            return len(batch.sources.values) + len(batch.decoder_input_ids.values)
        return padded_tokens(batch)


class WatchedMetrics(ModelMetrics):
    """Shows what the queue's gauges would, without collecting every metric there is."""

    def watch_queue(self, state: Callable[[], Any]) -> None:
        self.queue_state = state
        super().watch_queue(state)


class BatcherMachine(RuleBasedStateMachine):
    """Does what clients, the device and the operator may do, in any order."""

    loop: VirtualTimeLoop | None = None

    @initialize(
        tokens=st.sampled_from([1, 30, 100, 400]),
        pairs=st.sampled_from([1, 3, 16, 100]),
        queue=st.sampled_from([300, 2_000, 10**6]),
        block=st.sampled_from([0.005, float("inf")]),
        host_seconds=st.sampled_from([0.0, 0.002, 0.02]),
        is_packed=st.booleans(),
    )
    def start(
        self,
        tokens: int,
        pairs: int,
        queue: int,
        block: float,
        host_seconds: float,
        is_packed: bool,
    ) -> None:
        self.loop = VirtualTimeLoop()
        self.unread: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.unread.append(context))
        self.limits = BatchingLimits(tokens, pairs, queue, block, WATCHDOG_SECONDS)
        self.calls: list[Call] = []
        self.calls_of_key: dict[PairKey, list[Call]] = {}
        self.next_start = 1000
        self.wrong: list[str] = []
        self.anchors: list[Priority] = []
        self.bypassed = 0
        # Pairs in batches that the engine began, was done with, or failed in.
        self.begun: Counter[PairKey] = Counter()
        self.computed: Counter[PairKey] = Counter()
        self.met_a_bug: set[PairKey] = set()
        self.deaths: list[EngineDeadError] = []
        self.killed = False
        self.hung = False
        self.draining: asyncio.Task[None] | None = None
        self.engine = FaultyEngine(self.loop, self.saw, is_packed=is_packed)
        self.threads = Threads(
            VirtualThread(self.loop), VirtualThread(self.loop, seconds=host_seconds)
        )
        self.registry = CollectorRegistry()
        self.metrics = WatchedMetrics(Metrics(self.registry), "fake")
        self.loop.run_until_complete(self.make_batcher())

    async def make_batcher(self) -> None:
        self.batcher = Batcher(
            self.engine, self.limits, self.metrics, self.threads, on_death=self.deaths.append
        )
        # The engine sees pairs; whose turn it was only the queue knows.
        started = self.batcher._queue.started

        def note(priority: Priority, *formed: Any) -> None:
            self.anchors.append(priority)
            started(priority, *formed)

        self.batcher._queue.started = note  # type: ignore[method-assign]

    # ------------------------------------------------------------ what the engine is given

    def saw(self, batch: Batch) -> None:
        """A batch begins. Nothing raised here would be seen, so that violations are collected."""
        keys = [
            key_of(target, all_terms=batch.with_ranks_and_entropies) for target in targets_of(batch)
        ]
        self.check_caps(batch)
        self.check_wanted(keys)
        self.check_bypass(keys)
        self.begun.update(keys)
        fault = self.engine.next_fault
        if isinstance(fault, ZeroDivisionError):
            self.met_a_bug.update(keys)
        elif isinstance(fault, (EngineDeadError, NeverReturns)):
            self.killed = True
            self.hung = isinstance(fault, NeverReturns)
        elif self.engine.tokens(batch) <= self.engine.memory:
            self.computed.update(keys)

    def check_caps(self, batch: Batch) -> None:
        num_pairs, num_tokens = len(batch.decoder_input_ids), self.engine.tokens(batch)
        if num_pairs > self.limits.max_batch_pairs:
            self.wrong.append(f"{num_pairs} pairs in a batch")
        if num_pairs > 1 and num_tokens > self.limits.max_batch_tokens:
            self.wrong.append(f"{num_tokens} tokens in a batch of {num_pairs} pairs")

    def check_wanted(self, keys: list[PairKey]) -> None:
        """Each pair is somebody's who still waits, and whose time is not over."""
        now = self.loop.time()
        for key in keys:
            owners = [
                call
                for call in self.calls_of_key.get(key, [])
                if call.is_admitted and call.is_live and now < call.deadline
            ]
            if not owners:
                self.wrong.append(f"a pair was computed for nobody at {now}: {key}")
        if len(set(keys)) < len(keys):
            self.wrong.append("equal pairs are several targets")

    def check_bypass(self, keys: list[PairKey]) -> None:
        here = set(keys)
        bulk_waits = any(
            call.priority == "bulk"
            and call.is_unique
            and call.is_admitted
            and call.is_live
            and any(not self.begun[key] and key not in here for key in call.keys)
            for call in self.calls
        )
        is_bypass = bulk_waits and self.anchors[-1] == "interactive"
        self.bypassed = self.bypassed + 1 if is_bypass else 0
        if self.bypassed > MAX_BYPASS:
            self.wrong.append(f"bulk was passed over {self.bypassed} times")

    # ------------------------------------------------------------ what clients do

    @property
    def is_over(self) -> bool:
        """Nothing is taken any more, and nothing is under way."""
        return (self.draining is not None or bool(self.deaths)) and all(
            call.result is not None for call in self.calls
        )

    def submit(self, call: Call) -> None:
        self.calls.append(call)
        for key in set(call.keys):
            self.calls_of_key.setdefault(key, []).append(call)
        call.least_memory = call.most_memory = self.engine.memory
        call.task = self.loop.create_task(self.outcome_of(call))
        call.task.add_done_callback(lambda task: self.finished(call, task))

    async def outcome_of(self, call: Call) -> Outcome:
        call.held_before = self.metrics.queue_state()["queue_tokens"]
        # Refusals come at once, so that it is known here whether there was one.
        call.is_admitted = True
        try:
            return await self.batcher.score(
                call.request.pairs,
                priority=call.priority,
                with_ranks_and_entropies=call.all_terms,
                seconds_left=call.seconds_left,
                tenant=call.tenant,
                reproducible=call.reproducible,
            )
        except (OverloadedError, RequestTooLargeError):
            call.is_admitted = False
            if self.metrics.queue_state()["queue_tokens"] != call.held_before:
                self.wrong.append("a refused request holds tokens")
            raise

    def finished(self, call: Call, task: asyncio.Task[Outcome]) -> None:
        if call.result is not None:
            self.wrong.append("a request has two outcomes")
        call.finished = self.loop.time()
        if task.cancelled():
            call.result = asyncio.CancelledError()
        else:
            call.result = task.exception() or task.result()

    @rule(
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
        seed=st.integers(0, 999),
        priority=st.sampled_from(["interactive", "bulk"]),
        all_terms=st.sampled_from([False, False, False, True]),
        tenant=st.sampled_from("abc"),
        seconds_left=st.sampled_from([float("inf"), float("inf"), 0.0, 0.003, 0.02, 0.1, 1.0]),
        is_unique=st.booleans(),
        reproducible=st.sampled_from([False, False, True]),
        settles=st.booleans(),
    )
    def requests_come(
        self,
        *,
        sizes: list[int],
        seed: int,
        priority: Priority = "bulk",
        all_terms: bool = False,
        tenant: str = "a",
        seconds_left: float = float("inf"),
        is_unique: bool = True,
        reproducible: bool = False,
        settles: bool = False,
    ) -> None:
        for place, size in enumerate(sizes):
            start = self.next_start if is_unique else None
            self.next_start += size
            self.submit(
                Call(
                    made_request(seed + place, size, start),
                    priority,
                    all_terms,
                    tenant,
                    seconds_left,
                    is_unique,
                    reproducible,
                    self.loop.time(),
                )
            )
        if settles:
            self.loop.settle()

    @precondition(lambda self: not self.is_over)
    @rule(seed=st.integers(0, 999), count=st.integers(5, 12))
    def interactive_requests_come_while_bulk_waits(self, seed: int, count: int) -> None:
        self.requests_come(sizes=[40], seed=seed)
        self.requests_come(sizes=[1] * count, seed=seed, priority="interactive", tenant="b")

    @precondition(lambda self: any(call.is_live for call in self.calls))
    @rule(
        indices=st.lists(st.integers(0, 1000), min_size=1, max_size=4),
        pause=st.sampled_from([0.0, 0.001, 0.01, 0.015]),
    )
    def clients_go_away(self, indices: list[int], pause: float) -> None:
        for index in indices:
            live = [call for call in self.calls if call.is_live]
            if live:
                call = live[index % len(live)]
                call.cancelled = True
                call.task.cancel()
                self.loop.advance(pause)

    @rule(seconds=st.sampled_from([0.0, 0.0005, 0.001, 0.003, 0.01, 0.05, 0.5, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.loop.advance(seconds)

    # ------------------------------------------------------------ what the device does

    @rule(memory=st.sampled_from([4.0, 12.0, 25.0, 40.0, 60.0, 200.0]))
    def memory_changes(self, memory: float) -> None:
        self.engine.memory = memory
        for call in self.calls:
            if call.result is None:
                call.least_memory = min(call.least_memory, memory)
                call.most_memory = max(call.most_memory, memory)

    @rule(slowness=st.sampled_from([1.0, 1.0, 10.0, 100.0]))
    def speed_changes(self, slowness: float) -> None:
        self.engine.slowness = slowness

    @precondition(lambda self: not self.is_over)
    @rule()
    def a_bug_shows(self) -> None:
        self.engine.next_fault = ZeroDivisionError("a bug")

    @precondition(lambda self: not self.is_over and self.loop.time() > 0.1)
    @rule(hangs=st.booleans())
    def the_engine_dies(self, hangs: bool) -> None:
        self.engine.next_fault = NeverReturns() if hangs else EngineDeadError("a sticky error")
        self.requests_come(sizes=[3], seed=0, settles=True)

    # ------------------------------------------------------------ what the operator does

    @precondition(lambda self: self.draining is None and self.loop.time() > 0.1)
    @rule(seconds=st.sampled_from([0.0, 0.02, 1.0, LONG_ENOUGH]))
    def sigterm_comes(self, seconds: float) -> None:
        self.draining = self.loop.create_task(self.batcher.drain(seconds))

    # ------------------------------------------------------------ what holds all the time

    @invariant()
    def nothing_went_wrong(self) -> None:
        if self.loop is not None:
            assert self.wrong == []
            assert self.unread == []

    @invariant()
    def held_tokens_are_those_of_live_requests(self) -> None:
        if self.loop is None:
            return
        state = self.metrics.queue_state()
        # Whoever was cancelled lets go when the loop runs next.
        waiting = [call for call in self.calls if call.result is None and call.is_admitted]
        assert 0 <= state["queue_tokens"] <= self.limits.max_queue_tokens
        assert state["queue_tokens"] <= sum(call.num_tokens for call in waiting)
        assert 0 <= state["queue_pairs"] <= sum(len(call.keys) for call in waiting)
        assert 1 <= state["token_budget"] <= self.limits.max_batch_tokens
        assert state["estimated_wait_seconds"] >= 0

    @invariant()
    def a_dead_engine_answers_everybody(self) -> None:
        if self.loop is None or not self.deaths:
            return
        assert len(self.deaths) == 1
        assert self.killed
        assert self.batcher.is_stuck == self.hung
        self.loop.settle()
        assert all(call.result is not None for call in self.calls)

    @invariant()
    def outcomes_are_true(self) -> None:
        if self.loop is None:
            return
        for call in self.calls:
            if call.result is not None and call.task is not None:
                call.task = None
                self.check_outcome(call)

    def check_outcome(self, call: Call) -> None:
        result, size = call.result, call.num_tokens
        if isinstance(result, Outcome):
            assert call.finished <= call.deadline
            assert call.held_before + size <= self.limits.max_queue_tokens
            self.check_scores(call, result)
        elif isinstance(result, asyncio.CancelledError):
            assert call.cancelled
        elif isinstance(result, DeadlineExceededError):
            # Timers come earlier by the clock's resolution at most.
            assert abs(call.finished - call.deadline) <= 1e-8, "at once, and not before"
        elif isinstance(result, RequestTooLargeError):
            assert size > self.limits.max_queue_tokens
        elif isinstance(result, OverloadedError):
            is_full = call.held_before + size > self.limits.max_queue_tokens
            assert is_full != isinstance(result, UnmeetableDeadlineError)
            assert is_full or call.seconds_left < float("inf")
            assert result.retry_after_seconds >= 1
        elif isinstance(result, EngineDeadError):
            assert self.killed
        elif isinstance(result, NotReadyError):
            assert self.draining is not None
        elif isinstance(result, ZeroDivisionError):
            assert self.met_a_bug & set(call.keys), "an error of somebody else's batch"
        else:
            raise AssertionError(f"{result!r} is no outcome") from result

    def check_scores(self, call: Call, outcome: Outcome) -> None:
        """In the order of the request, and to the bit what the pairs have when they are alone."""
        too_large = outcome.out_of_memory.tolist()
        for target, given_up in zip(call.request.targets, too_large, strict=True):
            alone = len(target.source) + len(target.labels)
            if given_up:
                assert alone > call.least_memory
            else:
                assert alone <= call.most_memory
        nlls = np.array(list(expected_nlls(call.request, too_large)), np.float32)
        np.testing.assert_array_equal(outcome.terms.target_logprob, -nlls)
        np.testing.assert_array_equal(outcome.terms.mean_logprob, -nlls - 1)
        assert (outcome.terms.entropy is not None) == call.all_terms
        if outcome.terms.entropy is not None:
            np.testing.assert_array_equal(outcome.terms.entropy, nlls / 2)
        assert outcome.num_batches >= 1
        assert 0 <= outcome.queue_seconds <= call.finished - call.submitted

    # ------------------------------------------------------------ what holds in the end

    def teardown(self) -> None:
        if self.loop is None:
            return
        try:
            self.end()
        finally:
            self.loop.close()

    def end(self) -> None:
        # Without any help: nobody leaves, nothing is closed.
        self.loop.advance(LONG_ENOUGH)
        assert all(call.result is not None for call in self.calls), "a request hangs"
        assert self.metrics.queue_state()["queue_tokens"] == 0
        assert self.metrics.queue_state()["queue_pairs"] == 0
        if self.draining is None:
            assert len(self.deaths) == self.killed
            self.draining = self.loop.create_task(self.batcher.drain(LONG_ENOUGH))
        self.loop.advance(LONG_ENOUGH)
        assert self.draining.done()
        self.draining.result()
        assert not asyncio.all_tasks(self.loop)
        admitted = Counter(key for call in self.calls if call.is_admitted for key in call.keys)
        assert self.computed <= admitted, "a pair was computed again"
        self.nothing_went_wrong()
        self.outcomes_are_true()
        assert self.loop.unread_errors() == []


def expected_nlls(request: Request, too_large: list[bool]) -> Iterator[float]:
    """Of the counted tokens, by the model's formula alone."""
    for target, given_up in zip(request.targets, too_large, strict=True):
        is_bad = given_up or NAN_LABEL in target.labels
        for fed, label, counts in zip(target.fed, target.labels, target.counted, strict=True):
            if counts:
                yield np.nan if is_bad else fake_nll(target.source, fed, label)


test_promises_hold_whatever_happens = BatcherMachine.TestCase
