"""The programs that images hold beside the service: its health check, and the demo's traffic."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from seqloss.bundle.reader import Bundle
from server import Server

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - as it stands in the images

Serve = Callable[..., Server]


def until(holds: Callable[[], bool], what: Callable[[], Any], seconds: float = 300) -> None:
    """Polls until it holds; fails with what there is otherwise."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def demo(export_once: Callable[[str, str], Bundle]) -> str:
    """The demo bundle, as an argument of `seqloss serve`."""
    return f"demo={export_once('demo', 'torch').folder}"


def health(**environment: str) -> subprocess.CompletedProcess[str]:
    """The check of the images, with these variables and no others of the service."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SEQLOSS_")}
    return subprocess.run(
        [sys.executable, "-I", str(DOCKER / "health.py")],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_health_check_is_content_with_a_ready_service(
    serve: Serve, demo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQLOSS_ADMIN_PORT", "0")
    server = serve(demo)
    ports = {"main": str(httpx.URL(server.address).port)}
    ports["admin"] = server.read_until(r"for operators on http://127\.0\.0\.1:(\d+)").group(1)
    by_first = health(SEQLOSS_HOST=EVERYWHERE, SEQLOSS_PORT=ports["main"])
    by_second = health(SEQLOSS_ADMIN_HOST=EVERYWHERE, SEQLOSS_ADMIN_PORT=ports["admin"])
    assert (by_first.returncode, by_second.returncode) == (0, 0), (by_first, by_second)
    server.process.kill()
    server.exit_status()
    gone = health(SEQLOSS_PORT=ports["main"])
    assert gone.returncode == 1
    assert "refused" in gone.stdout


def test_the_health_check_says_that_a_service_drains(
    serve: Serve, demo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQLOSS_DRAIN_DELAY_SECONDS", "60")
    server = serve(demo)
    port = str(httpx.URL(server.address).port)
    server.process.send_signal(signal.SIGTERM)
    answers: list[subprocess.CompletedProcess[str]] = []

    def not_ready() -> bool:
        answers.append(health(SEQLOSS_PORT=port))
        return answers[-1].returncode == 1

    until(not_ready, lambda: answers)
    assert answers[-1].stdout.startswith("503 ")


@contextmanager
def traffic(address: str) -> Iterator[subprocess.Popen[str]]:
    """The generator, faster than in the demo; what it prints goes to a pipe."""
    with subprocess.Popen(
        [sys.executable, str(DOCKER / "traffic.py"), "--url", address, "--rate", "25"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def scraped(address: str, name: str) -> dict[str, float]:
    """Samples of one name, by their labels as they are written; none where nobody answers."""
    try:
        text = httpx.get(f"{address}/metrics").text
    except httpx.TransportError:
        return {}
    return {
        labels: float(value)
        for labels, value in re.findall(rf"^{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    }


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams that Compose allows; and no line for each request, which nobody would read."""
    settings = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["x-service"]["environment"]
    monkeypatch.setenv("SEQLOSS_STREAMS", settings["SEQLOSS_STREAMS"])
    monkeypatch.setenv("SEQLOSS_LOG_REQUESTS", "false")


@pytest.mark.usefixtures("streams")
def test_the_traffic_is_of_all_kinds_and_ends_at_once(serve: Serve, demo: str) -> None:
    address = serve(demo).address
    with traffic(address) as process:

        def pairs() -> dict[str, float]:
            return scraped(address, "seqloss_pairs_total")

        def losses() -> dict[str, float]:
            return scraped(address, "seqloss_pair_mean_nll_count")

        def requests() -> dict[str, float]:
            return scraped(address, "seqloss_http_request_duration_seconds_count")

        def has_all() -> bool:
            return (
                {
                    'model="demo",outcome="scored",priority="interactive"',
                    'model="demo",outcome="scored",priority="bulk"',
                    'model="demo",outcome="token_out_of_range",priority="bulk"',
                }
                <= pairs().keys()
                and {'model="demo",stream="news"', 'model="demo",stream="web"'} <= losses().keys()
                and 'method="POST",route="/loss",status="422"' in requests()
            )

        until(has_all, lambda: (pairs(), losses(), requests()))
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert re.search(r"requests: .*\d+ scored", said), said


@pytest.mark.usefixtures("streams")
def test_the_traffic_goes_on_where_the_service_starts_anew(serve: Serve, demo: str) -> None:
    first = serve(demo)
    address = first.address

    def is_scoring() -> bool:
        scored = scraped(address, "seqloss_pairs_total")
        return any('outcome="scored"' in labels for labels in scored)

    with traffic(address) as process:
        until(is_scoring, process.poll)
        first.process.kill()
        first.exit_status()
        serve(demo, port=httpx.URL(address).port)
        until(is_scoring, process.poll)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
