"""What is scraped: well-formed, as Prometheus' own tool has it, and of a bounded size."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from test_bad_requests import GOOD, JSON, poisoned

from fakes import FakeEngine, fake_bundle
from seqloss.engines.base import EngineInfo
from seqloss.errors import EngineDeadError, OutOfMemoryError
from seqloss.http.app import create_app
from seqloss.records import Batch
from seqloss.settings import Settings


class OnGpu(FakeEngine):
    def memory_bytes(self) -> dict[str, int]:
        return {"allocated": 1000}


def wait_for(event: threading.Event) -> None:
    assert event.wait(30)


def raising(error: Exception) -> FakeEngine:
    def fail(_: Batch) -> None:
        raise error

    return FakeEngine(fail)


@pytest.fixture
def service() -> Iterator[TestClient]:
    """A model for each way in which one can fail; with the metrics of the process itself."""
    let_go = threading.Event()
    engines = {
        "sound": OnGpu(),
        "held": FakeEngine(lambda _: wait_for(let_go)),
        "poisoned": poisoned(13, np.nan),
        "full": raising(OutOfMemoryError("no room")),
        "broken": raising(RuntimeError("a bug")),
        "dead": raising(EngineDeadError("gone")),
    }
    loaded = iter(engines.values())
    app = create_app(
        dict.fromkeys(engines, fake_bundle()),
        Settings(max_pairs_per_request=100, streams=("news",), warm_up=False),
        load=lambda *_: next(loaded),
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/models/dead").json()["state"] == "loading":
            pass
        yield client
        let_go.set()


def send_every_kind(service: TestClient) -> None:
    """Requests for every status that one alone can bring about."""
    good = GOOD | {"model": "sound"}
    everything = ["token_losses", "token_nlls", "token_ranks", "token_entropies"]
    for status, body in [
        (200, good | {"return": everything, "label_smoothing": 0.1, "priority": "bulk"}),
        (200, good | {"target_ids": [[5], [6], [99]], "source_index": [0] * 3}),
        (200, good | {"source_ids": [], "target_ids": []}),
        (200, GOOD | {"model": "poisoned", "target_ids": [[13]]}),
        (404, good | {"model": "unheard-of"}),
        (413, good | {"target_ids": [[5]] * 101, "source_index": [0] * 101}),
        (422, good | {"target_ids": []}),
        (504, good | {"timeout_ms": 0.001}),
    ]:
        reply = service.post("/loss", json=body | {"on_error": "partial"})
        assert reply.status_code == status, reply.text
    for status, body in [
        (413, {"model": "full", "source_ids": [[3], [4]], "target_ids": [[5], [6]]}),
        (422, good | {"target_ids": [[99]]}),
        (500, GOOD | {"model": "broken"}),
        (500, GOOD | {"model": "poisoned", "target_ids": [[13]]}),
        (503, GOOD | {"model": "dead"}),
    ]:
        reply = service.post("/loss", json=body)
        assert reply.status_code == status, reply.text
    assert service.post("/loss", json=good, headers={"X-Seqloss-Stream": "news"}).is_success
    assert service.post("/loss", content=b"{", headers=JSON).status_code == 400
    assert service.post("/loss", content=b"{}").status_code == 415
    assert service.put("/loss").status_code == 405
    for path in ("/models", "/models/sound", "/metrics", "/docs"):
        assert service.get(path).status_code == 200
    assert service.get("/nothing").status_code == 404
    assert service.get("/health/ready").status_code == 503
    assert set(service.portal.call(service.app.state.reload).values()) == {"failed"}
    # Last: it keeps the thread that all models share.
    late = service.post("/loss", json=GOOD | {"model": "held", "timeout_ms": 500})
    assert late.status_code == 504


def test_promtool_finds_nothing_to_complain_of(service: TestClient) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; Debian has it in the package prometheus")
    send_every_kind(service)
    scraped = service.get("/metrics").text
    # All families, those with labels too: what has no samples yet is not checked.
    families = list(text_string_to_metric_families(scraped))
    assert not [family.name for family in families if not family.samples]
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=scraped, capture_output=True, text=True, check=False
    )
    assert (checked.stdout + checked.stderr, checked.returncode) == ("", 0)


# ---------------------------------------------------------------- labels


def series(service: TestClient) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in text_string_to_metric_families(service.get("/metrics").text)
        for sample in family.samples
    }


def hostile(random_: random.Random) -> str:
    """A name that nobody else has, of letters that somebody may stumble over."""
    alphabet = "aZ0-_.~/\\%?#&=\"{}[]<>|$`'\t ,;:@\u00e9\u0130\u4e2d\u202e\U0001f600\n\r\x00\x7f"
    text = "".join(random_.choices(alphabet, k=random_.choice((1, 8, 8, 8, 300))))
    text += f"{random_.getrandbits(64):x}"
    return urllib.parse.quote(text) if random_.random() < 0.3 else text


Request = tuple[str, str, dict[str, str], bytes]

# By what it is that somebody makes up; each has the same route, method and status every time.
KINDS: dict[str, Callable[[str], Request]] = {
    "path": lambda name: ("GET", f"/{name}", {}, b""),
    "path below one that exists": lambda name: ("POST", f"/loss/x{name}", {}, b""),
    "model in the path": lambda name: ("GET", f"/models/x{name.replace('/', '')}", {}, b""),
    "model in the body": lambda name: ("POST", "/loss", JSON, sent(model=name)),
    "field": lambda name: ("POST", "/loss", JSON, sent(**{name: 1})),
    "value": lambda name: ("POST", "/loss", JSON, sent(priority=name)),
    "method": lambda name: (name, "/loss", {}, b""),
    "method and path": lambda name: (name, f"/{name}", {}, b""),
    "stream": lambda name: ("POST", "/loss", JSON | {"X-Seqloss-Stream": name}, sent()),
    "request id": lambda name: ("GET", "/models", {"X-Request-ID": name}, b""),
    "host": lambda name: ("GET", "/models", {"Host": name}, b""),
    "host and path": lambda name: ("GET", f"/x{name}", {"Host": name}, b""),
    "header": lambda name: ("GET", "/models", {name: name}, b""),
    "query": lambda name: ("GET", f"/models?{name}", {}, b""),
    "media type": lambda name: ("POST", "/loss", {"Content-Type": name}, sent()),
    "encoding": lambda name: ("POST", "/loss", JSON | {"Content-Encoding": name}, sent()),
    "accept": lambda name: ("GET", "/health/live", {"Accept": name}, b""),
}


def sent(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


async def status_of(app: Any, request: Request) -> int:
    """What the application says without a server before it, which would refuse half of them."""
    method, path, headers, body = request
    path, _, query = path.partition("?") if path.startswith("/models?") else (path, "", "")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8000),
    }
    statuses: list[int] = []
    messages = iter([{"type": "http.request", "body": body}])

    async def receive() -> dict[str, Any]:
        return next(messages, None) or await never()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    (status,) = statuses
    return status


async def never() -> Any:
    await asyncio.Event().wait()


def test_nobody_makes_up_time_series(make_client: Any) -> None:
    """Each one would stay for the life of the process, in its memory and in Prometheus'."""
    service = make_client(streams=("news",))
    random_ = random.Random(1)

    def send(number: int) -> dict[str, set[int]]:
        async def all_of_them() -> dict[str, set[int]]:
            seen: dict[str, set[int]] = {kind: set() for kind in KINDS}
            for _ in range(number // len(KINDS) + 1):
                for kind, request in KINDS.items():
                    seen[kind].add(await status_of(service.app, request(hostile(random_))))
            return seen

        return service.portal.call(all_of_them)

    send(1)
    series(service)  # a scrape has series of its own
    before = series(service)
    seen = send(10_000)
    assert series(service) == before
    assert {kind: len(statuses) for kind, statuses in seen.items()} == dict.fromkeys(KINDS, 1)
    assert not [kind for kind, statuses in seen.items() if max(statuses) >= 500], seen


# ---------------------------------------------------------------- what computes


class WithKernelsLater(FakeEngine):
    """As an engine whose kernels are being compiled beside it."""

    has_kernels = False

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, has_kernels=self.has_kernels)


def test_it_shows_from_when_on_kernels_compute(make_client: Any) -> None:
    engine = WithKernelsLater()
    service = make_client(engine=engine)

    def shown() -> list[float]:
        return [
            sample.value
            for family in text_string_to_metric_families(service.get("/metrics").text)
            for sample in family.samples
            if sample.name == "seqloss_compiled_kernels" and sample.labels == {"model": "fake"}
        ]

    assert shown() == [0]
    assert service.post("/loss", json=GOOD).is_success
    assert shown() == [0]
    engine.has_kernels = True
    assert service.post("/loss", json=GOOD).is_success
    assert shown() == [1]
