"""The queue under many callers: everybody gets their own scores, once, or hears why not."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from test_collate import Request, any_request, request_of

from fakes import FakeEngine, fake_nll
from seqloss.batching import queues
from seqloss.batching.collate import Collated, collate
from seqloss.batching.jobs import Outcome
from seqloss.batching.loop import Batcher, Threads
from seqloss.batching.queues import BatchingLimits
from seqloss.errors import (
    DeadlineExceededError,
    EngineDeadError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    RequestTooLargeError,
)
from seqloss.metrics import Metrics
from seqloss.records import Batch, Priority, TokenTerms
from virtual_time import NeverReturns, VirtualThread, VirtualTimeLoop

ROOMY = BatchingLimits(max_batch_tokens=1000, max_batch_pairs=100, max_queue_tokens=10**6)


@dataclass
class Service:
    """A batcher with its engine and what it reports."""

    batcher: Batcher
    engine: FakeEngine
    registry: CollectorRegistry
    deaths: list[EngineDeadError] = field(default_factory=list)

    def metric(self, name: str) -> float:
        """A sample's value, 0 where it is not there yet."""
        return self.registry.get_sample_value(f"seqloss_{name}", {"model": "fake"}) or 0.0

    async def score(
        self, request: Request, priority: Priority = "interactive", *, all_terms: bool = False
    ) -> Outcome:
        return await self.batcher.score(
            request.pairs, priority=priority, with_ranks_and_entropies=all_terms
        )

    async def submit(self, *requests: Request) -> list[asyncio.Task[Outcome]]:
        """Returns once all of them wait in the queue, or have been refused."""
        running = asyncio.get_running_loop()
        tasks = [running.create_task(self.score(request)) for request in requests]
        begun = running.create_future()
        running.call_soon(begun.set_result, None)
        await begun
        return tasks


@asynccontextmanager
async def service_of(engine: FakeEngine, limits: BatchingLimits = ROOMY) -> AsyncIterator[Service]:
    registry = CollectorRegistry()
    metrics = Metrics(registry).model("fake")
    with ThreadPoolExecutor(1) as device, ThreadPoolExecutor(1) as host:
        async with asyncio.timeout(60):
            deaths: list[EngineDeadError] = []
            threads = Threads(device, host)
            batcher = Batcher(engine, limits, metrics, threads, on_death=deaths.append)
            yield Service(batcher, engine, registry, deaths)
            await batcher.drain(60)


class Gate:
    """Stops the engine in its first batch until it is opened."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._opened = threading.Event()

    def __call__(self, _: Batch) -> None:
        if not self._opened.is_set():
            self._loop.call_soon_threadsafe(self.entered.set)
            assert self._opened.wait(60)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    def open(self) -> None:
        self._opened.set()


@asynccontextmanager
async def busy_service(
    first: Request, limits: BatchingLimits = ROOMY
) -> AsyncIterator[tuple[Service, Gate, asyncio.Task[Outcome]]]:
    """A service whose engine is held in a batch of the first request."""
    with Gate() as gate:
        async with service_of(FakeEngine(gate), limits) as service:
            (task,) = await service.submit(first)
            await gate.entered.wait()
            try:
                yield service, gate, task
            finally:
                gate.open()


def simple(label: int, num_pairs: int = 1) -> Request:
    """Pairs of one source and two tokens; requests differ in the label, pairs in the start."""
    return request_of(
        [[3]], [0] * num_pairs, [[label, 2]] * num_pairs, [[True, True]] * num_pairs,
        start_ids=list(range(9, 9 + num_pairs)),
    )  # fmt: skip


def num_tokens(requests: Iterable[Request]) -> int:
    return sum(
        len(request.pairs.sources.values) + len(request.pairs.labels.values) for request in requests
    )


def nlls_of(request: Request) -> list[list[float]]:
    """What the fake model says of each target's counted tokens, computed without a batch."""
    return [
        [
            fake_nll(target.source, fed, label)
            for fed, label, counts in zip(target.fed, target.labels, target.counted, strict=True)
            if counts
        ]
        for target in request.targets
    ]


