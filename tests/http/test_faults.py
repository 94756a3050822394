"""Whatever goes wrong, every request over real HTTP has one outcome, which the client counts."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes import START, fake_nll
from server import Server

StartFaulty = Callable[..., Server]

# Nothing here takes this long; whatever does hangs.
TIMEOUT = 300


@pytest.fixture
def start() -> Iterator[StartFaulty]:
    """Starts a server whose engine fails as told; ends it with the test."""
    servers: list[Server] = []

    def make(fault: str, **settings: object) -> Server:
        settings = {"warm_up": False} | settings
        servers.append(Server.with_fault(fault, **settings))
        return servers[-1]

    yield make
    for server in servers:
        server.process.kill()
        server.process.communicate()


def body_of(generator: random.Random, num_pairs: int, **options: Any) -> dict[str, Any]:
    """Pairs of few tokens, hardly ever the same twice."""

    def rows() -> list[list[int]]:
        return [
            [generator.randrange(3, 48) for _ in range(generator.randint(1, 6))]
            for _ in range(num_pairs)
        ]

    return {"source_ids": rows(), "target_ids": rows(), **options}


def expected_losses(body: dict[str, Any]) -> list[float]:
    return [
        sum(
            fake_nll(source, fed, label)
            for fed, label in zip([START, *target[:-1]], target, strict=True)
        )
        for source, target in zip(body["source_ids"], body["target_ids"], strict=True)
    ]


async def outcome_of(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """What became of a request, in a word; a reply must hold exactly its own losses."""
    try:
        reply = await client.post("/loss", json=body)
    except httpx.ReadTimeout:
        return "hung"
    except httpx.TransportError:
        return "disconnected"
    if reply.status_code != 200:
        problem = reply.json()
        assert problem["status"] == reply.status_code
        return str(problem["code"])
    assert reply.json()["losses"] == pytest.approx(expected_losses(body), rel=1e-5)
    return "scored"


def outcomes_of(
    address: str,
    bodies: list[dict[str, Any]],
    *,
    at_once: int = 32,
    meanwhile: Callable[[], None] = lambda: None,
) -> Counter[str]:
    """Sends all bodies, so many at a time; does `meanwhile` once a third of them is answered."""

    async def run() -> Counter[str]:
        free, answered, done = asyncio.Semaphore(at_once), Counter[str](), asyncio.Event()
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(base_url=address, timeout=TIMEOUT, limits=limits) as client:

            async def send(body: dict[str, Any]) -> None:
                async with free:
                    answered[await outcome_of(client, body)] += 1
                if answered.total() >= len(bodies) // 3 and not done.is_set():
                    done.set()
                    await asyncio.to_thread(meanwhile)

            await asyncio.gather(*map(send, bodies))
        return answered

    return asyncio.run(run())


def bodies_of(count: int, num_pairs: int = 12, **options: Any) -> list[dict[str, Any]]:
    generator = random.Random(count)
    return [
        body_of(generator, generator.randint(1, num_pairs), **options)
        | {"priority": generator.choice(["interactive", "bulk"])}
        for _ in range(count)
    ]


def metric(address: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = httpx.get(f"{address}/metrics", timeout=TIMEOUT).text.splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.partition("{")[0].split(" ")[0] == name
    )


def test_memory_that_runs_out_at_random_loses_no_pair(start: StartFaulty) -> None:
    server = start("out-of-memory")
    bodies = bodies_of(200)
    assert outcomes_of(server.address, bodies) == {"scored": 200}
    assert metric(server.address, "seqloss_batch_splits_total") > 10
    assert metric(server.address, "seqloss_token_budget") < 4096
    assert metric(server.address, "seqloss_queue_tokens") == 0
    pairs = sum(len(body["target_ids"]) for body in bodies)
    assert metric(server.address, "seqloss_pairs_total") == pairs


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_an_engine_that_is_gone_answers_everybody_and_ends_the_process(
    fault: str, start: StartFaulty
) -> None:
    server = start(fault, max_forward_seconds=2, max_batch_tokens=64)
    outcomes = outcomes_of(server.address, bodies_of(200))
    assert outcomes.total() == 200
    assert set(outcomes) <= {"scored", "engine_dead", "not_ready", "disconnected"}, outcomes
    assert outcomes["scored"]
    assert outcomes["engine_dead"]
    assert server.exit_status() == 1
    assert "the engine is dead" in server.log
    assert "Traceback" not in server.log


def test_deadlines_that_pass_are_answered_in_time(start: StartFaulty) -> None:
    server = start("slow", max_batch_tokens=64)
    bodies = bodies_of(60, timeout_ms=500)
    started = time.monotonic()
    outcomes = outcomes_of(server.address, bodies, at_once=60)
    assert outcomes.total() == 60
    assert set(outcomes) <= {"scored", "deadline_exceeded", "deadline_unmeetable"}, outcomes
    assert outcomes["deadline_exceeded"]
    # All were sent at once, and nobody was told much later than they asked to be.
    assert time.monotonic() - started < 10
    assert metric(server.address, "seqloss_queue_tokens") == 0
    assert metric(server.address, "seqloss_deadline_missed_total") == outcomes["deadline_exceeded"]


def test_sigterm_under_load_drops_nothing_that_was_admitted(start: StartFaulty) -> None:
    server = start("healthy", max_batch_tokens=64)
    outcomes = outcomes_of(
        server.address,
        bodies_of(200),
        meanwhile=lambda: server.process.send_signal(signal.SIGTERM),
    )
    assert outcomes.total() == 200
    assert set(outcomes) <= {"scored", "not_ready", "disconnected"}, outcomes
    assert outcomes["scored"] >= 200 // 3
    assert outcomes["not_ready"]
    assert server.exit_status() in (0, -signal.SIGTERM)
    assert "Traceback" not in server.log


def test_a_second_sigterm_ends_it_at_once(start: StartFaulty) -> None:
    server = start("slow", max_batch_tokens=16, drain_timeout_seconds=600)

    def terminate_twice() -> None:
        server.process.send_signal(signal.SIGTERM)
        server.read_until("Shutting down")
        server.process.send_signal(signal.SIGTERM)

    started = time.monotonic()
    outcomes = outcomes_of(server.address, bodies_of(30, 4), meanwhile=terminate_twice)
    assert outcomes.total() == 30
    assert set(outcomes) <= {"scored", "not_ready", "disconnected"}, outcomes
    assert server.exit_status() in (0, -signal.SIGTERM)
    assert time.monotonic() - started < TIMEOUT


_CLIENT = """
import sys, threading, httpx
body = {"source_ids": [[3]] * 2000, "target_ids": [[4, 5]] * 2000}
def ask(): httpx.post(sys.argv[1] + "/loss", json=body, timeout=300)
threads = [threading.Thread(target=ask) for _ in range(20)]
for thread in threads: thread.start()
print("sent", flush=True)
"""


def test_a_client_that_is_killed_leaves_nothing_behind(start: StartFaulty) -> None:
    server = start("slow")
    address = server.address
    with subprocess.Popen(
        [sys.executable, "-c", _CLIENT, address], stdout=subprocess.PIPE
    ) as client:
        wait_until(lambda: metric(address, "seqloss_inflight_requests") >= 10)
        client.kill()
    wait_until(lambda: metric(address, "seqloss_inflight_requests") == 0)
    wait_until(lambda: metric(address, "seqloss_queue_tokens") == 0)
    assert metric(address, "seqloss_cancelled_pairs_total") > 0
    assert outcomes_of(address, bodies_of(5)) == {"scored": 5}


def wait_until(reached: Callable[[], bool]) -> None:
    """Fails where it takes too long."""
    end = time.monotonic() + TIMEOUT
    while not reached():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


# ---------------------------------------------------------------- for long


@pytest.mark.timeout(3600)
def test_a_soak_leaks_nothing(start: StartFaulty, pytestconfig: pytest.Config) -> None:
    """Mixed shapes and clients that vanish; `--soak-seconds 1800` is for a person to start."""
    seconds = pytestconfig.getoption("soak_seconds")
    server = start("healthy")
    address, pid = server.address, server.process.pid
    memory, end = [], time.monotonic() + seconds
    # Allocators and caches fill up first.
    outcomes_of(address, bodies_of(300, 40))
    tasks, files = num_tasks(server), num_files(pid)
    while time.monotonic() < end:
        generator = random.Random(len(memory))
        bodies = [
            body_of(
                generator, generator.choice([1, 1, 8, 60]), timeout_ms=generator.choice([5, 9e4])
            )
            for _ in range(100)
        ]
        outcomes = outcomes_of(address, bodies, at_once=generator.choice([1, 8, 50]))
        assert set(outcomes) <= {"scored", "deadline_exceeded", "deadline_unmeetable"}, outcomes
        memory.append(resident_bytes(pid))
    wait_until(lambda: metric(address, "seqloss_queue_tokens") == 0)
    third = len(memory) // 3
    middle = sum(memory[third : 2 * third]) / third
    last = sum(memory[2 * third : 3 * third]) / third
    assert last <= 1.03 * middle, memory
    wait_until(lambda: num_files(pid) <= files)
    wait_until(lambda: num_tasks(server) <= tasks)


def num_tasks(server: Server) -> int:
    """Tasks of the server's event loop."""
    server.log = ""
    server.process.send_signal(signal.SIGUSR1)
    return int(server.read_until(r"tasks: (\d+)").group(1))


def num_files(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
