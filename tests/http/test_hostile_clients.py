"""Clients that send too much, too slowly or not at all: a real server, and others who use it."""

from __future__ import annotations

import json
import re
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import Server

BODY = json.dumps({"source_ids": [[1, 2, 3]], "target_ids": [[4, 5]]}).encode()
# Takes some ten batches: its client is gone before it is answered.
LARGE_BODY = json.dumps(
    {
        "source_ids": [[3 + index % 40, 4 + index // 40, *[5] * 10] for index in range(1500)],
        "target_ids": [[6] * 12] * 1500,
    }
).encode()
HEAD = b"POST /loss HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
RECEIVE_TIMEOUT_SECONDS = 2
MAX_BODY_BYTES = 8 * 1024 * 1024
# Open files that the server is allowed; some are kept for other things than connections.
MAX_FILES = 512


def request(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


class Target:
    """A server for hostile clients, and how others fare on it."""

    def __init__(self, server: Server) -> None:
        self._process_folder = Path("/proc") / str(server.process.pid)
        self._url = httpx.URL(server.address)
        # A connection for each request: others come and go.
        self.client = httpx.Client(
            base_url=self._url, timeout=30, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self.num_files = self._num_files()

    def connect(self) -> socket.socket:
        return socket.create_connection((self._url.host, self._url.port), timeout=30)

    def assert_responsive(self) -> None:
        assert self.client.get("/health/ready").status_code == 200
        headers = {"Content-Type": "application/json"}
        reply = self.client.post("/loss", content=BODY, headers=headers)
        assert reply.status_code == 200, reply.text

    def assert_nothing_stays(self) -> None:
        """Fails by running out of time."""
        self.assert_responsive()  # so all who connected before have been let in
        while self._num_files() > self.num_files or any(
            self._gauge(name) for name in ("inflight_requests", "queue_pairs", "queue_tokens")
        ):
            self.assert_responsive()

    def _gauge(self, name: str) -> float:
        text = self.client.get("/metrics").text
        found = re.search(rf"^seqloss_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def _num_files(self) -> int:
        return len(list((self._process_folder / "fd").iterdir()))

    def peak_memory_bytes(self) -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", (self._process_folder / "status").read_text())
        assert found
        return int(found[1]) * 1024


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with ExitStack() as stack:
        with most_files(MAX_FILES):
            server = Server.with_fault(
                "healthy",
                receive_timeout_seconds=RECEIVE_TIMEOUT_SECONDS,
                max_body_bytes=MAX_BODY_BYTES,
            )
        stack.callback(server.process.communicate)
        stack.callback(server.process.kill)
        target = Target(server)
        stack.enter_context(target.client)
        target.assert_responsive()
        yield target


@contextmanager
def most_files(number: int) -> Iterator[None]:
    """Processes started meanwhile may have so many files open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def read_reply(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    with connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers = dict(
            line.strip().lower().split(b": ", 1) for line in iter(stream.readline, b"\r\n")
        )
        return status, json.loads(stream.read(int(headers[b"content-length"])))


# ---------------------------------------------------------------- too much


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_100_megabytes_is_refused_and_never_held(target: Target, announced: bool) -> None:
    before = target.peak_memory_bytes()
    with target.connect() as connection:
        piece = b" " * 1_000_000
        if announced:
            connection.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n")
            # Nothing of it was sent, and the answer is there.
            assert_too_large(connection)
        else:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        for number in range(100):
            connection.sendall(piece)
            if number == 20 and not announced:
                assert_too_large(connection)
        target.assert_responsive()
    assert target.peak_memory_bytes() - before < 50_000_000
    target.assert_nothing_stays()


def assert_too_large(connection: socket.socket) -> None:
    status, problem = read_reply(connection)
    assert (status, problem["code"]) == (413, "request_too_large")


# ---------------------------------------------------------------- too slowly

# What is sent at once, what then comes a little at a time, and the statuses of the replies.
SLOW: dict[str, tuple[bytes, bytes, list[int]]] = {
    "nothing": (b"", b"", []),
    "headers": (HEAD + b"X-Padding: ", b"x", []),
    "headers of a second request": (request(BODY) + HEAD + b"X-Padding: ", b"x", [200]),
    "a body": (HEAD + b"Content-Length: 100000\r\n\r\n", b" ", [408]),
    "a body in chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", [408]),
    "a body after its refusal": (
        HEAD.replace(b"/loss", b"/nowhere") + b"Content-Length: 100000\r\n\r\n",
        b" ",
        [404],
    ),
}


@pytest.mark.parametrize("kind", SLOW)
def test_slow_senders_are_let_go_and_hold_nobody_up(target: Target, kind: str) -> None:
    beginning, drop, statuses = SLOW[kind]
    with ExitStack() as stack:
        senders = {stack.enter_context(target.connect()): b"" for _ in range(50)}
        for sender in senders:
            sender.sendall(beginning)
            sender.setblocking(False)
        sending = set(senders)
        while sending:
            target.assert_responsive()
            for sender in list(sending):
                with suppress(ConnectionError):  # the last reply can be read even so
                    sender.send(drop)
                try:
                    received = sender.recv(65536)
                except BlockingIOError:
                    continue
                except ConnectionError:
                    received = b""
                senders[sender] += received
                if not received:
                    sending.remove(sender)
        for received in senders.values():
            assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", received)] == statuses
            assert (b'"code":"body_timeout"' in received) == (408 in statuses)
    target.assert_nothing_stays()


def test_who_never_reads_his_replies_is_let_go(target: Target) -> None:
    """uvicorn would wait until they are read."""
    requests = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000
    with target.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(requests)
        assert connection.recv(1)
        target.assert_nothing_stays()


def test_those_who_connect_find_room_when_others_hold_all_there_is(target: Target) -> None:
    with ExitStack() as stack:
        for _ in range(MAX_FILES + 100):
            stack.enter_context(target.connect())
        target.assert_responsive()
        with target.connect() as connection:
            connection.sendall(request(BODY))
            assert read_reply(connection)[0] == 200
    target.assert_nothing_stays()


# ---------------------------------------------------------------- not at all


def test_clients_that_vanish_leave_nothing_behind(target: Target) -> None:
    for number in range(100):
        whole = request(LARGE_BODY if number % 2 else BODY)
        sent = (len(HEAD) // 2, len(whole) // 2, len(whole))[number % 3]
        with target.connect() as connection:
            if number % 4 < 2:  # by a reset, as when a machine or a middlebox gives up
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(whole[:sent])
    target.assert_nothing_stays()
    target.assert_responsive()