def assert_scored(outcome: Outcome, request: Request, *, all_terms: bool = False) -> None:
    """Exactly the fake model's numbers, and NaN for pairs that did not fit the device."""
    nlls = np.array(
        [
            np.nan if too_large else nll
            for row, too_large in zip(nlls_of(request), outcome.out_of_memory, strict=True)
            for nll in row
        ],
        np.float32,
    )
    np.testing.assert_array_equal(outcome.terms.target_logprob, -nlls)
    np.testing.assert_array_equal(outcome.terms.mean_logprob, -nlls - 1)
    if all_terms:
        assert outcome.terms.rank is not None
        scored = np.isfinite(nlls)
        ranks = (nlls[scored] * 10).astype(np.int32)
        np.testing.assert_array_equal(outcome.terms.rank[scored], ranks)
        np.testing.assert_array_equal(outcome.terms.entropy, nlls / 2)
    else:
        assert outcome.terms.rank is None
        assert outcome.terms.entropy is None


def labels_seen(engine: FakeEngine) -> set[int]:
    return {int(label) for batch in engine.batches for label in batch.labels}


# ---------------------------------------------------------------- many callers


@dataclass(frozen=True)
class Call:
    """One request of a client."""

    request: Request
    priority: Priority
    all_terms: bool


calls = st.builds(
    Call,
    any_request(min_pairs=0, max_pairs=6),
    st.sampled_from(["interactive", "bulk"]),
    st.booleans(),
)
# Each client sends its next request when it has the answer to the one before.
clients = st.lists(st.lists(calls, min_size=1, max_size=3), min_size=1, max_size=6)
limits_of_batches = st.builds(
    BatchingLimits,
    max_batch_tokens=st.sampled_from([1, 12, 40, 1000]),
    max_batch_pairs=st.sampled_from([1, 3, 100]),
    max_queue_tokens=st.sampled_from([20, 60, 10**6]),
)


async def answers(service: Service, client: list[Call]) -> list[Outcome | Exception]:
    received: list[Outcome | Exception] = []
    for call in client:
        try:
            received.append(
                await service.score(call.request, call.priority, all_terms=call.all_terms)
            )
        except (OverloadedError, RequestTooLargeError) as refusal:
            received.append(refusal)
    return received


@settings(max_examples=60, deadline=None)
@given(clients, limits_of_batches)
def test_every_caller_gets_exactly_their_own_scores(
    clients: list[list[Call]], limits: BatchingLimits
) -> None:
    async def run() -> None:
        async with service_of(FakeEngine(), limits) as service:
            received = await asyncio.gather(*(answers(service, client) for client in clients))
            assert service.metric("queue_tokens") == 0
            assert service.metric("queue_pairs") == 0
        num_scored = 0
        for client, outcomes in zip(clients, received, strict=True):
            for call, outcome in zip(client, outcomes, strict=True):
                size = num_tokens([call.request])
                if isinstance(outcome, Outcome):
                    assert_scored(outcome, call.request, all_terms=call.all_terms)
                    assert not outcome.out_of_memory.any()
                    assert bool(outcome.num_batches) == bool(call.request.targets)
                    assert size <= limits.max_queue_tokens
                    num_scored += len(call.request.targets)
                else:
                    is_too_large = size > limits.max_queue_tokens
                    assert type(outcome) is (
                        RequestTooLargeError if is_too_large else OverloadedError
                    )
        # Equal pairs are one target of a batch.
        assert sum(len(batch.decoder_input_ids) for batch in service.engine.batches) <= num_scored
        assert service.metric("cancelled_pairs_total") == 0

    asyncio.run(run())


@settings(max_examples=40, deadline=None)
@given(clients, limits_of_batches)
def test_batches_stay_within_their_limits(
    clients: list[list[Call]], limits: BatchingLimits
) -> None:
    async def run() -> None:
        async with service_of(FakeEngine(), limits) as service:
            await asyncio.gather(*(answers(service, client) for client in clients))
        for batch in service.engine.batches:
            sources, targets = batch.sources, batch.decoder_input_ids
            cost = len(sources) * sources.lengths.max() + len(targets) * targets.lengths.max()
            assert len(targets) <= limits.max_batch_pairs
            assert len(targets) == 1 or cost <= limits.max_batch_tokens

    asyncio.run(run())


