"""A bundle takes the place of another one: nobody fails, and nobody gets half of each."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fakes import FakeEngine, fake_bundle
from seqloss.bundle.reader import Bundle
from seqloss.errors import BundleError, EngineDeadError, SelfTestError
from seqloss.http.app import create_admin_app
from seqloss.records import Batch, TokenTerms
from server import Server

GOOD = {"source_ids": [[3, 4]], "target_ids": [[5, 2]]}


def constant(nll: float, before: Callable[[], object] = lambda: None) -> FakeEngine:
    """A model to which every token is as likely."""

    def score(batch: Batch) -> TokenTerms:
        before()
        values = np.full(int(batch.counted.sum()), -nll, np.float32)
        return TokenTerms(target_logprob=values, mean_logprob=values)

    return FakeEngine(score)


def bundle_named(digest: str) -> Bundle:
    return replace(fake_bundle(), digest=digest)


class Reloading:
    """A service whose folder holds what a test puts there."""

    def __init__(self, make_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines = {"old": constant(1.0)}
        self.folder: Callable[[], Bundle] = lambda: bundle_named("old")
        monkeypatch.setattr("seqloss.bundle.reader.open_bundle", lambda _: self.folder())
        self.client = make_client(
            {"fake": bundle_named("old")}, load=lambda bundle, *_: self.load(bundle)
        )
        self.admin = httpx.AsyncClient(
            transport=httpx.ASGITransport(create_admin_app(self.client.app)),
            base_url="http://admin",
        )

    def load(self, bundle: Bundle) -> FakeEngine:
        engine = self.engines[bundle.digest]
        if isinstance(engine, Exception):
            raise engine
        return engine

    def put(self, digest: str, engine: Any) -> None:
        self.engines[digest] = engine
        self.folder = lambda: bundle_named(digest)

    def reload(self, path: str = "/admin/models/fake/reload") -> httpx.Response:
        reply: httpx.Response = self.client.portal.call(self.admin.post, path)
        return reply

    def mean_loss(self) -> float:
        reply = self.client.post("/loss", json=GOOD)
        assert reply.status_code == 200, reply.text
        return float(reply.json()["mean_losses"][0])

    def metric(self, line: str) -> bool:
        return line in self.client.get("/metrics").text


@pytest.fixture
def service(make_client: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reloading]:
    reloading = Reloading(make_client, monkeypatch)
    yield reloading
    reloading.client.portal.call(reloading.admin.aclose)


def test_what_lies_in_the_folder_now_is_served(service: Reloading) -> None:
    assert service.mean_loss() == 1.0
    service.put("new", constant(2.0))
    assert service.reload().json() == {"outcomes": {"fake": "loaded"}}
    assert service.mean_loss() == 2.0
    assert service.client.get("/models/fake").json()["bundle_digest"] == "new"
    assert service.metric('seqloss_reloads_total{model="fake",outcome="loaded"} 1.0')
    assert service.metric('bundle_digest="new"')
    assert not service.metric('bundle_digest="old"')
    assert service.engines["old"].closed


def test_a_folder_that_holds_the_same_is_left_alone(service: Reloading) -> None:
    assert service.reload("/admin/reload").json() == {"outcomes": {"fake": "unchanged"}}
    assert not service.engines["old"].closed


def refuse() -> Bundle:
    raise BundleError("it is broken", ["a is missing", "b is not a file"])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda service: setattr(service, "folder", refuse), "it is broken"),
        (lambda service: service.put("new", SelfTestError("off by 1 nat")), "off by 1 nat"),
        (lambda service: service.put("new", RuntimeError("no memory")), "no memory"),
    ],
)
def test_a_bad_bundle_leaves_the_old_one_serving(
    service: Reloading, broken: Callable[[Reloading], None], said: str
) -> None:
    broken(service)
    reply = service.reload()
    assert (reply.status_code, reply.json()["code"]) == (422, "reload_failed")
    assert said in reply.json()["detail"]
    reply = service.reload("/admin/reload")
    assert (reply.status_code, reply.json()["code"]) == (422, "reload_failed")
    assert service.mean_loss() == 1.0
    assert service.client.get("/health/ready").status_code == 200
    assert service.metric('seqloss_reloads_total{model="fake",outcome="failed"} 2.0')
    assert not service.engines["old"].closed


def test_every_fault_of_a_bad_bundle_is_listed(service: Reloading) -> None:
    service.folder = refuse
    details = [fault["detail"] for fault in service.reload().json()["errors"]]
    assert details == ["a is missing", "b is not a file"]


def test_a_model_that_is_not_served_is_404(service: Reloading) -> None:
    assert service.reload("/admin/models/other/reload").status_code == 404


def test_whoever_came_before_is_answered_by_the_old_one(service: Reloading) -> None:
    """Also those who still wait when the new one has opened."""
    entered, let_go = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert let_go.wait(30)

    service.put("held", constant(3.0, wait))
    service.reload()
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(service.mean_loss)
        assert entered.wait(30)
        waiting = [threads.submit(service.mean_loss) for _ in range(2)]
        while not service.metric('seqloss_queue_pairs{model="fake"} 2.0'):
            pass
        service.put("new", constant(4.0))
        reloading = threads.submit(service.reload)
        let_go.set()
        assert reloading.result(30).status_code == 200
        assert service.mean_loss() == 4.0
        assert [one.result(30) for one in (first, *waiting)] == [3.0] * 3
    while not service.engines["held"].closed:
        pass


def test_a_service_that_shuts_down_is_not_reloaded(service: Reloading) -> None:
    service.put("new", constant(2.0))
    service.client.portal.call(service.client.app.state.models.drain)
    assert service.reload().status_code == 503
    assert "new" not in service.client.get("/models/fake").json()["bundle_digest"]


def test_a_reload_that_a_shutdown_overtakes_is_given_up(service: Reloading) -> None:
    entered, let_go = threading.Event(), threading.Event()
    new = constant(2.0)

    def load(_: Bundle) -> FakeEngine:
        entered.set()
        assert let_go.wait(30)
        return new

    service.put("new", new)
    service.load = load  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        reloading = threads.submit(service.reload)
        assert entered.wait(30)
        service.client.portal.call(service.client.app.state.models.drain)
        let_go.set()
        assert reloading.result(30).status_code == 503
    assert new.closed


def test_a_warm_up_that_never_ends_ends_the_process(
    make_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All models share the device's thread, and its old model's watchdog waits for its turn."""
    fatal: list[Exception] = []
    let_go = threading.Event()
    engines = {"old": constant(1.0), "new": constant(2.0, lambda: let_go.wait(60))}
    monkeypatch.setattr("seqloss.bundle.reader.open_bundle", lambda _: bundle_named("new"))
    client = make_client(
        {"fake": bundle_named("old")},
        load=lambda bundle, *_: engines[bundle.digest],
        on_fatal=fatal.append,
        warm_up=True,
        max_forward_seconds=0.2,
    )
    outcomes = client.portal.call(client.app.state.reload)
    assert outcomes == {"fake": "failed"}
    assert [type(error) for error in fatal] == [EngineDeadError]
    assert client.app.state.models.is_stuck
    let_go.set()


