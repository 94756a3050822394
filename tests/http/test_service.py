"""The service around the model: queue, time, health, shutdown, headers, metrics."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_bad_requests import GOOD, assert_alive, assert_problem, poisoned

from fakes import START, FakeEngine, fake_bundle, fake_nll
from seqloss.bundle.manifest import Languages
from seqloss.errors import EngineDeadError, OutOfMemoryError, SelfTestError
from seqloss.http.schemas import LossReply
from seqloss.records import Batch


class HeldEngine(FakeEngine):
    """Waits in its first batch until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()
        super().__init__(self._wait)

    def _wait(self, _: Batch) -> None:
        self.entered.set()
        assert self.let_go.wait(30)


@pytest.fixture
def held() -> Iterator[HeldEngine]:
    engine = HeldEngine()
    yield engine
    engine.let_go.set()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def occupy(service: Any, engine: HeldEngine, threads: ThreadPoolExecutor) -> Future[Any]:
    """Sends a request and returns once the engine is busy with it."""
    future = threads.submit(service.post, "/loss", json=GOOD)
    assert engine.entered.wait(30)
    return future


def metric(service: Any, name: str, **labels: str) -> float:
    """A sample's value on /metrics, 0 where it is not there yet."""
    for family in text_string_to_metric_families(service.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return 0.0


def wait_for(service: Any, name: str, value: float, **labels: str) -> None:
    """Returns once a metric has a value; the test's time limit ends it otherwise."""
    while metric(service, name, **labels) != value:
        pass


# ---------------------------------------------------------------- queue and time


def test_a_full_queue_is_a_429_that_says_when_to_come_back(
    make_client: Any, held: HeldEngine, threads: ThreadPoolExecutor
) -> None:
    service = make_client(engine=held, max_queue_tokens=6)
    first = occupy(service, held, threads)  # holds 4 of 6 tokens
    response = service.post("/loss", json=GOOD)
    problem = assert_problem(response, 429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    assert problem["retry_after_ms"] >= 1000
    held.let_go.set()
    assert first.result().status_code == 200
    assert_alive(service)
    assert metric(service, "seqloss_queue_tokens", model="fake") == 0
    assert metric(service, "seqloss_rejected_total", code="overloaded") == 1


def test_a_passed_deadline_is_a_504_and_frees_its_tokens(
    make_client: Any, held: HeldEngine, threads: ThreadPoolExecutor
) -> None:
    service = make_client(engine=held)
    first = occupy(service, held, threads)
    response = service.post("/loss", json=GOOD | {"timeout_ms": 20})
    assert_problem(response, 504, "deadline_exceeded")
    assert metric(service, "seqloss_queue_tokens", model="fake") == 4
    held.let_go.set()
    assert first.result().status_code == 200
    assert_alive(service)
    assert len(held.batches) == 2, "a pair whose deadline passed was computed"


def test_requests_that_wait_together_share_a_batch_and_equal_sources(
    make_client: Any, held: HeldEngine, threads: ThreadPoolExecutor
) -> None:
    service = make_client(engine=held)
    first = occupy(service, held, threads)
    bodies = [{"source_ids": [[7, 8]], "target_ids": [[label, 2]]} for label in (10, 11, 12, 13)]
    waiting = [threads.submit(service.post, "/loss", json=body) for body in bodies]
    wait_for(service, "seqloss_queue_pairs", 4, model="fake")
    held.let_go.set()
    replies = [future.result().json() for future in waiting]
    for body, reply in zip(bodies, replies, strict=True):
        label = body["target_ids"][0][0]
        expected = fake_nll([7, 8], START, label) + fake_nll([7, 8], label, 2)
        assert reply["losses"] == pytest.approx([expected])
    assert first.result().status_code == 200
    assert [len(batch.labels) for batch in held.batches] == [2, 8]
    assert len(held.batches[1].sources) == 1
    assert metric(service, "seqloss_encoder_reuse_total", model="fake") == 3


def test_interactive_requests_pass_bulk_ones_and_do_not_starve_them(
    make_client: Any, held: HeldEngine, threads: ThreadPoolExecutor
) -> None:
    service = make_client(engine=held, max_batch_pairs=1)
    first = occupy(service, held, threads)
    bulk = {"source_ids": [[9]] * 3, "target_ids": [[40, 2]] * 3, "priority": "bulk"}
    waiting = [threads.submit(service.post, "/loss", json=bulk)]
    wait_for(service, "seqloss_queue_pairs", 3, model="fake")
    interactive = {"source_ids": [[9]] * 8, "target_ids": [[30, 2]] * 8}
    waiting.append(threads.submit(service.post, "/loss", json=interactive))
    wait_for(service, "seqloss_queue_pairs", 11, model="fake")
    held.let_go.set()
    assert [future.result().status_code for future in (first, *waiting)] == [200] * 3
    order = ["bulk" if batch.labels[0] == 40 else "interactive" for batch in held.batches[1:]]
    assert order[:10] == [*["interactive"] * 4, "bulk", *["interactive"] * 4, "bulk"]


def test_a_client_that_goes_away_is_forgotten(
    make_client: Any, held: HeldEngine, threads: ThreadPoolExecutor
) -> None:
    service = make_client(engine=held)
    first = occupy(service, held, threads)
    service.portal.call(vanish_after_sending, service.app, "/loss", json.dumps(GOOD).encode())
    assert metric(service, "seqloss_cancelled_pairs_total", model="fake") == 1
    assert metric(service, "seqloss_queue_tokens", model="fake") == 4
    held.let_go.set()
    assert first.result().status_code == 200
    assert_alive(service)
    assert len(held.batches) == 2, "a pair that nobody waits for was computed"


async def vanish_after_sending(app: Any, path: str, body: bytes) -> None:
    """Speaks ASGI as a server whose client closes the connection after its request."""
    messages = [
        {"type": "http.request", "body": body, "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(_: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "app": app,
    }
    await app(scope, receive, send)


# ---------------------------------------------------------------- engines that fail


def test_a_batch_that_does_not_fit_is_halved_until_it_does(make_client: Any) -> None:
    def refuse_large(batch: Batch) -> None:
        if len(batch.decoder_input_ids) > 2:
            raise OutOfMemoryError("too many")

    engine = FakeEngine(refuse_large)
    service = make_client(engine=engine)
    body = {"source_ids": [[index] for index in range(9)], "target_ids": [[5, 2]] * 9}
    reply = service.post("/loss", json=body).json()
    expected = [fake_nll([index], START, 5) + fake_nll([index], 5, 2) for index in range(9)]
    assert reply["losses"] == pytest.approx(expected)
    assert metric(service, "seqloss_oom_total", model="fake") > 0


def test_a_single_pair_that_does_not_fit_fails_alone(make_client: Any) -> None:
    def refuse_long(batch: Batch) -> None:
        if batch.decoder_input_ids.lengths.max() > 3:
            raise OutOfMemoryError("too long")

    service = make_client(engine=FakeEngine(refuse_long))
    body = {"source_ids": [[3], [4], [5]], "target_ids": [[5, 2], [6] * 4, [7, 2]]}
    problem = assert_problem(service.post("/loss", json=body), 413, "out_of_memory")
    assert [fault["index"] for fault in problem["errors"]] == [1]
    reply = service.post("/loss", json=body | {"on_error": "partial"}).json()
    assert [loss is None for loss in reply["losses"]] == [False, True, False]
    assert [(fault["index"], fault["code"]) for fault in reply["errors"]] == [(1, "out_of_memory")]
    assert_alive(service)


def test_a_bug_is_a_500_whose_cause_is_in_the_log(
    make_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_once(_: Batch) -> None:
        if len(engine.batches) == 1:
            raise ZeroDivisionError("a secret of the implementation")

    engine = FakeEngine(fail_once)
    service = make_client(engine=engine)
    response = service.post("/loss", json=GOOD, headers={"X-Request-ID": "find-me"})
    problem = assert_problem(response, 500, "internal_error")
    assert "find-me" in problem["detail"]
    assert "secret" not in response.text
    assert "a secret of the implementation" in caplog.text
    assert "find-me" in caplog.text
    assert_alive(service)


def test_a_dead_engine_answers_everybody_and_ends_the_process(
    make_client: Any, threads: ThreadPoolExecutor
) -> None:
    entered, let_go = threading.Event(), threading.Event()

    def die(_: Batch) -> None:
        entered.set()
        assert let_go.wait(30)
        raise EngineDeadError("the device fell off the bus")

    fatal: list[Exception] = []
    service = make_client(engine=FakeEngine(die), on_fatal=fatal.append)
    waiting = [threads.submit(service.post, "/loss", json=GOOD)]
    assert entered.wait(30)
    waiting += [threads.submit(service.post, "/loss", json=GOOD) for _ in range(3)]
    wait_for(service, "seqloss_queue_pairs", 3, model="fake")
    let_go.set()
    for future in waiting:
        problem = assert_problem(future.result(), 503, "engine_dead")
        assert problem["retry_after_ms"] > 0
    assert_problem(service.post("/loss", json=GOOD), 503, "engine_dead")
    assert_problem(service.get("/health/live"), 503, "not_ready")
    assert "fell off the bus" in service.get("/health/ready").json()["detail"]
    assert [type(error) for error in fatal] == [EngineDeadError]


# ---------------------------------------------------------------- from loading to draining


def test_a_loading_service_answers_and_is_not_ready(make_client: Any) -> None:
    let_go = threading.Event()

    def load(*_: Any) -> FakeEngine:
        assert let_go.wait(30)
        return FakeEngine()

    service = make_client({"fake": fake_bundle()}, load=load, wait=False)
    problem = assert_problem(service.get("/health/ready"), 503, "not_ready")
    assert "being loaded" in problem["detail"]
    response = service.post("/loss", json=GOOD)
    assert_problem(response, 503, "not_ready")
    assert response.headers["retry-after"] == "1"
    assert service.get("/health/live").json() == {"status": "live"}
    (model,) = service.get("/models").json()["models"]
    assert model["state"] == "loading"
    assert model["engine"] is model["device"] is model["precision"] is None
    assert [graph["precision"] for graph in model["graphs"]] == ["float32"]
    assert metric(service, "seqloss_ready", model="fake") == 0
    let_go.set()
    while service.get("/health/ready").status_code != 200:
        pass
    assert service.get("/models/fake").json()["precision"] == "float32"
    assert metric(service, "seqloss_ready", model="fake") == 1
    assert_alive(service)


def test_a_model_loaded_while_the_service_shuts_down_stays_unready(make_client: Any) -> None:
    let_go = threading.Event()
    engine = FakeEngine()

    def load(*_: Any) -> FakeEngine:
        assert let_go.wait(30)
        return engine

    service = make_client({"fake": fake_bundle()}, load=load, wait=False)
    runtime = service.app.state.models["fake"]
    service.portal.call(runtime.drain)
    let_go.set()
    service.portal.call(asyncio.wait_for, service.app.state.loading, 30)
    assert "shutting down" in service.get("/health/ready").json()["detail"]
    assert_problem(service.post("/loss", json=GOOD), 503, "not_ready")
    service.portal.call(runtime.close)
    assert engine.closed


def test_a_model_that_fails_its_self_test_never_serves(make_client: Any) -> None:
    def load(*_: Any) -> FakeEngine:
        raise SelfTestError("off by 1 nat")

    fatal: list[Exception] = []
    service = make_client({"fake": fake_bundle()}, load=load, on_fatal=fatal.append)
    assert "off by 1 nat" in service.get("/health/ready").json()["detail"]
    assert_problem(service.post("/loss", json=GOOD), 503, "not_ready")
    assert service.get("/health/live").status_code == 503
    assert [type(error) for error in fatal] == [SelfTestError]


def test_a_timeout_counts_from_the_arrival(client: Any) -> None:
    """Parsing counts too: a microsecond is over before anything is queued."""
    response = client.post("/loss", json=GOOD | {"timeout_ms": 0.001})
    assert_problem(response, 504, "deadline_exceeded")


def test_health_answers_to_head(client: Any) -> None:
    for path in ("/health/live", "/health/ready"):
        assert client.head(path).status_code == 200


def test_shutting_down_finishes_what_was_admitted(
    make_client: Any, held: HeldEngine, threads: ThreadPoolExecutor
) -> None:
    service = make_client(engine=held)
    first = occupy(service, held, threads)
    second = threads.submit(service.post, "/loss", json=GOOD)
    wait_for(service, "seqloss_queue_pairs", 1, model="fake")
    runtime = service.app.state.models["fake"]
    draining = threads.submit(service.portal.call, runtime.drain)
    while service.get("/health/ready").status_code == 200:
        pass
    response = service.post("/loss", json=GOOD)
    assert_problem(response, 503, "not_ready")
    assert "retry-after" in response.headers
    assert not held.closed
    held.let_go.set()
    draining.result()
    assert [future.result().status_code for future in (first, second)] == [200, 200]
    service.portal.call(runtime.close)
    assert held.closed


# ---------------------------------------------------------------- headers, replies, metrics


def test_request_ids_are_taken_over_only_where_they_are_harmless(client: Any) -> None:
    def answered(sent: str) -> str:
        return str(
            client.get("/health/live", headers={"X-Request-ID": sent}).headers["x-request-id"]
        )

    assert answered("abc-1.2_3") == "abc-1.2_3"
    for harmful in ("a b", "x" * 129, "a\tb", "<script>"):
        assert answered(harmful) not in ("", harmful)


def test_server_timing_names_the_stages(client: Any) -> None:
    header = client.post("/loss", json=GOOD).headers["server-timing"]
    stages = dict(part.split(";dur=") for part in header.split(", "))
    assert list(stages) == ["parse", "queue", "compute", "total"]
    assert float(stages["total"]) >= float(stages["compute"]) > 0


def test_a_reply_has_the_documented_shape_and_only_what_was_asked_for(client: Any) -> None:
    names = ["token_losses", "token_nlls", "token_ranks", "token_entropies"]
    body = {
        "source_ids": [[3, 4], [5]],
        "target_ids": [[6, 7, 2], [8, 99]],
        "on_error": "partial",
        "label_smoothing": 0.1,
    }
    full = client.post("/loss", json=body | {"return": names}).json()
    LossReply.model_validate(full)
    assert full["token_ranks"][0] == [round(nll * 10) for nll in full["token_nlls"][0]]
    assert full["usage"]["source_tokens"] == 3
    assert full["usage"]["target_tokens"] == 5
    assert full["usage"]["encoded_sources"] == 1
    plain = client.post("/loss", json=body).json()
    assert not set(names) & plain.keys()
    engine_asked = [plain[name] for name in ("losses", "nlls", "num_tokens")]
    assert engine_asked == [full[name] for name in ("losses", "nlls", "num_tokens")]


def test_what_is_not_asked_for_is_not_computed(make_client: Any) -> None:
    engine = FakeEngine()
    service = make_client(engine=engine)
    service.post("/loss", json=GOOD | {"return": ["token_losses", "token_nlls"]})
    service.post("/loss", json=GOOD | {"return": ["token_ranks"]})
    assert [batch.with_ranks_and_entropies for batch in engine.batches] == [False, True]


def test_an_empty_request_has_an_empty_answer(client: Any) -> None:
    reply = client.post("/loss", json={"source_ids": [], "target_ids": []}).json()
    assert reply["losses"] == []
    assert reply["aggregate"]["num_pairs"] == 0
    assert reply["aggregate"]["mean_loss"] is None


def test_a_large_request_is_answered_like_a_small_one(make_client: Any) -> None:
    """Above 64 KiB and 50,000 tokens other threads parse, check, reduce and encode it."""
    service = make_client(max_batch_tokens=2_000)
    num_pairs = 5_000
    body = {
        "source_ids": [[index % 47] for index in range(num_pairs)],
        "target_ids": [[index % 43] * 9 + [2] for index in range(num_pairs)],
        "return": ["token_nlls"],
    }
    reply = service.post("/loss", json=body).json()
    for index in range(0, num_pairs, 371):
        source, label = index % 47, index % 43
        expected = [
            fake_nll([source], START, label),
            *[fake_nll([source], label, label)] * 8,
            fake_nll([source], label, 2),
        ]
        assert reply["token_nlls"][index] == pytest.approx(expected)
        assert reply["losses"][index] == pytest.approx(sum(expected))
    assert reply["aggregate"]["loss"] == pytest.approx(sum(reply["losses"]))
    assert reply["usage"]["batches"] > 10


def test_a_perplexity_beyond_float64_is_null(make_client: Any) -> None:
    service = make_client(engine=poisoned(13, -800.0))
    reply = service.post("/loss", json={"source_ids": [[3]], "target_ids": [[13]]}).json()
    assert reply["losses"] == [800.0]
    assert reply["perplexities"] == [None]
    assert reply["aggregate"]["perplexity"] is None


def test_large_replies_are_compressed_when_asked(client: Any) -> None:
    body = {"source_ids": [[3]] * 500, "target_ids": [[5, 2]] * 500}
    response = client.post("/loss", json=body, headers={"Accept-Encoding": "gzip"})
    assert response.headers["content-encoding"] == "gzip"
    assert len(response.json()["losses"]) == 500
    plain = client.post("/loss", json=body, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers


def test_models_say_what_is_served(client: Any) -> None:
    (model,) = client.get("/models").json()["models"]
    assert model == client.get("/models/fake").json()
    assert model["state"] == "ready"
    assert (model["engine"], model["device"], model["precision"]) == ("torch", "cpu", "float32")
    assert (model["decoder_start_token_id"], model["num_classes"]) == (START, 50)
    assert (model["max_source_tokens"], model["max_target_tokens"]) == (12, 12)
    assert model["graphs"] == [
        {"engine": "torch", "precision": "float32", "max_error": 0.0, "mean_error": 0.0}
    ]
    assert model["languages"] is None


def test_models_list_all_graphs_with_their_errors(make_client: Any) -> None:
    errors = {"float32": (1e-6, 2e-7), "bfloat16": (0.125, 0.03), "float16": (0.01, 0.002)}
    (graph,) = fake_bundle().manifest.graphs
    graphs = [
        graph.model_copy(update={"precision": precision, "max_error": largest, "mean_error": mean})
        for precision, (largest, mean) in errors.items()
    ]
    service = make_client({"fake": fake_bundle(graphs=graphs)}, load=lambda *_: FakeEngine())
    model = service.get("/models/fake").json()
    assert {
        shown["precision"]: (shown["max_error"], shown["mean_error"]) for shown in model["graphs"]
    } == errors
    assert [shown["engine"] for shown in model["graphs"]] == ["torch"] * 3
    assert model["precision"] == "float32", "what runs, of all that it holds"


def test_models_list_their_languages(make_client: Any) -> None:
    ids = {"de_DE": 40, "en_XX": 41}
    languages = Languages(ids=ids, source="last", target="decoder_start")
    bundles = {"many": fake_bundle(languages=languages), "one": fake_bundle()}
    service = make_client(bundles, load=lambda *_: FakeEngine())
    shown = {model["name"]: model["languages"] for model in service.get("/models").json()["models"]}
    assert shown == {
        "many": {"ids": ids, "source": "last", "target": "decoder_start"},
        "one": None,
    }


def test_metrics_count_what_was_done(client: Any) -> None:
    body = {
        "source_ids": [[3, 4], [5]],
        "target_ids": [[6, 7, 2], [8], [99]],
        "source_index": [0, 1, 1],
        "on_error": "partial",
    }
    client.post("/loss", json=body)
    assert metric(client, "seqloss_pairs_total", model="fake", outcome="scored") == 2
    assert metric(client, "seqloss_pairs_total", model="fake", outcome="token_out_of_range") == 1
    assert metric(client, "seqloss_batches_total", model="fake", reason="idle") == 1
    assert metric(client, "seqloss_tokens_total", side="target", kind="real") == 4
    assert metric(client, "seqloss_tokens_total", side="target", kind="padding") == 2
    assert metric(client, "seqloss_tokens_total", side="source", kind="padding") == 1
    assert metric(client, "seqloss_token_nll_count", model="fake", stream="other") == 4
    assert metric(client, "seqloss_pair_mean_nll_count", model="fake", stream="other") == 2
    assert metric(client, "seqloss_build_info", model="fake", engine="torch") == 1
    route = {"route": "/loss", "method": "POST", "status": "200"}
    assert metric(client, "seqloss_http_request_duration_seconds_count", **route) == 1


def test_token_nll_buckets_hold_what_is_at_most_their_bound(make_client: Any) -> None:
    service = make_client(engine=poisoned(13, -1.0))
    service.post("/loss", json={"source_ids": [[3]], "target_ids": [[13]]})
    assert metric(service, "seqloss_token_nll_bucket", le="0.75") == 0
    assert metric(service, "seqloss_token_nll_bucket", le="1.0") == 1
    assert metric(service, "seqloss_token_nll_sum", model="fake") == 1.0


def test_hostile_names_make_no_labels(client: Any) -> None:
    for number in range(20):
        client.get(f"/nothing-{number}")
        client.request(f"VERB{number}", "/loss")
        client.post("/loss", json=GOOD, headers={"X-Seqloss-Stream": f"stream-{number}"})
    text = client.get("/metrics").text
    assert "nothing-" not in text
    assert "VERB" not in text
    assert "stream-" not in text
    assert metric(client, "seqloss_http_request_duration_seconds_count", route="unmatched") == 20


def test_an_allowed_stream_is_a_label(make_client: Any) -> None:
    service = make_client(streams=("news",))
    service.post("/loss", json=GOOD, headers={"X-Seqloss-Stream": "news"})
    assert metric(service, "seqloss_token_nll_count", stream="news") == 2


def test_openmetrics_is_spoken_to_those_who_ask(client: Any) -> None:
    response = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_the_schema_shows_a_body_that_works(make_client: Any, bundle_of: Any) -> None:
    client = make_client({"demo": bundle_of("demo")})
    operation = client.get("/openapi.json").json()["paths"]["/loss"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert client.post("/loss", json=body["examples"][0]).status_code == 200
    text = json.dumps(client.get("/openapi.json").json())
    assert "#/$defs" not in text, "a reference that leads nowhere"
    assert set(operation["responses"]) == {
        *("200", "400", "401", "403", "404", "408", "413", "415", "422", "429", "500", "503", "504")
    }
