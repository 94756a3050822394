"""The service on Ray Serve, and datasets on Ray Data, with processes that are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray_cluster import actor_processes, ray_cluster

from seqloss.bundle.reader import Bundle
from seqloss.distributed.ray_data import Pool, Progress, score_dataset
from seqloss.distributed.ray_serve import application
from seqloss.distributed.workers import PairScorer, Work
from seqloss.errors import ConfigurationError
from seqloss.http.app import create_app
from seqloss.settings import Settings
from seqloss_client import Chunk, LossClient

# One Ray for all of it; `make test` runs this file by itself.
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PORT, OPERATORS_PORT = 18231, 18300
NUM_REPLICAS = 2
VOCABULARY = 90


@pytest.fixture(scope="module")
def bundle(export_once: Callable[..., Bundle]) -> Bundle:
    return export_once("demo", "torch")


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with ray_cluster():
        yield


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


def random_pairs(number: int, seed: int = 3) -> tuple[list[list[int]], list[list[int]]]:
    generator = np.random.default_rng(seed)

    def rows() -> list[list[int]]:
        return [
            generator.integers(3, VOCABULARY, length).tolist()
            for length in generator.integers(1, 30, number)
        ]

    return rows(), rows()


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Callable[..., Any]:
    """What one plain service says."""

    def nlls(sources: list[list[int]], targets: list[list[int]]) -> list[float]:
        settings = Settings(device="cpu", precision="float32", warm_up=False)
        with TestClient(create_app({"demo": bundle}, settings)) as client:
            while client.get("/health/ready").status_code != 200:
                time.sleep(0.05)
            reply = client.post(
                "/loss",
                json={"source_ids": sources, "target_ids": targets, "reproducible": True},
            )
        return list(reply.json()["nlls"])

    return nlls


# ---------------------------------------------------------------- Serve


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
    """The last one of the service, which it ends; two workers of a dataset need both processors."""
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


# ---------------------------------------------------------------- Data


def dataset(folder: Path, number: int) -> tuple[list[list[int]], list[list[int]]]:
    sources, targets = random_pairs(number, seed=7)
    table = pa.table(
        {"source_ids": sources, "target_ids": targets, "name": [f"p{row}" for row in range(number)]}
    )
    folder.mkdir()
    half = number // 2
    pq.write_table(table.slice(0, half), folder / "a.parquet", row_group_size=300)
    pq.write_table(table.slice(half), folder / "b.parquet")
    return sources, targets


POOL = Pool(partition_rows=250, workers=2, cpus_per_worker=1)


def work(bundle: Bundle, source: Path, output: Path, **changes: Any) -> Work:
    given: dict[str, Any] = {"settings": {"device": "cpu", "precision": "float32"}}
    return Work(str(source), str(output), str(bundle.folder), **(given | changes))


def scores_in(output: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(output.glob("part-*.parquet")))


def run(work: Work, pool: Pool = POOL) -> Progress:
    *_, last = score_dataset(work, pool)
    return last


def test_a_dataset_has_the_losses_of_a_plain_service(
    bundle: Bundle, tmp_path: Path, expected: Callable[..., list[float]]
) -> None:
    sources, targets = dataset(tmp_path / "in", 1200)
    output = tmp_path / "out"
    last = run(work(bundle, tmp_path / "in", output, kept=("name",), with_tokens=True))
    assert (last.pairs, last.errors, last.partitions) == (1200, 0, 6)
    table = scores_in(output)
    assert table.column("name").to_pylist() == [f"p{row}" for row in range(1200)]
    assert table.column("row").to_pylist() == [*range(600), *range(600)]
    assert table.column("nll").to_pylist() == expected(sources, targets)
    sums = [sum(row) for row in table.column("token_nlls").to_pylist()]
    assert sums == pytest.approx(table.column("nll").to_pylist())
    assert table.column("error").null_count == 1200


def test_what_is_wrong_with_a_row_stands_beside_it(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"source_ids": [5], "target_ids": [6]}\n'
        "oops\n"
        '{"source_ids": [5], "target_ids": []}\n'
        '{"source_ids": [5], "target_ids": [1000000]}\n'
    )
    output = tmp_path / "out"
    assert run(work(bundle, path, output)).errors == 3
    rows = scores_in(output).to_pylist()
    assert [row["nll"] is None for row in rows] == [False, True, True, True]
    codes = [row["error"] and row["error"].split(":")[0] for row in rows]
    assert codes == [None, "malformed_line", "empty_target", "token_out_of_range"]


def test_a_run_goes_on_with_what_is_not_there_yet(bundle: Bundle, tmp_path: Path) -> None:
    dataset(tmp_path / "in", 1000)
    output = tmp_path / "out"
    run(work(bundle, tmp_path / "in", output))
    whole = scores_in(output)
    kept = output / "part-000000.parquet"
    (output / "part-000002.parquet").unlink()
    written = kept.stat().st_mtime_ns
    (output / "part-000002.parquet.0f.tmp").write_bytes(b"what a killed worker had begun to write")
    first, *_, last = score_dataset(work(bundle, tmp_path / "in", output), Pool(workers=1))
    assert (first.pairs, last.pairs) == (750, 1000)
    assert kept.stat().st_mtime_ns == written
    assert scores_in(output).equals(whole)
    assert not list(output.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "pool", "message"),
    [
        ({"with_tokens": True}, POOL, "with other with_tokens;"),
        ({"settings": {"precision": "bfloat16"}}, POOL, "with other settings;"),
        ({}, Pool(partition_rows=100), "with other rows of a partition;"),
    ],
)
def test_an_output_of_another_run_is_not_mixed_with_this_one(
    change: dict[str, Any], pool: Pool, message: str, bundle: Bundle, tmp_path: Path
) -> None:
    dataset(tmp_path / "in", 1000)
    plan(work(bundle, tmp_path / "in", tmp_path / "out"), POOL)
    with pytest.raises(ConfigurationError, match=message):
        run(work(bundle, tmp_path / "in", tmp_path / "out", **change), pool)


def plan(work: Work, pool: Pool) -> Progress:
    """Begins a run that ends before anything is scored."""
    begun = score_dataset(work, pool)
    first = next(begun)
    begun.close()
    return first


def test_the_same_command_goes_on_where_files_are_smaller_than_partitions(
    bundle: Bundle, tmp_path: Path
) -> None:
    dataset(tmp_path / "in", 1000)
    for _ in range(2):
        first = plan(work(bundle, tmp_path / "in", tmp_path / "out"), Pool(partition_rows=800))
        assert (first.of_partitions, first.of_pairs) == (2, 1000)


def test_a_dataset_that_was_changed_is_another_one(bundle: Bundle, tmp_path: Path) -> None:
    dataset(tmp_path / "in", 1000)
    plan(work(bundle, tmp_path / "in", tmp_path / "out"), POOL)
    os.utime(tmp_path / "in" / "a.parquet", ns=(1, 1))
    with pytest.raises(ConfigurationError, match="with other files of the dataset;"):
        run(work(bundle, tmp_path / "in", tmp_path / "out"))


@pytest.mark.parametrize("where", ["in", "in/scores"])
def test_an_output_in_the_dataset_is_refused(where: str, bundle: Bundle, tmp_path: Path) -> None:
    dataset(tmp_path / "in", 1000)
    with pytest.raises(ConfigurationError, match="lies in the dataset"):
        run(work(bundle, tmp_path / "in", tmp_path / where))


def test_an_output_that_holds_something_else_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    dataset(tmp_path / "in", 1000)
    dataset(tmp_path / "out", 10)
    with pytest.raises(ConfigurationError, match="no plan says how they were made"):
        run(work(bundle, tmp_path / "in", tmp_path / "out"))


def test_a_plan_that_another_run_replaced_is_not_called_done(
    bundle: Bundle, tmp_path: Path
) -> None:
    dataset(tmp_path / "in", 1000)
    running = score_dataset(work(bundle, tmp_path / "in", tmp_path / "out"), POOL)
    next(running)
    (tmp_path / "out" / "_plan.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="another run has begun"):
        list(running)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch_tokens": "many"}, "max_batch_tokens"),
        ({"device": "cpu", "precision": "int8"}, "a worker did not start: .*int8"),
    ],
)
def test_a_setting_that_is_wrong_is_said_in_a_sentence(
    settings: dict[str, Any], message: str, bundle: Bundle, tmp_path: Path
) -> None:
    dataset(tmp_path / "in", 1000)
    with pytest.raises(ConfigurationError, match=message):
        run(work(bundle, tmp_path / "in", tmp_path / "out", settings=settings))


def test_a_worker_serves_pipelines_of_one_s_own(
    bundle: Bundle, expected: Callable[..., list[float]]
) -> None:
    sources, targets = random_pairs(50, seed=11)
    scorer = PairScorer(str(bundle.folder), {"device": "cpu", "precision": "float32"})
    table = scorer(pa.table({"name": ["x"] * 50, "source_ids": sources, "target_ids": targets}))
    assert table.column("nll").to_pylist() == expected(sources, targets)
    assert table.column_names[:3] == ["name", "source_ids", "target_ids"]
    with pytest.raises(ConfigurationError, match="columns error, loss"):
        scorer(table)


def test_no_row_is_lost_or_doubled_when_workers_are_killed(
    bundle: Bundle,
    tmp_path: Path,
    expected: Callable[..., list[float]],
    pytestconfig: pytest.Config,
) -> None:
    sources, targets = dataset(tmp_path / "in", 3000)
    output = tmp_path / "out"
    pool = Pool(partition_rows=100, workers=2, cpus_per_worker=1)
    kills, wanted = 0, pytestconfig.getoption("--kills")
    for progress in score_dataset(work(bundle, tmp_path / "in", output), pool):
        workers = actor_processes("MapWorker")
        if progress.partitions and kills < wanted and workers:
            os.kill(workers[0], signal.SIGKILL)
            kills += 1
    assert kills == wanted
    table = scores_in(output)
    assert table.column("row").to_pylist() == [*range(1500), *range(1500)]
    assert table.column("nll").to_pylist() == expected(sources, targets)