def test_pages_in_an_operators_browser_are_refused(service: Reloading) -> None:
    headers = {"Origin": "https://evil.example"}
    reply = service.client.portal.call(
        functools.partial(service.admin.post, "/admin/reload", headers=headers)
    )
    assert reply.status_code == 403
    for path in ("/docs", "/openapi.json", "/models"):
        assert service.client.portal.call(service.admin.get, path).status_code == 404


@pytest.mark.parametrize("how", ["signal", "endpoint"])
def test_under_load_no_request_fails_and_each_has_one_bundles_losses(
    serve: Callable[..., Server], bundle_of: Any, tmp_path: Path, how: str
) -> None:
    """The real thing: a process, two models, a link that leads from one to the other."""
    link = tmp_path / "current"
    link.symlink_to(bundle_of("marian").folder)
    server = serve(f"m={link}", "--device", "cpu", "--admin-port", "0")
    body = {
        "source_ids": [[3 + row % 7, 5, 6] for row in range(24)],
        "target_ids": [[4 + row % 5, 7] for row in range(24)],
        "reproducible": True,
    }
    stop, everybody_asks = threading.Event(), threading.Barrier(5)

    def ask() -> list[tuple[float, ...]]:
        seen: list[tuple[float, ...]] = []
        with httpx.Client(base_url=address, timeout=60) as client:
            is_last = False
            while not is_last:
                is_last = stop.is_set()
                reply = client.post("/loss", json=body)
                assert reply.status_code == 200, reply.text
                seen.append(tuple(reply.json()["losses"]))
                if len(seen) == 1:
                    everybody_asks.wait(60)
        return seen

    with server.client() as client, ThreadPoolExecutor(4) as threads:
        address = str(client.base_url)
        admin = server.read_until(r"for operators on (http://\S+)").group(1)
        asking = [threads.submit(ask) for _ in range(4)]
        try:
            everybody_asks.wait(60)
            before = tuple(client.post("/loss", json=body).json()["losses"])
            link.unlink()
            link.symlink_to(bundle_of("bart").folder)
            if how == "signal":
                server.process.send_signal(signal.SIGHUP)
                server.read_until("reloaded: m loaded")
            else:
                assert httpx.post(f"{admin}/admin/reload", timeout=60).is_success
            after = tuple(client.post("/loss", json=body).json()["losses"])
        finally:
            stop.set()
        assert before != after
        for answers in (one.result() for one in asking):
            runs = [losses for losses, _ in groupby(answers)]
            assert runs == [before, after], "one change, and nothing in between"
        # Whoever speaks to an operator's port is not asked for more than it offers.
        assert httpx.post(f"{admin}/loss", json=body).status_code == 404
        assert httpx.get(f"{admin}/health/ready").is_success
        assert client.get("/metrics").status_code == 404
        assert "seqloss_reloads_total" in httpx.get(f"{admin}/metrics").text
