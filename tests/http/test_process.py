"""`seqloss serve` as its user runs it: a process, a port, signals."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from seqloss.bundle.manifest import MANIFEST_NAME
from seqloss.http.server import listen
from server import Server

Serve = Callable[..., Server]


def test_a_bundle_is_served_until_sigterm(serve: Serve, bundle_of: Any) -> None:
    server = serve(f"named={bundle_of('marian').folder}", "--device", "cpu")
    with server.client() as client:
        body = {"source_ids": [[1, 2, 3]], "target_ids": [[4, 5]]}
        reply = client.post("/loss", json=body)
        assert reply.status_code == 200
        assert reply.json()["model"] == "named"
        assert client.get("/health/ready").json() == {"status": "ready"}
        assert "seqloss_ready" in client.get("/metrics").text
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_status() in (0, -signal.SIGTERM)


def test_replies_do_not_wait_for_acknowledgements() -> None:
    """With Nagle's algorithm a reply's last packet came 40 ms after the others."""

    async def accepted() -> int:
        connected = asyncio.get_running_loop().create_future()

        def connect(_: object, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            connected.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with contextlib.closing(listen("127.0.0.1", [0])) as listener:
            async with await asyncio.start_server(connect, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                option = await connected
                writer.close()
        return int(option)

    assert asyncio.run(accepted())


def large_request(num_pairs: int) -> dict[str, Any]:
    """All of them different: equal pairs are computed once."""
    targets = [[2 + index % 90, 2 + index // 90] * 20 for index in range(num_pairs)]
    return {"source_ids": [[1] * 40] * num_pairs, "target_ids": targets}


@pytest.mark.parametrize(("drain_seconds", "expected"), [("60", 200), ("0", 503)])
def test_everybody_who_waits_when_sigterm_comes_gets_an_answer(
    drain_seconds: str,
    expected: int,
    serve: Serve,
    bundle_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEQLOSS_DRAIN_TIMEOUT_SECONDS", drain_seconds)
    if expected == 200:  # a body that is still being read is admitted during the delay
        monkeypatch.setenv("SEQLOSS_DRAIN_DELAY_SECONDS", "2")
    # A pair a batch: a request takes long enough for all six to be there at once.
    server = serve(str(bundle_of("marian").folder), "--max-batch-tokens", "64")
    with server.client() as client, ThreadPoolExecutor(6) as threads:

        def ask() -> httpx.Response:
            return client.post("/loss", json=large_request(150), timeout=300)

        waiting = [threads.submit(ask) for _ in range(6)]
        end = time.monotonic() + 300
        while "inflight_requests 6.0" not in client.get("/metrics").text:
            assert time.monotonic() < end, "they were never there at once"
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        replies = [future.result() for future in waiting]
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) <= {200, expected}
    assert expected in statuses
    for reply in replies:
        if reply.status_code == 503:
            assert reply.json()["code"] == "not_ready"
            assert reply.headers["retry-after"]
    assert server.exit_status() in (0, -signal.SIGTERM)
    assert "Traceback" not in server.log


def test_an_address_in_use_is_refused_at_once(serve: Serve, bundle_of: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = serve(str(bundle_of("marian").folder), port=port)
        assert server.exit_status() == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in server.log
    assert "Traceback" not in server.log


def changed_copy(bundle: Any, folder: Path, old: str, new: str) -> Path:
    """A bundle with another manifest; its files are untouched."""
    shutil.copytree(bundle.folder, folder)
    manifest = folder / MANIFEST_NAME
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new, 1))
    return folder


def test_wrong_numbers_end_the_process(serve: Serve, bundle_of: Any, tmp_path: Path) -> None:
    """A device that does not compute what the bundle states must not serve."""
    bundle = bundle_of("marian")
    nll = bundle.manifest.self_test.token_nlls[0][0]
    changed = changed_copy(bundle, tmp_path / "b", repr(nll), repr(nll + 0.01))
    server = serve(str(changed), "--precision", "float32")
    assert server.exit_status() == 1
    assert "self-test" in server.log
    assert "is ready" not in server.log


def test_a_manifest_that_promises_too_many_ids_ends_the_process(
    serve: Serve, bundle_of: Any, tmp_path: Path
) -> None:
    bundle = changed_copy(bundle_of("marian"), tmp_path / "b", '"source": 101', '"source": 102')
    server = serve(str(bundle))
    assert server.exit_status() == 1
    assert "102 for sources" in server.log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "is not a folder"),
        (["service"], "seqloss export"),
        (["a=service", "a=tests"], "two bundles"),
        (["=service"], "cannot name a model"),
        (["a/b=service"], "cannot name a model"),
        (["BUNDLE", "--device", "tpu"], "auto, cpu or cuda:N"),
        (["BUNDLE", "--max-batch-tokens", "few"], "max_batch_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(
    arguments: list[str], words: str, serve: Serve, bundle_of: Any
) -> None:
    folder = str(bundle_of("marian").folder)
    server = serve(*[folder if word == "BUNDLE" else word for word in arguments])
    assert server.exit_status() == 2
    assert words in server.log
    assert "Traceback" not in server.log


def test_cuda_without_a_gpu_is_refused_in_words(serve: Serve, bundle_of: Any) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    server = serve(str(bundle_of("marian").folder), "--device", "cuda:0")
    assert server.exit_status() == 1
    assert "finds no NVIDIA GPU" in server.log