def test_what_waits_for_a_busy_engine_shares_its_next_batch() -> None:
    async def run() -> None:
        requests = [simple(label, num_pairs=2) for label in range(10, 20)]
        async with busy_service(simple(5)) as (service, gate, first):
            tasks = await service.submit(*requests)
            assert service.metric("queue_pairs") == 20
            assert service.metric("queue_tokens") == num_tokens([simple(5), *requests])
            gate.open()
            for request, outcome in zip(requests, await asyncio.gather(*tasks), strict=True):
                assert_scored(outcome, request)
            await first
        assert [len(batch.decoder_input_ids) for batch in service.engine.batches] == [1, 20]

    asyncio.run(run())


def test_sources_of_different_requests_are_not_taken_for_the_same() -> None:
    def long_source(id_: int) -> Request:
        return request_of([[id_] * 10], [0], [[5]], [[True]], start_ids=[9])

    async def run() -> None:
        requests = [long_source(3), long_source(4)]
        limits = BatchingLimits(max_batch_tokens=12, max_batch_pairs=100, max_queue_tokens=10**6)
        async with busy_service(simple(5), limits) as (service, gate, _):
            tasks = await service.submit(*requests)
            gate.open()
            for request, outcome in zip(requests, await asyncio.gather(*tasks), strict=True):
                assert_scored(outcome, request)
        assert [len(batch.decoder_input_ids) for batch in service.engine.batches] == [1, 1, 1]

    asyncio.run(run())


def test_a_request_of_very_many_batches_is_scored_to_the_end() -> None:
    async def run() -> None:
        request = simple(6, num_pairs=400)
        limits = BatchingLimits(max_batch_tokens=6, max_batch_pairs=100, max_queue_tokens=10**6)
        async with service_of(FakeEngine(), limits) as service:
            outcome = await service.score(request)
        assert_scored(outcome, request)
        assert outcome.num_batches == len(service.engine.batches) == 200

    asyncio.run(run())


def test_a_request_without_pairs_waits_for_nobody() -> None:
    async def run() -> None:
        async with busy_service(simple(5)) as (service, _, first):
            outcome = await service.score(simple(6, num_pairs=0))
            assert len(outcome.terms.target_logprob) == 0
            assert not first.done()

    asyncio.run(run())


def test_a_full_queue_refuses_whole_requests_and_keeps_the_others() -> None:
    async def run() -> None:
        first, fits, does_not = simple(5), simple(6, num_pairs=2), simple(7, num_pairs=2)
        limits = BatchingLimits(1000, 100, max_queue_tokens=num_tokens([first, fits]) + 1)
        async with busy_service(first, limits) as (service, gate, _):
            admitted, refused = await service.submit(fits, does_not)
            with pytest.raises(OverloadedError) as caught:
                await refused
            assert caught.value.retry_after_seconds
            assert service.metric("queue_tokens") == num_tokens([first, fits])
            gate.open()
            assert_scored(await admitted, fits)
            assert_scored(await service.score(does_not), does_not)
        assert service.metric("queue_tokens") == 0

    asyncio.run(run())


