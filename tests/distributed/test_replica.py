"""A replica without a Ray: what it refuses, what it reports, and when it is ill."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from fakes import FakeEngine, fake_bundle
from seqloss import cli
from seqloss.batching.loop import Threads
from seqloss.bundle.reader import Bundle
from seqloss.distributed import ray_serve
from seqloss.distributed.ray_serve import Arguments, Replica
from seqloss.errors import BundleError, ConfigurationError, EngineDeadError
from seqloss.http.server import SecondServer
from seqloss.metrics import Metrics
from seqloss.records import Ragged, RequestArrays
from seqloss.runtime import LossRuntime
from seqloss.scorer import ScoreOptions
from seqloss.settings import Settings
from virtual_time import VirtualThread, VirtualTimeLoop


@pytest.fixture(scope="module")
def bundle(export_once: Callable[..., Bundle]) -> Bundle:
    return export_once("marian", "torch")


@asynccontextmanager
async def started(bundle: Bundle, **settings: Any) -> AsyncIterator[Replica]:
    """As Ray Serve starts and stops one."""
    replica = Replica({"marian": bundle.folder}, {"device": "cpu", "admin_port": 0} | settings)
    app = replica.__serve_build_asgi_app__()
    async with app.router.lifespan_context(app):
        yield replica


@pytest.mark.parametrize(
    ("setting", "value"),
    [("host", "::"), ("port", 80), ("tls_certificate_file", "c"), ("tls_key_file", "k")],
)
def test_what_ray_serve_does_is_no_setting(setting: str, value: Any, bundle: Bundle) -> None:
    with pytest.raises(ConfigurationError, match=f"{setting}: connections are Ray Serve's"):
        Replica({"marian": bundle.folder}, {setting: value})


def test_what_ray_serve_does_is_said_of_the_environment(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which may be another program's too."""
    monkeypatch.setenv("SEQLOSS_PORT", "80")
    monkeypatch.setenv("SEQLOSS_TLS_KEY_FILE", "key.pem")
    monkeypatch.setenv("SEQLOSS_DRAIN_DELAY_SECONDS", "1")
    monkeypatch.setattr(ray_serve.logs, "configure", lambda _: None)  # it would end the capture
    Replica({"marian": bundle.folder}, {})
    said = [record.getMessage().split(" in the environment")[0] for record in caplog.records]
    assert said == ["SEQLOSS_PORT", "SEQLOSS_TLS_KEY_FILE", "SEQLOSS_DRAIN_DELAY_SECONDS"]


def test_a_body_has_so_long_to_arrive(bundle: Bundle) -> None:
    """Ray Serve has no such limit."""

    async def asked() -> int:
        async def endless() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        async with started(bundle, receive_timeout_seconds=0.01) as replica:
            await replica.check_health()
            transport = httpx.ASGITransport(replica._served)
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
                headers = {"Content-Type": "application/json"}
                reply = await client.post("/loss", content=endless(), headers=headers)
            return reply.status_code

    assert asyncio.run(asked()) == 408


@pytest.mark.parametrize(
    ("assigned", "threads"),
    [
        ({"CPU": 4.0}, 4),
        ({"CPU": 1.5}, 1),
        ({"CPU": 0.5}, 1),
        ({}, 1),
        ({"CPU": 2.0, "GPU": 1.0}, None),
    ],
)
def test_a_replica_has_the_threads_that_it_was_given(
    assigned: dict[str, float],
    threads: int | None,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = SimpleNamespace(get_assigned_resources=lambda: assigned)
    monkeypatch.setattr(ray_serve.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_serve.ray, "get_runtime_context", lambda: context)
    assert Replica({"marian": bundle.folder}, {})._settings.threads == threads


@pytest.mark.parametrize("name", ["demo", "a.b-c_1", "", "a b", "a/b", "x" * 65, "ä"])
def test_a_model_is_named_as_on_the_command_line(name: str) -> None:
    def is_taken(take: Callable[[], object]) -> bool:
        try:
            take()
        except (ConfigurationError, ValueError):
            return False
        return True

    arguments = {"models": {name: "/models/a"}}
    assert is_taken(lambda: Arguments.model_validate(arguments)) == is_taken(
        lambda: cli._named([f"{name}=/models/a"])
    )


def test_a_setting_that_is_none_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ConfigurationError, match="colour"):
        Replica({"marian": bundle.folder}, {"colour": "blue"})


