"""The queue under many callers: everybody gets their own scores, once, or hears why not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from test_collate import Request, any_request, request_of

from fakes import FakeEngine, fake_nll
from seqloss.batching import queues
from seqloss.batching.jobs import Outcome
from seqloss.batching.loop import Batcher, Threads
from seqloss.batching.queues import BatchingLimits
from seqloss.errors import NotReadyError, OutOfMemoryError, OverloadedError, RequestTooLargeError
from seqloss.metrics import Metrics
from seqloss.records import Batch, Priority

ROOMY = BatchingLimits(max_batch_tokens=1000, max_batch_pairs=100, max_queue_tokens=10**6)


@dataclass
class Service:
    """A batcher with its engine and what it reports."""

    batcher: Batcher
    engine: FakeEngine
    registry: CollectorRegistry

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
            batcher = Batcher(engine, limits, metrics, Threads(device, host))
            yield Service(batcher, engine, registry)
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
