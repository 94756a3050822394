"""A replica without a Ray: what it refuses, what it reports, and when it is ill."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from seqloss.bundle.reader import Bundle
from seqloss.distributed import ray_serve
from seqloss.distributed.ray_serve import Replica
from seqloss.errors import BundleError, ConfigurationError, EngineDeadError


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
    [("host", "::"), ("port", 80), ("tls_key_file", "k"), ("receive_timeout_seconds", 1)],
)
def test_what_ray_serve_does_is_no_setting(setting: str, value: Any, bundle: Bundle) -> None:
    with pytest.raises(ConfigurationError, match=f"{setting}: connections are Ray Serve's"):
        Replica({"marian": bundle.folder}, {setting: value})


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
