"""The service on Ray Serve, with replicas that are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray_cluster import actor_processes, random_pairs

from seqloss.bundle.reader import Bundle
from seqloss.distributed.ray_serve import application
from seqloss_client import Chunk, LossClient

PORT, OPERATORS_PORT = 18231, 18300
NUM_REPLICAS = 2


@pytest.fixture(scope="module")
def service(bundle: Bundle) -> Iterator[str]:
    """Two replicas, each with a thread, as a file would have them; the URL of their proxy."""
    arguments = {
        "models": {"demo": str(bundle.folder)},
        "settings": {
            "device": "cpu",
            "precision": "float32",
            "threads": 1,
            "admin_port": OPERATORS_PORT,
            "max_queue_tokens": 200_000,
        },
    }
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    built = call_user_app_builder_with_args_if_necessary(application, arguments)
    deployment = built._bound_deployment.options(
        num_replicas=NUM_REPLICAS,
        ray_actor_options={"num_cpus": 0.5},
        health_check_period_s=1,
    )
    serve.run(deployment.bind(*built._bound_deployment.init_args), name="seqloss")
    yield f"http://127.0.0.1:{PORT}"
    serve.shutdown()


def metrics_of(port: int) -> dict[str, float]:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def operators_ports() -> list[int]:
    found = []
    for port in range(OPERATORS_PORT, OPERATORS_PORT + 8):
        try:
            httpx.get(f"http://127.0.0.1:{port}/health/live")
        except httpx.ConnectError:
            continue
        found.append(port)
    return found


def test_a_replica_takes_requests_once_its_model_is_ready(service: str) -> None:
    with httpx.Client(base_url=service) as client:
        assert {client.get("/health/ready").status_code for _ in range(20)} == {200}


def test_losses_are_those_of_a_plain_service(
    service: str, expected: Callable[..., list[float]]
) -> None:
    sources, targets = random_pairs(600)
    with LossClient(service) as client:
        chunks = [(sources[at : at + 50], targets[at : at + 50]) for at in range(0, 600, 50)]
        nlls = [
            nll
            for their_sources, their_targets in chunks
            for nll in client.loss(their_sources, their_targets, reproducible=True).nlls
        ]
    assert nlls == expected(sources, targets)


def test_each_replica_has_metrics_of_its_own_and_the_proxy_has_none(service: str) -> None:
    ports = operators_ports()
    assert len(ports) == NUM_REPLICAS
    before = sum(metrics_of(port).get("seqloss_pairs_total", 0) for port in ports)
    with LossClient(service) as client:
        for _ in range(8):
            client.loss([[5, 6, 7]] * 3, [[8], [9], [10]])
    after = sum(metrics_of(port)["seqloss_pairs_total"] for port in ports)
    assert after - before == 24
    assert httpx.get(f"{service}/metrics").status_code == 404


def test_a_bad_request_is_answered_as_everywhere(service: str) -> None:
    reply = httpx.post(f"{service}/loss", json={"source_ids": [[1]], "target_ids": [[10**6]]})
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["errors"][0]["code"] == "token_out_of_range"


def test_a_full_queue_says_when_to_come_again(service: str) -> None:
    sources = [[5 + index % 80] * 30 for index in range(3000)]
    replies: list[httpx.Response] = []

    def ask(seed: int) -> None:
        body = {"source_ids": sources, "target_ids": [[seed + 3, *row] for row in sources]}
        replies.append(httpx.post(f"{service}/loss", json=body, timeout=120))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [reply for reply in replies if reply.status_code == 429]
    assert {reply.status_code for reply in replies} == {200, 429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert all(reply.json()["code"] == "overloaded" for reply in refused)


@pytest.mark.parametrize("request_id", [None, "mine"])
def test_a_request_has_one_id(service: str, request_id: str | None) -> None:
    headers = {"X-Request-ID": request_id} if request_id else {}
    reply = httpx.get(f"{service}/models", headers=headers)
    assert len(reply.headers.get_list("x-request-id")) == 1
    if request_id:
        assert reply.headers["x-request-id"] == request_id


class Killer(threading.Thread):
    """Kills a replica whenever all are there, so many times."""

    def __init__(self, wanted: int) -> None:
        super().__init__(daemon=True)
        self.wanted = wanted
        self.kills = 0

    def run(self) -> None:
        while self.kills < self.wanted:
            replicas = actor_processes("ServeReplica:seqloss")
            if len(replicas) == NUM_REPLICAS:
                os.kill(replicas[self.kills % NUM_REPLICAS], signal.SIGKILL)
                self.kills += 1
            time.sleep(1)


def test_no_request_is_lost_when_replicas_are_killed(
    service: str, expected: Callable[..., list[float]], pytestconfig: pytest.Config
) -> None:
    sources, targets = random_pairs(400, seed=5)
    right = expected(sources, targets)
    killer = Killer(pytestconfig.getoption("--kills"))
    killer.start()
    with LossClient(service, retries=30) as client:
        rounds = 0
        while killer.is_alive() or rounds == 0:
            chunks = (
                Chunk(sources[at : at + 20], targets[at : at + 20]) for at in range(0, 400, 20)
            )
            results = client.score_chunks(chunks, max_requests=4, reproducible=True)
            assert [nll for result in results for nll in result.nlls] == right
            rounds += 1
    assert killer.kills == killer.wanted


def test_what_was_asked_before_the_end_is_answered(service: str) -> None:
    """The last one: it ends the service."""
    sources, targets = random_pairs(2500, seed=9)  # twice as many fit a queue
    body = {"source_ids": sources, "target_ids": targets}
    try:
        with httpx.Client(base_url=service, timeout=60) as client, ThreadPoolExecutor(2) as threads:
            replies = [threads.submit(client.post, "/loss", json=body) for _ in range(2)]
            while _num_in_flight() < 2:
                assert not any(reply.done() for reply in replies), "it was not asked in time"
            serve.delete("seqloss")
            assert [reply.result().status_code for reply in replies] == [200, 200]
    finally:
        serve.shutdown()


def _num_in_flight() -> float:
    return sum(metrics_of(port)["seqloss_inflight_requests"] for port in operators_ports())