# ---------------------------------------------------------------- callers that go away


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=8))
def test_what_is_cancelled_frees_its_tokens_and_is_never_computed(
    waiting: list[tuple[int, bool]],
) -> None:
    async def run() -> None:
        requests = [simple(10 + place, size) for place, (size, _) in enumerate(waiting)]
        kept = [request for request, (_, goes) in zip(requests, waiting, strict=True) if not goes]
        async with busy_service(simple(5)) as (service, gate, first):
            tasks = await service.submit(*requests)
            leaving = [task for task, (_, goes) in zip(tasks, waiting, strict=True) if goes]
            staying = [task for task in tasks if task not in leaving]
            for task in leaving:
                task.cancel()
            results = await asyncio.gather(*leaving, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            assert service.metric("queue_tokens") == num_tokens([simple(5), *kept])
            gate.open()
            for request, outcome in zip(kept, await asyncio.gather(*staying), strict=True):
                assert_scored(outcome, request)
            assert_scored(await first, simple(5))
        assert labels_seen(service.engine) == {2, 5, *(row.targets[0].labels[0] for row in kept)}
        assert service.metric("queue_tokens") == 0
        num_gone = sum(size for size, goes in waiting if goes)
        assert service.metric("cancelled_pairs_total") == num_gone

    asyncio.run(run())


def test_a_caller_that_leaves_while_being_computed_takes_nobody_along() -> None:
    async def run() -> None:
        many, other = simple(6, num_pairs=5), simple(7)
        limits = BatchingLimits(1000, max_batch_pairs=2, max_queue_tokens=10**6)
        async with busy_service(many, limits) as (service, gate, leaving):
            (staying,) = await service.submit(other)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert service.metric("queue_tokens") == num_tokens([other])
            gate.open()
            assert_scored(await staying, other)
        assert [len(batch.decoder_input_ids) for batch in service.engine.batches] == [2, 1]
        assert service.metric("queue_tokens") == 0

    asyncio.run(run())


# ---------------------------------------------------------------- what goes wrong inside


def test_a_bug_while_a_batch_is_formed_reaches_all_who_wait_and_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form_batch = queues.form_batch

    def fail_once(*arguments: Any) -> Any:
        monkeypatch.setattr(queues, "form_batch", form_batch)
        raise ZeroDivisionError("a bug")

    async def run() -> None:
        first, later = simple(5), simple(8)
        async with busy_service(first) as (service, gate, computed):
            waiting = await service.submit(simple(6), simple(7))
            monkeypatch.setattr(queues, "form_batch", fail_once)
            gate.open()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(result) for result in results] == [ZeroDivisionError] * 2
            assert_scored(await computed, first)
            assert service.metric("queue_tokens") == 0
            assert_scored(await service.score(later), later)
        assert labels_seen(service.engine) == {2, 5, 8}

    asyncio.run(run())


def test_a_bug_in_the_engine_reaches_those_in_its_batch_alone() -> None:
    async def run() -> None:
        def fail_on_six(batch: Batch) -> None:
            if 6 in batch.labels:
                raise ZeroDivisionError("a bug")

        limits = BatchingLimits(1000, max_batch_pairs=1, max_queue_tokens=10**6)
        async with service_of(FakeEngine(fail_on_six), limits) as service:
            requests = [simple(5), simple(6, num_pairs=3), simple(7)]
            tasks = await service.submit(*requests)
            before, bad, after = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(bad, ZeroDivisionError)
            for outcome, request in ((before, requests[0]), (after, requests[2])):
                assert isinstance(outcome, Outcome)
                assert_scored(outcome, request)
            assert service.metric("queue_tokens") == 0
            assert service.metric("cancelled_pairs_total") == 0
        assert len(service.engine.batches) == 3

    asyncio.run(run())


def test_a_batch_that_fails_was_time_of_the_device_too() -> None:
    def fail(_: Batch) -> None:
        raise ZeroDivisionError("a bug")

    with virtual_service(fail) as service:
        seen = []
        for _ in range(2):
            task = service.start(simple(5))
            for _ in range(4):
                service.loop.advance(0.4)
                seen.append(service.batcher.busy_seconds)
            assert outcomes(service, task) == [ZeroDivisionError]
        assert seen == sorted(seen)
        assert seen[-1] == pytest.approx(2.0)


def _parse_for(seconds: float) -> None:
    """Holds up the loop, as a large body does."""
    time.sleep(seconds)


def test_batches_that_a_busy_loop_hears_of_late_were_time_of_the_device_all_the_same() -> None:
    async def run() -> None:
        def compute(_: Batch) -> None:
            time.sleep(0.01)

        limits = BatchingLimits(1000, max_batch_pairs=1, max_queue_tokens=10**6)
        async with service_of(FakeEngine(compute), limits) as service:
            tasks = await service.submit(simple(5, num_pairs=10))
            while not tasks[0].done():
                _parse_for(0.02)
                await asyncio.sleep(0)
            assert service.batcher.busy_seconds >= 10 * 0.01

    asyncio.run(run())


