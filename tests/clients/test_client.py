"""The real clients against the real application: both give the same, on either wire."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from conversations import GOOD
from fakes import MAX_TOKENS, START, VOCABULARY_SIZE, FakeEngine, fake_bundle, fake_nll
from seqloss_client import (
    AsyncLossClient,
    Chunk,
    LossClient,
    LossResult,
    Ragged,
    _protocol,
    errors,
)
from seqloss_client._steps import Timing
from server import Server

SOURCES = [[5, 6, 7], [8, 2], [9]]
TARGETS = [[1, 2], [3, 4, 5], [6]]
TOO_LARGE_ID = [[1, 2], [3, VOCABULARY_SIZE, 5], [6]]
ALL_PER_TOKEN = ["token_losses", "token_nlls", "token_ranks", "token_entropies"]

# Retries that come at once.
AT_ONCE = Timing(random=lambda: 0.0)


class Bridge(httpx.BaseTransport):
    """Takes a blocking client's requests to the application of a test client."""

    def __init__(self, served: TestClient) -> None:
        self._served = served

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        reply = self._served.request(
            request.method,
            str(request.url),
            headers=dict(request.headers),
            content=request.read(),
        )
        return httpx.Response(reply.status_code, headers=dict(reply.headers), content=reply.content)


class Losing(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Loses some requests: what `fails` raises is raised in place of a reply."""

    def __init__(self, inner: Any, fails: Callable[[], None]) -> None:
        self._inner, self._fails = inner, fails

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self._fails()
        return self._inner.handle_request(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._fails()
        return await self._inner.handle_async_request(request)


class Blocking:
    """`LossClient`, called in the thread of the test."""

    def __init__(self, served: TestClient, fails: Callable[[], None], **arguments: Any) -> None:
        http = httpx.Client(transport=Losing(Bridge(served), fails))
        self._client = LossClient("http://testserver", http=http, **arguments)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self._client, method)(*arguments, **options)

    def each(self, method: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        return getattr(self._client, method)(*arguments, **options)


class Asynchronous:
    """`AsyncLossClient`, on the event loop of the application."""

    def __init__(self, served: TestClient, fails: Callable[[], None], **arguments: Any) -> None:
        self._portal = served.portal
        application = httpx.ASGITransport(served.app, raise_app_exceptions=False)
        http = httpx.AsyncClient(transport=Losing(application, fails))
        self._client = AsyncLossClient("http://testserver", http=http, **arguments)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._portal.call(partial(getattr(self._client, method), *arguments, **options))

    def each(self, method: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        results = getattr(self._client, method)(*arguments, **options)
        try:
            while True:
                try:
                    yield self._portal.call(results.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            self._portal.call(results.aclose)


def _never_fails() -> None:
    pass


@pytest.fixture(params=[Blocking, Asynchronous])
def connect(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a client of either kind for an application."""

    def make(served: TestClient, fails: Callable[[], None] = _never_fails, **arguments: Any) -> Any:
        return request.param(served, fails, timing=AT_ONCE, **arguments)

    return make


@pytest.fixture
def caller(connect: Callable[..., Any], client: TestClient) -> Any:
    return connect(client)


@pytest.fixture(params=["json", "binary"])
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sends all ids on one wire, however few they are."""
    monkeypatch.setattr(_protocol, "JSON_UP_TO", 10**9 if request.param == "json" else -1)
    return str(request.param)


def expected_nlls(source: list[int], target: list[int]) -> list[float]:
    fed = [START, *target[:-1]]
    return [fake_nll(source, one, label) for one, label in zip(fed, target, strict=True)]


# ---------------------------------------------------------------- one request


def test_losses_are_those_of_the_model(caller: Any, wire: str) -> None:
    result = caller.call("loss", SOURCES, TARGETS, per_token=["token_nlls"])
    rows = [expected_nlls(*pair) for pair in zip(SOURCES, TARGETS, strict=True)]
    np.testing.assert_allclose(result.losses, [sum(row) for row in rows], rtol=1e-6)
    np.testing.assert_allclose(result.nlls, result.losses)
    assert result.num_tokens.tolist() == [2, 3, 1]
    np.testing.assert_allclose(result.token_nlls.values, np.concatenate(rows), rtol=1e-6)
    assert result.token_nlls.lengths.tolist() == [2, 3, 1]
    assert result.model == "fake"
    assert result.errors == ()
    assert result.aggregate.num_tokens == 6
    assert result.aggregate.nll == pytest.approx(sum(map(sum, rows)))
    assert (result.usage.source_tokens, result.usage.target_tokens) == (6, 6)
    assert result.request_id


def test_candidates_share_a_source(caller: Any, wire: str) -> None:
    result = caller.call("loss", [[5, 6]], TARGETS, source_index=[0, 0, 0])
    np.testing.assert_allclose(
        result.losses, [sum(expected_nlls([5, 6], target)) for target in TARGETS], rtol=1e-6
    )
    assert result.usage.encoded_sources == 1


OPTIONS: list[dict[str, Any]] = [
    {},
    {"per_token": ALL_PER_TOKEN},
    {"label_smoothing": 0.1, "per_token": ["token_losses"]},
    {"label_smoothing": 0.3, "smoothing": "uniform_excluding_target"},
    {"prefix_length": 1, "on_error": "partial", "per_token": ALL_PER_TOKEN},
    {"prefix_length": np.array([1, 2, 0]), "per_token": ["token_ranks"]},
    {"decoder_start_token_id": 3},
    {"decoder_start_token_id": [3, 4, 5]},
    {"pad_token_id": 5, "per_token": ["token_nlls"]},
    {"truncation": True},
    {"source_index": [2, 0, 1], "priority": "bulk", "reproducible": True, "timeout": 30.0},
]


def assert_same(one: LossResult, other: LossResult) -> None:
    """All but what differs by request: its id, its times and how it met others."""
    for field in dataclasses.fields(LossResult):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, Ragged):
            assert left.values.dtype == right.values.dtype, field.name
            assert left.values.tobytes() == right.values.tobytes(), field.name
            assert left.lengths.tolist() == right.lengths.tolist(), field.name
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            assert left.tobytes() == right.tobytes(), field.name
        elif field.name not in {"usage", "request_id"}:
            assert left == right, field.name


@pytest.mark.parametrize("targets", [TARGETS, [[1, 2], [3] * (MAX_TOKENS + 3), [6]], TOO_LARGE_ID])
@pytest.mark.parametrize("options", OPTIONS)
def test_both_wires_bring_the_same_bits(
    connect: Callable[..., Any],
    client: TestClient,
    options: dict[str, Any],
    targets: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for up_to in (10**9, -1):
        monkeypatch.setattr(_protocol, "JSON_UP_TO", up_to)
        caller = connect(client, model="fake")
        results.append(caller.call("loss", SOURCES, targets, **({"on_error": "partial"} | options)))
    assert_same(*results)
    if targets is TARGETS and "prefix_length" not in options:
        assert not results[0].errors
        assert np.isfinite(results[0].losses).all()


def test_a_bad_pair_fails_the_request_unless_told_otherwise(caller: Any, wire: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="has the id 50") as caught:
        caller.call("loss", SOURCES, TOO_LARGE_ID)
    (fault,) = caught.value.errors
    assert (fault.index, fault.code) == (1, "token_out_of_range")
    assert caught.value.request_id

    result = caller.call("loss", SOURCES, TOO_LARGE_ID, on_error="partial")
    assert [(error.index, error.code) for error in result.errors] == [(1, "token_out_of_range")]
    assert np.isnan(result.losses).tolist() == [False, True, False]
    assert result.num_tokens.tolist() == [2, 0, 1]
    scores = list(result.pairs())
    assert scores[1].error == result.errors[0]


def test_an_unknown_model_is_said(
    connect: Callable[..., Any], client: TestClient, wire: str
) -> None:
    with pytest.raises(errors.NotFound, match="fake"):
        connect(client, model="another").call("loss", SOURCES, TARGETS)


def test_of_several_models_one_must_be_named(
    connect: Callable[..., Any], make_client: Callable[..., TestClient], wire: str
) -> None:
    served = make_client({"a": fake_bundle(), "b": fake_bundle()}, load=lambda *_: FakeEngine())
    with pytest.raises(errors.InvalidRequest, match="several models are served"):
        connect(served).call("loss", SOURCES, TARGETS)
    assert connect(served, model="b").call("loss", SOURCES, TARGETS).model == "b"


def test_a_full_queue_is_said(
    connect: Callable[..., Any], make_client: Callable[..., TestClient], wire: str
) -> None:
    computing, let_go = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        computing.set()
        assert let_go.wait(60)

    served = make_client(engine=FakeEngine(hold), max_queue_tokens=6)
    caller = connect(served, model="fake", retries=0)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(
            served.post, "/loss", json={"source_ids": [[1, 2]], "target_ids": [[1, 2]]}
        )
        assert computing.wait(60)
        with pytest.raises(errors.Overloaded) as caught:
            caller.call("loss", [[3, 4]], [[5, 6]])
        let_go.set()
        assert first.result().status_code == 200
    assert caught.value.code == "overloaded"
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 1


def test_models_and_readiness(caller: Any) -> None:
    (model,) = caller.call("models")
    assert (model.name, model.state, model.engine) == ("fake", "ready", "torch")
    assert (model.max_source_tokens, model.decoder_start_token_id) == (MAX_TOKENS, START)
    assert model.details["num_classes"] == VOCABULARY_SIZE
    assert caller.call("ready") is True


def test_a_client_closes_only_what_it_opened() -> None:
    with httpx.Client() as given:
        with LossClient(http=given):
            pass
        assert not given.is_closed

    async def close() -> bool:
        async with httpx.AsyncClient() as given:
            async with AsyncLossClient(http=given):
                pass
            return given.is_closed

    assert asyncio.run(close()) is False


# ---------------------------------------------------------------- many requests


def numbered(count: int, size: int = 2) -> list[Chunk]:
    """Chunks whose losses tell them apart."""
    return [
        Chunk([[1 + (number + row) % 40] for row in range(size)], [[1 + number % 7, 2]] * size)
        for number in range(count)
    ]


def expected_losses(chunk: Chunk) -> list[float]:
    pairs = zip(chunk.sources, chunk.targets, strict=True)
    return [sum(expected_nlls(list(source), list(target))) for source, target in pairs]


def test_results_come_in_the_order_of_the_chunks(caller: Any, wire: str) -> None:
    chunks = numbered(40)
    results = list(caller.each("score_chunks", iter(chunks)))
    assert len(results) == 40
    for chunk, result in zip(chunks, results, strict=True):
        np.testing.assert_allclose(result.losses, expected_losses(chunk), rtol=1e-6)


def test_no_chunks_are_no_results(caller: Any) -> None:
    assert list(caller.each("score_chunks", [])) == []
    assert list(caller.each("score_iterable", [])) == []


def test_pairs_are_scored_in_order_and_bad_ones_say_why(caller: Any) -> None:
    pairs = [([1 + number % 40], [2, 1 + number % 30]) for number in range(25)]
    pairs[13] = ([1], [VOCABULARY_SIZE])
    scores = list(caller.each("score_iterable", iter(pairs), pairs_per_request=4))
    assert len(scores) == 25
    assert [number for number, score in enumerate(scores) if score.error] == [13]
    assert scores[13].error.code == "token_out_of_range"
    for number, score in enumerate(scores):
        if number != 13:
            assert score.loss == pytest.approx(sum(expected_nlls(*pairs[number])), rel=1e-6)
            assert score.num_tokens == 2


def test_the_input_is_read_as_it_is_needed(caller: Any) -> None:
    read = []

    def chunks() -> Iterator[Chunk]:
        for chunk in numbered(60):
            read.append(chunk)
            yield chunk

    given = 0
    with closing(caller.each("score_chunks", chunks(), max_requests=4)) as results:
        assert read == []
        for _ in results:
            given += 1
            # The one that was just given out is no longer ahead.
            assert len(read) <= given + 4
    assert given == len(read) == 60


def test_an_error_of_the_input_comes_after_the_results_before_it(caller: Any) -> None:
    def chunks() -> Iterator[Chunk]:
        yield from numbered(5)
        raise OSError("the disk is gone")

    results = caller.each("score_chunks", chunks())
    for chunk in numbered(5):
        np.testing.assert_allclose(next(results).losses, expected_losses(chunk), rtol=1e-6)
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)
    assert not client_threads()


def test_an_error_of_a_request_comes_after_the_results_before_it(caller: Any) -> None:
    chunks = numbered(8)
    chunks[5] = Chunk([[1]], [[VOCABULARY_SIZE]])
    results = caller.each("score_chunks", chunks, on_error="fail")
    for chunk in chunks[:5]:
        np.testing.assert_allclose(next(results).losses, expected_losses(chunk), rtol=1e-6)
    with pytest.raises(errors.InvalidRequest):
        next(results)
    assert not client_threads()


def test_a_chunk_that_cannot_be_sent_is_an_error_in_its_turn(caller: Any) -> None:
    chunks = [*numbered(3), Chunk([[1.5]], [[1]])]  # type: ignore[list-item]
    results = caller.each("score_chunks", chunks)
    for _ in range(3):
        next(results)
    with pytest.raises(TypeError, match="ids are integers"):
        next(results)


class Failures:
    """Raises for the first so many requests."""

    def __init__(self, count: int, error: Exception) -> None:
        self._left, self._error = count, error
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left >= 0:
                raise self._error


def test_a_service_that_is_away_for_a_while_is_waited_for(
    connect: Callable[..., Any], client: TestClient
) -> None:
    caller = connect(client, Failures(30, httpx.ConnectError("connection refused")), retries=0)
    assert len(list(caller.each("score_chunks", numbered(6)))) == 6


def test_a_service_that_stays_away_is_an_error(
    connect: Callable[..., Any], client: TestClient
) -> None:
    gone = Failures(10**9, httpx.ConnectError("connection refused"))
    results = connect(client, gone, retries=2).each("score_chunks", numbered(6), retry_for=0.0)
    with pytest.raises(errors.ConnectionFailed, match="connection refused"):
        next(results)
    assert not client_threads()


def test_a_connection_that_breaks_is_made_again(
    connect: Callable[..., Any], client: TestClient, wire: str
) -> None:
    broken = Failures(2, httpx.RemoteProtocolError("server disconnected"))
    result = connect(client, broken, model="fake").call("loss", SOURCES, TARGETS)
    assert result.num_tokens.tolist() == [2, 3, 1]


def client_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("seqloss-client")]


# ---------------------------------------------------------------- closing early


class HangingService:
    """Answers the source [1] once another one came; of all others it notes that they left."""

    def __init__(self) -> None:
        self.arrived, self.left = threading.Event(), threading.Event()
        reply = GOOD.body
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if json.loads(body)["source_ids"] == [[1]]:
                    assert service.arrived.wait(60)
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(reply)))
                    self.end_headers()
                    self.wfile.write(reply)
                    return
                service.arrived.set()
                self.rfile.read(1)  # until the client closes
                service.left.set()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def hanging() -> Iterator[HangingService]:
    with closing(HangingService()) as service:
        yield service


def test_closing_early_ends_what_is_under_way(hanging: HangingService) -> None:
    chunks = [Chunk([[number]], [[1]]) for number in range(1, 50)]
    with LossClient(hanging.address) as client:
        results = client.score_chunks(iter(chunks))
        assert next(results).losses.tolist() == [1.0]
        results.close()
        assert not client_threads()
    assert hanging.left.wait(60)


def test_closing_early_ends_tasks(hanging: HangingService) -> None:
    chunks = [Chunk([[number]], [[1]]) for number in range(1, 50)]

    async def score_one() -> int:
        async with AsyncLossClient(hanging.address) as client:
            results = client.score_chunks(chunks)
            assert (await anext(results)).losses.tolist() == [1.0]
            await results.aclose()
            return len(asyncio.all_tasks()) - 1  # but this one

    assert asyncio.run(score_one()) == 0
    assert hanging.left.wait(60)


def test_closing_early_ends_pauses() -> None:
    """A thread that waits before it tries again does not wait to the end."""
    paused = threading.Event()

    def refuse(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["source_ids"] == [[1]]:
            assert paused.wait(60)
            return httpx.Response(200, content=GOOD.body)
        paused.set()
        return httpx.Response(503, headers={"Retry-After": "100"})

    chunks = [Chunk([[number]], [[1]]) for number in range(1, 4)]
    with httpx.Client(transport=httpx.MockTransport(refuse)) as http:
        results = LossClient(http=http).score_chunks(chunks)
        next(results)
        results.close()
    assert not client_threads()


# ---------------------------------------------------------------- keys

KEY = "a-key-of-sixteen-and-more"


def test_a_service_with_keys_is_told_the_key(
    connect: Callable[..., Any],
    make_client: Callable[..., TestClient],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the argument, or else by the environment."""
    (tmp_path / "keys.toml").write_text(f'[tenants.a]\nkeys = ["{KEY}"]\npriorities = ["bulk"]')
    served = make_client(api_keys_file=tmp_path / "keys.toml")
    with pytest.raises(errors.Unauthorized):
        connect(served).call("loss", SOURCES, TARGETS)
    client = connect(served, api_key=KEY)
    assert len(client.call("loss", SOURCES, TARGETS, priority="bulk").losses) == len(TARGETS)
    with pytest.raises(errors.Forbidden):
        client.call("loss", SOURCES, TARGETS, priority="interactive")
    monkeypatch.setenv("SEQLOSS_API_KEY", KEY)
    assert connect(served).call("models")
    with pytest.raises(errors.Unauthorized):
        connect(served, api_key="wrong").call("models")


# ---------------------------------------------------------------- strings


SOURCE = "Thursday, March 5, 2026 at 4:05 PM"
CANDIDATES = ["Donnerstag, 5. März 2026 um 16:05", "Donnerstag, 5. März 2026 um 15:05"]
# The same as the demo model's ids, as its documentation has them.
SOURCE_IDS = [3, 335, 8, 229, 93, 17, 8, 93, 14, 12, 14, 18, 114, 93, 16, 22, 12, 17, 110, 1]
CANDIDATE_IDS = [
    [522, 8, 93, 17, 10, 274, 93, 14, 12, 14, 18, 172, 93, 13, last, 22, 12, 17, 1]
    for last in (18, 17)
]


@pytest.fixture
def demo(
    connect: Callable[..., Any],
    make_client: Callable[..., TestClient],
    bundle_of: Callable[[str], Any],
) -> Any:
    return connect(make_client({"demo": bundle_of("demo")}))


def test_strings_have_the_losses_of_their_ids_and_their_tokens(demo: Any) -> None:
    by_ids = demo.call(
        "loss", [SOURCE_IDS], CANDIDATE_IDS, source_index=[0, 0], per_token=["token_losses"]
    )
    result = demo.call(
        "loss_text",
        [SOURCE],
        CANDIDATES,
        source_index=[0, 0],
        target_language="de",
        per_token=["token_losses"],
        tokens=True,
    )
    np.testing.assert_allclose(result.losses, by_ids.losses, rtol=1e-5)
    np.testing.assert_allclose(
        result.token_losses.values, by_ids.token_losses.values, rtol=1e-3, atol=1e-6
    )
    assert [len(row) for row in result.target_tokens] == list(map(len, CANDIDATE_IDS))
    assert [len(row) for row in result.source_tokens] == [len(SOURCE_IDS)]
    for text, spans in zip(CANDIDATES, result.target_offsets, strict=True):
        covered = {place for span in spans if span for place in range(*span)}
        assert {place for place, letter in enumerate(text) if letter != " "} <= covered


def test_strings_are_scored_in_order(demo: Any) -> None:
    pairs = [(SOURCE, candidate) for candidate in CANDIDATES] * 5
    whole = demo.call("loss_text", [SOURCE], CANDIDATES, source_index=[0, 0], target_language="de")
    assert whole.target_tokens is None
    scores = list(
        demo.each("score_iterable", iter(pairs), pairs_per_request=4, target_language="de")
    )
    np.testing.assert_allclose(
        [score.loss for score in scores], whole.losses.tolist() * 5, rtol=1e-5
    )


# ---------------------------------------------------------------- a service of its own


def test_a_run_survives_that_the_service_is_killed(
    serve: Callable[..., Server], bundle_of: Callable[[str], Any]
) -> None:
    bundle = f"demo={bundle_of('demo').folder}"
    first = serve(bundle)
    with first.client() as http:
        address, port = first.address, http.base_url.port
        assert http.get("/health/ready").status_code == 200

    def chunks() -> Iterator[Chunk]:
        yield from numbered(10, size=50)
        first.process.kill()
        first.process.wait()
        serve(bundle, port=port)  # it loads while the client already asks
        yield from numbered(10, size=50)

    with LossClient(address) as client:
        results = list(client.score_chunks(chunks(), reproducible=True))
    assert len(results) == 20
    for before, after in zip(results[:10], results[10:], strict=True):
        assert_same(before, after)