def test_the_environment_s_settings_hold(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQLOSS_THREADS", "7")
    monkeypatch.setenv("SEQLOSS_MAX_BATCH_TOKENS", "100")
    settings = Replica({"marian": bundle.folder}, {"max_batch_tokens": 200})._settings
    assert (settings.threads, settings.max_batch_tokens) == (7, 200)
    assert settings.admin_port == 8100


def test_a_folder_without_a_bundle_is_refused(tmp_path: Any) -> None:
    with pytest.raises(BundleError):
        Replica({"marian": tmp_path}, {})


def test_it_is_well_once_its_model_is_ready(bundle: Bundle) -> None:
    async def states() -> list[str]:
        async with started(bundle) as replica:
            await replica.check_health()
            return [runtime.state for runtime in replica._served.state.models.values()]

    assert asyncio.run(states()) == ["ready"]


@pytest.mark.parametrize("setting", ["drain_delay_seconds", "drain_timeout_seconds"])
def test_ray_serve_drains(setting: str, bundle: Bundle) -> None:
    with pytest.raises(ConfigurationError, match=f"{setting}: Ray Serve drains replicas"):
        Replica({"marian": bundle.folder}, {setting: 1})


def test_it_ends_once_its_device_is_gone(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    has_ended = asyncio.Event()

    def end(status: int) -> None:
        statuses.append(status)
        has_ended.set()

    monkeypatch.setattr(ray_serve, "_LAST_REPLIES_SECONDS", 0)
    monkeypatch.setattr(ray_serve.os, "_exit", end)

    async def die() -> None:
        async with started(bundle) as replica:
            await replica.check_health()
            replica._died(EngineDeadError("a sticky error"))
            await has_ended.wait()
            await replica.check_health()

    with pytest.raises(EngineDeadError, match="a sticky error"):
        asyncio.run(die())
    assert statuses == [1]


def test_it_ends_once_its_port_for_operators_is_gone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[Exception] = []

    async def lose_it() -> None:
        has_died = asyncio.Event()

        def died(_: Replica, error: Exception) -> None:
            deaths.append(error)
            has_died.set()

        async def ended(_: SecondServer) -> None:
            pass

        monkeypatch.setattr(Replica, "_died", died)
        monkeypatch.setattr(SecondServer, "main_loop", ended)
        async with asyncio.timeout(60), started(bundle, warm_up=False):
            await has_died.wait()

    asyncio.run(lose_it())
    assert [str(error) for error in deaths] == ["the port for operators answers no more"]


def test_a_range_of_ports_ends_where_ports_do(bundle: Bundle) -> None:
    async def begin() -> None:
        async with started(bundle, admin_port=65535):
            pass

    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 65535))
        taken.listen()
        with pytest.raises(ConfigurationError, match=r"cannot listen on .* port 65535"):
            asyncio.run(begin())


def test_it_is_ill_if_its_model_does_not_load(bundle: Bundle) -> None:
    async def load() -> None:
        async with started(bundle, precision="int8") as replica:
            await replica.check_health()

    with pytest.raises(ConfigurationError, match="int8"):
        asyncio.run(load())


def test_it_reports_what_waits_and_how_busy_it_is(bundle: Bundle) -> None:
    async def reported() -> list[dict[str, float]]:
        async with started(bundle) as replica:
            await replica.check_health()
            found = [replica.record_autoscaling_stats()]
            transport = httpx.ASGITransport(replica._served)
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
                pairs = {"source_ids": [[5] * 40] * 40, "target_ids": [[6] * 40] * 40}
                reply = await client.post("/loss", json=pairs)
            assert reply.status_code == 200
            return [*found, replica.record_autoscaling_stats()]

    idle, busy = asyncio.run(reported())
    assert idle == {"queue_tokens": 0, "busy_share": 0.0}
    assert busy["queue_tokens"] == 0
    assert 0 < busy["busy_share"] <= 1


def test_it_is_as_busy_while_a_batch_lasts_as_when_it_ends(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 30 seconds, and a look every 10: else it would seem idle twice, and be stopped."""
    with contextlib.closing(VirtualTimeLoop()) as loop:
        monkeypatch.setattr(ray_serve, "time", SimpleNamespace(monotonic=loop.time))
        replica = Replica({"marian": bundle.folder}, {"device": "cpu"})
        runtime = loop.run_until_complete(runtime_of(loop, batch_seconds=30.0))
        replica._served = FastAPI()
        replica._served.state.models = {"fake": runtime}
        scoring = loop.create_task(runtime.score(*one_pair()))
        loop.settle()
        shares = []
        for _ in range(4):
            loop.advance(10)
            shares.append(replica.record_autoscaling_stats()["busy_share"])
        assert scoring.done()
        loop.run_until_complete(runtime.close())
    assert shares == [1.0, 1.0, 1.0, 0.0]


async def runtime_of(loop: VirtualTimeLoop, batch_seconds: float) -> LossRuntime:
    """A fake model whose batches take so long."""
    runtime = LossRuntime(
        "fake",
        fake_bundle(),
        Settings(warm_up=False),
        Metrics(CollectorRegistry()).model("fake"),
        lambda *_: FakeEngine(lambda _: loop.spend(batch_seconds)),
    )
    device = VirtualThread(loop)
    await runtime.load(Threads(device, VirtualThread(loop)), device)
    runtime.open()
    return runtime


def one_pair() -> tuple[RequestArrays, ScoreOptions]:
    ids = Ragged.from_rows([[5, 6]], np.int64)
    request = RequestArrays(
        source_ids=ids,
        target_ids=ids,
        source_index=np.arange(1),
        source_mask=None,
        target_mask=None,
        decoder_input_ids=None,
        start_ids=None,
        prefix_lengths=np.zeros(1, np.int64),
        pad_token_id=None,
        truncation=False,
    )
    return request, ScoreOptions()


def test_its_metrics_are_on_the_first_port_that_is_free(bundle: Bundle) -> None:
    async def answering(first: int) -> list[int]:
        settings = {"admin_port": first, "warm_up": False}
        found = []
        async with (
            started(bundle, **settings),
            started(bundle, **settings),
            httpx.AsyncClient() as client,
        ):
            for port in range(first, first + 32):
                with contextlib.suppress(httpx.TransportError):
                    reply = await client.get(f"http://127.0.0.1:{port}/metrics", timeout=1)
                    found += [port] if "seqloss_ready" in reply.text else []
        return found

    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens: whoever connects is refused
        port = taken.getsockname()[1]
        ports = asyncio.run(answering(port))
    assert len(ports) == 2
    assert port not in ports