@settings(max_examples=50, deadline=None)
@given(st.lists(any_request(max_pairs=6), min_size=1, max_size=5), st.integers(1, 12))
def test_a_device_that_is_short_of_memory_scores_all_that_fits_it(
    requests: list[Request], most_tokens: int
) -> None:
    def refuse_above(batch: Batch) -> None:
        if len(batch.labels) > most_tokens:
            raise OutOfMemoryError("too many tokens")

    async def run() -> None:
        async with service_of(FakeEngine(refuse_above)) as service:
            outcomes = await asyncio.gather(*map(service.score, requests))
            for request, outcome in zip(requests, outcomes, strict=True):
                assert outcome.out_of_memory.tolist() == [
                    len(target.labels) > most_tokens for target in request.targets
                ]
                assert_scored(outcome, request)
            assert service.metric("queue_tokens") == 0

    asyncio.run(run())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(any_request(max_pairs=6), min_size=1, max_size=5), st.lists(st.booleans(), max_size=20)
)
def test_memory_that_comes_and_goes_costs_no_score(
    requests: list[Request], failures: list[bool]
) -> None:
    left = list(failures)

    def refuse_now_and_then(batch: Batch) -> None:
        if len(batch.decoder_input_ids) > 1 and left and left.pop():
            raise OutOfMemoryError("not now")

    async def run() -> None:
        async with service_of(FakeEngine(refuse_now_and_then)) as service:
            outcomes = await asyncio.gather(*map(service.score, requests))
            for request, outcome in zip(requests, outcomes, strict=True):
                assert not outcome.out_of_memory.any()
                assert_scored(outcome, request)
            assert service.metric("queue_tokens") == 0

    asyncio.run(run())


# ---------------------------------------------------------------- the end


def test_a_drain_that_takes_too_long_answers_the_rest() -> None:
    async def run() -> None:
        async with busy_service(simple(5)) as (service, gate, computed):
            waiting = await service.submit(simple(6), simple(7, num_pairs=3))
            await service.batcher.drain(0)
            results = await asyncio.gather(computed, *waiting, return_exceptions=True)
            assert [type(result) for result in results] == [NotReadyError] * 3
            with pytest.raises(NotReadyError):
                await service.score(simple(8))
            assert service.metric("queue_tokens") == 0
            assert service.metric("cancelled_pairs_total") == 0
            gate.open()
        assert labels_seen(service.engine) == {2, 5}

    asyncio.run(run())


def test_a_drain_with_time_finishes_what_was_admitted_and_takes_no_more() -> None:
    async def run() -> None:
        async with busy_service(simple(5)) as (service, gate, computed):
            (waiting,) = await service.submit(simple(6, num_pairs=3))
            draining = asyncio.create_task(service.batcher.drain(60))
            (late,) = await service.submit(simple(7))
            with pytest.raises(NotReadyError):
                await late
            assert not draining.done()
            gate.open()
            await draining
            assert_scored(await computed, simple(5))
            assert_scored(await waiting, simple(6, num_pairs=3))
        assert labels_seen(service.engine) == {2, 5, 6}
        assert service.metric("queue_tokens") == 0

    asyncio.run(run())


# ---------------------------------------------------------------- what else goes wrong inside


def test_a_forward_that_never_returns_is_given_up_and_everybody_hears_of_it() -> None:
    async def run() -> None:
        limits = BatchingLimits(1000, 100, 10**6, max_forward_seconds=0.05)
        async with busy_service(simple(5), limits) as (service, gate, first):
            tasks = await service.submit(simple(6), simple(7, num_pairs=3))
            results = await asyncio.gather(first, *tasks, return_exceptions=True)
            assert [type(result) for result in results] == [EngineDeadError] * 3
            assert service.batcher.is_stuck
            assert [str(error) for error in service.deaths] == [
                "a batch was not computed within 0.05 s"
            ]
            with pytest.raises(EngineDeadError):
                await service.score(simple(8))
            assert service.metric("queue_tokens") == 0
            gate.open()
        assert labels_seen(service.engine) == {2, 5}

    asyncio.run(run())


def test_an_engine_that_dies_takes_all_who_wait_along_and_is_not_asked_again() -> None:
    async def run() -> None:
        def die(_: Batch) -> None:
            raise EngineDeadError("a sticky error")

        async with service_of(FakeEngine(die), BatchingLimits(1000, 1, 10**6)) as service:
            tasks = await service.submit(simple(5), simple(6))
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results] == [EngineDeadError] * 2
            assert [str(error) for error in service.deaths] == ["a sticky error"]
            assert not service.batcher.is_stuck, "the thread is free"
        assert len(service.engine.batches) == 1

    asyncio.run(run())


def test_interactive_pairs_overtake_a_bulk_batch_that_was_formed_ahead() -> None:
    async def run() -> None:
        limits = BatchingLimits(1000, max_batch_pairs=2, max_queue_tokens=10**6)
        engine = FakeEngine()
        async with service_of(engine, limits) as service:
            # Scattering the first batch happens while the second one is held.
            with Gate() as gate:
                engine._before = gate
                bulk = asyncio.create_task(service.score(simple(6, num_pairs=8), "bulk"))
                await gate.entered.wait()
                # The loop hears of the batch's begin after the engine does.
                for _ in range(100):  # steps of the loop, which has yet to form it
                    if service.metric("queue_pairs") == 4:
                        break
                    await asyncio.sleep(0)
                assert service.metric("queue_pairs") == 4, "two go, and two are formed ahead"
                (urgent,) = await service.submit(simple(7))
                gate.open()
            assert_scored(await urgent, simple(7))
            assert_scored(await bulk, simple(6, num_pairs=8))
        assert [7 in batch.labels for batch in engine.batches] == [False, True, False, False, False]

    asyncio.run(run())


def test_a_bug_while_results_are_given_back_reaches_those_in_the_batch_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scatter = Collated.scatter

    def fail_on_six(collated: Collated, terms: TokenTerms) -> None:
        if 6 in collated.batch.labels:
            raise ZeroDivisionError("a bug")
        scatter(collated, terms)

    async def run() -> None:
        monkeypatch.setattr(Collated, "scatter", fail_on_six)
        limits = BatchingLimits(1000, max_batch_pairs=1, max_queue_tokens=10**6)
        async with service_of(FakeEngine(), limits) as service:
            tasks = await service.submit(simple(5), simple(6, num_pairs=3), simple(7))
            before, bad, after = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(bad, ZeroDivisionError)
            for outcome, label in ((before, 5), (after, 7)):
                assert isinstance(outcome, Outcome)
                assert_scored(outcome, simple(label))
            assert service.metric("queue_tokens") == 0

    asyncio.run(run())


def test_a_device_that_cannot_tell_its_memory_costs_nobody_an_answer() -> None:
    class Mute(FakeEngine):
        def memory_bytes(self) -> dict[str, int]:
            raise RuntimeError("no figures")

    async def run() -> None:
        async with service_of(Mute(), BatchingLimits(1000, 2, 10**6)) as service:
            for label in (5, 6):
                request = simple(label, num_pairs=7)
                assert_scored(await service.score(request), request)

    asyncio.run(run())


def test_a_batch_that_did_not_fit_has_its_memory_given_back_before_its_halves() -> None:
    events: list[str] = []

    class Small(FakeEngine):
        def score(self, batch: Batch) -> TokenTerms:
            events.append(f"{len(batch.decoder_input_ids)} pairs")
            if len(batch.decoder_input_ids) > 2:
                raise OutOfMemoryError("too many pairs")
            return super().score(batch)

        def release_memory(self) -> None:
            assert sys.exc_info() == (None, None, None), "the error's traceback holds tensors"
            events.append("release")

    async def run() -> None:
        async with service_of(Small()) as service:
            request = simple(5, num_pairs=4)
            assert_scored(await service.score(request), request)
            assert service.metric("token_budget") == 700

    asyncio.run(run())
    assert events == ["4 pairs", "release", "2 pairs", "2 pairs"]


# ---------------------------------------------------------------- on a virtual clock


@dataclass
class VirtualService:
    """A batcher whose batches take a second."""

    loop: VirtualTimeLoop
    batcher: Batcher
    engine: FakeEngine

    def start(
        self, request: Request, priority: Priority = "interactive", **options: Any
    ) -> asyncio.Task[Outcome]:
        score = self.batcher.score(
            request.pairs, priority=priority, with_ranks_and_entropies=False, **options
        )
        return self.loop.create_task(score)

    def drain(self, seconds: float) -> None:
        self.loop.run_until_complete(self.batcher.drain(seconds))


@contextmanager
def virtual_service(
    before: Callable[[Batch], Any] = lambda _: None,
    limits: BatchingLimits = ROOMY,
    host_seconds: float = 0.0,
    device: VirtualThread | None = None,
    loop: VirtualTimeLoop | None = None,
) -> Iterator[VirtualService]:
    """Fails where an error is left that nobody read; closes the loop if it is its own."""
    if loop is None:
        with closing(VirtualTimeLoop()) as own:
            with virtual_service(before, limits, host_seconds, device, own) as service:
                yield service
            assert not asyncio.all_tasks(own)
        return
    unread: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unread.append(context))
    threads = Threads(device or VirtualThread(loop, seconds=1.0), VirtualThread(loop, host_seconds))
    engine = FakeEngine(before)
    batcher = loop.run_until_complete(_batcher_of(engine, limits, threads))
    service = VirtualService(loop, batcher, engine)
    yield service
    service.drain(1000)
    loop.advance(1000)
    assert unread == loop.unread_errors() == []


async def _batcher_of(engine: FakeEngine, limits: BatchingLimits, threads: Threads) -> Batcher:
    return Batcher(engine, limits, Metrics(CollectorRegistry()).model("fake"), threads)


def outcomes(service: VirtualService, *tasks: asyncio.Task[Outcome]) -> list[type]:
    gathered = asyncio.gather(*tasks, return_exceptions=True)
    return [type(each) for each in service.loop.run_until_complete(_awaited(gathered))]


async def _awaited(future: Any) -> Any:
    return await future


def test_a_forward_that_fails_after_the_drain_has_ended_is_not_an_error_that_nobody_reads() -> None:
    def die(_: Batch) -> None:
        raise EngineDeadError("a sticky error")

    for limits in (ROOMY, BatchingLimits(1000, 100, 10**6, max_forward_seconds=50.0)):
        with virtual_service(die, limits) as service:
            task = service.start(simple(5))
            service.loop.advance(0.5)
            service.drain(0)
            assert outcomes(service, task) == [NotReadyError]


def test_a_batch_formed_ahead_that_nobody_waits_for_any_more_may_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def fail_from_the_second_on(selection: Any) -> Collated:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ZeroDivisionError("a bug")
        return collate(selection)

    monkeypatch.setattr("seqloss.batching.loop.collate", fail_from_the_second_on)
    with virtual_service(limits=BatchingLimits(1000, 2, 10**6)) as service:
        task = service.start(simple(5, num_pairs=20), "bulk")
        service.loop.advance(0.5)
        assert calls == 2
        service.drain(0)
        assert outcomes(service, task) == [NotReadyError]


def test_a_drain_ends_when_the_last_results_are_given_back() -> None:
    with virtual_service(host_seconds=1.0) as service:
        task = service.start(simple(5))
        service.loop.advance(2.5)  # a second each for collating and computing, then scattering
        service.drain(0)
        assert asyncio.all_tasks(service.loop) <= {task}
        assert service.loop.time() == 3.0
        assert outcomes(service, task) == [NotReadyError]


def test_who_leaves_while_a_batch_is_made_anew_for_another_one_that_left_is_not_computed() -> None:
    with virtual_service(host_seconds=1.0) as service:
        stays, first, second = map(service.start, map(simple, (5, 6, 7)))
        service.loop.advance(0.5)
        first.cancel()
        service.loop.advance(1.0)  # the batch is collated without the first one now
        second.cancel()
        assert outcomes(service, stays, first, second) == [
            *(Outcome, asyncio.CancelledError, asyncio.CancelledError)
        ]
        assert labels_seen(service.engine) == {2, 5}


def test_whose_time_is_over_while_its_batch_is_made_is_answered_at_once_and_not_computed() -> None:
    with virtual_service(host_seconds=1.0) as service:
        stays, hasty = service.start(simple(5)), service.start(simple(6), seconds_left=0.25)
        service.loop.advance(0.25)
        assert isinstance(hasty.exception(), DeadlineExceededError)
        assert outcomes(service, stays) == [Outcome]
        assert labels_seen(service.engine) == {2, 5}


def test_a_timer_that_comes_early_by_the_clock_s_resolution_is_not_in_vain() -> None:
    with virtual_service() as service:
        service.loop._clock_resolution = 0.125
        service.loop.call_at(0.75, lambda: None)
        task = service.start(simple(5), seconds_left=0.8125)
        service.loop.advance(0.8)
        assert isinstance(task.exception(), DeadlineExceededError)


def test_waiting_for_a_device_that_another_model_has_is_not_taken_for_a_hang() -> None:
    limits = BatchingLimits(1000, 1, 10**6, max_forward_seconds=5.0)
    with closing(VirtualTimeLoop()) as loop:
        device = VirtualThread(loop, seconds=4.0)
        with (
            virtual_service(limits=limits, device=device, loop=loop) as one,
            virtual_service(limits=limits, device=device, loop=loop) as other,
        ):
            tasks = [service.start(simple(5)) for service in (one, other)]
            assert outcomes(one, *tasks) == [Outcome, Outcome]
            assert loop.time() == 8.0


def test_halves_of_interactive_batches_pass_bulk_over_four_times_at_most() -> None:
    def refuse_more_than_one(batch: Batch) -> None:
        if len(batch.decoder_input_ids) > 1:
            raise OutOfMemoryError("too many pairs")

    with virtual_service(refuse_more_than_one) as service:
        tasks = [service.start(simple(5, num_pairs=16)), service.start(simple(6), "bulk")]
        assert outcomes(service, *tasks) == [Outcome, Outcome]
        first_of_bulk = [6 in batch.labels for batch in service.engine.batches].index(True)
        assert first_of_bulk <= queues.MAX_BYPASS


def test_batches_are_smaller_after_one_that_did_not_fit() -> None:
    def refuse_above_twenty_tokens(batch: Batch) -> None:
        if len(batch.labels) > 20:
            raise OutOfMemoryError("too many tokens")

    with virtual_service(refuse_above_twenty_tokens, BatchingLimits(40, 100, 10**6)) as service:
        task = service.start(simple(5, num_pairs=60))
        assert outcomes(service, task) == [Outcome]
        sizes = [len(batch.labels) for batch in service.engine.batches]
        assert sizes[0] > 20
        assert all(size <= 40 * 0.7 for size in sizes[1:])


def test_the_halves_of_a_batch_that_did_not_fit_shrink_the_budget_only_once() -> None:
    def refuse_above_four_pairs(batch: Batch) -> None:
        if len(batch.decoder_input_ids) > 4:
            raise OutOfMemoryError("too many pairs")

    limits = BatchingLimits(400, 64, 10**6)
    with virtual_service(refuse_above_four_pairs, limits) as service:
        assert outcomes(service, service.start(simple(5, num_pairs=64))) == [Outcome]
        assert service.batcher._budget.tokens == 280


def test_a_drain_does_not_wait_for_a_batch_that_never_ends() -> None:
    def hang(_: Batch) -> None:
        raise NeverReturns

    limits = BatchingLimits(100, 10, 10**6, max_forward_seconds=300)
    with virtual_service(hang, limits) as service:
        task = service.start(simple(5))
        service.loop.advance(1)
        service.drain(30)
        assert outcomes(service, task) == [NotReadyError]
        assert service.batcher.is_stuck
        assert service.loop.time() < 300
