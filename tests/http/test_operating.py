"""What an operator sets: a second port, TLS, browsers of other origins, the log."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from seqloss.logs import FIELDS, JsonFormatter, TextFormatter, WaitingLines
from server import Server

GOOD = {"source_ids": [[3, 4]], "target_ids": [[5, 2]]}
Serve = Callable[..., Server]


# ---------------------------------------------------------------- a second port


def test_health_and_metrics_outlive_the_first_port(serve: Serve, bundle_of: Any) -> None:
    """While the service drains, somebody can see that it does."""
    server = serve(f"m={bundle_of('marian').folder}", "--device", "cpu", "--admin-port", "0")
    with server.client() as client:
        admin = server.read_until(r"for operators on (http://\S+)").group(1)
        assert client.get("/health/ready").is_success
        assert client.get("/metrics").status_code == 404
        assert client.post("/admin/reload").status_code == 404
        assert httpx.get(f"{admin}/health/live").is_success
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_status() in (0, -signal.SIGTERM)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{admin}/health/live")


def test_an_address_in_use_is_said_for_either_port(serve: Serve, bundle_of: Any) -> None:
    bundle = f"m={bundle_of('marian').folder}"
    first = serve(bundle, "--device", "cpu", "--admin-port", "0")
    port = int(first.read_until(r"for operators on http://\S+:(\d+)").group(1))
    second = serve(bundle, "--admin-port", str(port))
    assert second.exit_status() == 2
    assert f"port {port}" in second.log


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    kind = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=seqloss"
    whose = "-addext subjectAltName=IP:127.0.0.1"
    command = ["openssl", "req", "-x509", *kind.split(), *whose.split()]
    command += ["-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True)
    return files


def test_tls_is_spoken_where_a_certificate_is_given(
    serve: Serve, bundle_of: Any, certificate: tuple[Path, Path]
) -> None:
    flags = ["--tls-certificate-file", str(certificate[0]), "--tls-key-file", str(certificate[1])]
    server = serve(f"m={bundle_of('marian').folder}", "--device", "cpu", *flags)
    address = server.read_until(r"listening on (https://\S+)").group(1)
    server.read_until("is ready on")
    trusting = ssl.create_default_context(cafile=certificate[0])
    assert httpx.post(f"{address}/loss", json=GOOD, verify=trusting).is_success
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{address.replace('https', 'http')}/health/live")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tls-certificate-file", "{certificate}"), "tls_key_file is missing"),
        (("--tls-key-file", "{key}"), "tls_certificate_file is missing"),
        (
            ("--tls-certificate-file", "{certificate}", "--tls-key-file", "{certificate}"),
            "TLS cannot be had",
        ),
        (("--tls-certificate-file", "none.pem", "--tls-key-file", "{key}"), "No such file"),
    ],
)
def test_tls_that_cannot_be_had_is_said_at_once(
    serve: Serve,
    bundle_of: Any,
    certificate: tuple[Path, Path],
    flags: tuple[str, ...],
    said: str,
) -> None:
    names = {"certificate": certificate[0], "key": certificate[1]}
    filled = [flag.format(**names) for flag in flags]
    server = serve(f"m={bundle_of('marian').folder}", *filled)
    assert server.exit_status() == 2
    assert said in server.log


# ---------------------------------------------------------------- other origins


def preflight(client: Any, origin: str) -> Any:
    return client.options(
        "/loss",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type, x-api-key",
        },
    )


def test_pages_of_other_origins_are_refused_by_default(client: Any) -> None:
    assert preflight(client, "https://a.example").status_code == 405
    reply = client.post("/loss", json=GOOD, headers={"Origin": "https://a.example"})
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_pages_of_named_origins_may_ask(make_client: Any, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text('[tenants.a]\nkeys = ["a-key-of-sixteen-and-more"]')
    client = make_client(
        cors_origins="https://a.example,https://b.example", api_keys_file=tmp_path / "keys.toml"
    )
    reply = preflight(client, "https://b.example")
    assert reply.status_code == 200, "a browser asks for leave without the key"
    assert reply.headers["access-control-allow-origin"] == "https://b.example"
    assert preflight(client, "https://c.example").status_code == 400
    headers = {"Origin": "https://a.example"}
    refused = client.post("/loss", json=GOOD, headers=headers)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    headers["X-API-Key"] = "a-key-of-sixteen-and-more"
    reply = client.post("/loss", json=GOOD, headers=headers)
    assert reply.status_code == 200
    assert "X-Request-ID" in reply.headers["access-control-expose-headers"]


# ---------------------------------------------------------------- the log


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [
        getattr(record, FIELDS) for record in caplog.records if record.name == "seqloss.requests"
    ]


def test_each_request_has_a_line(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client.post("/loss", json=GOOD | {"priority": "bulk"}, headers={"X-Request-ID": "mine"})
    client.post("/loss", json=GOOD | {"target_ids": [[99]]})
    client.get("/health/ready")
    client.get("/metrics")
    scored, refused = lines_of(caplog)
    times = {name: scored.pop(name) for name in list(scored) if name.endswith("_ms")}
    assert scored == {
        "request_id": "mine",
        "method": "POST",
        "route": "/loss",
        "status": 200,
        "tenant": "anonymous",
        "model": "fake",
        "priority": "bulk",
        "pairs": 1,
        "bad_pairs": 0,
        "source_tokens": 2,
        "target_tokens": 2,
        "encoded_sources": 1,
        "batches": 1,
    }
    assert set(times) == {"parse_ms", "queue_ms", "compute_ms", "total_ms"}
    assert (refused["status"], refused["code"]) == (422, "invalid_request")


def test_requests_can_go_without_a_line(make_client: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_client(log_requests=False).post("/loss", json=GOOD)
    assert not lines_of(caplog)


def record_of(message: str, **fields: object) -> logging.LogRecord:
    record = logging.LogRecord("a.b", logging.WARNING, "f.py", 1, message, (), None)
    setattr(record, FIELDS, fields)
    return record


def test_a_line_for_people_ends_with_its_fields() -> None:
    line = TextFormatter().format(record_of("answered", status=200, route="/loss"))
    assert re.fullmatch(r"[\d-]+ [\d:,]+ WARNING a.b: answered status=200 route=/loss", line)


def test_a_line_for_programs_is_json_whatever_is_in_it() -> None:
    record = record_of('two\nlines and "quotes"', path=Path("/x"))
    try:
        raise ValueError("wrong")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    parsed = orjson.loads(line)
    assert parsed["message"] == 'two\nlines and "quotes"'
    assert (parsed["level"], parsed["logger"], parsed["path"]) == ("WARNING", "a.b", "/x")
    assert parsed["time"].endswith("+00:00")
    assert parsed["exception"].endswith("ValueError: wrong")


def test_every_line_of_a_service_is_json_where_that_is_asked_for(
    serve: Serve, bundle_of: Any
) -> None:
    server = serve(f"m={bundle_of('marian').folder}", "--device", "cpu", "--log-format", "json")
    with server.client() as client:
        assert client.post("/loss", json=GOOD).is_success
    server.process.send_signal(signal.SIGTERM)
    server.exit_status()
    lines = [orjson.loads(line) for line in server.log.splitlines()]
    assert [line["route"] for line in lines if line["logger"] == "seqloss.requests"] == ["/loss"]


def logger_to(handler: WaitingLines) -> logging.Logger:
    logger = logging.Logger("seqloss.waiting")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    return logger


def test_nobody_waits_for_who_reads_the_log() -> None:
    """A full pipe holds up its writer for ever."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as reader, os.fdopen(writing, "w") as writer:
        handler = WaitingLines(writer, most_waiting=10)
        logger = logger_to(handler)
        fillers = 200
        for index in range(fillers):
            logger.info("%d %s", index, "x" * 4096)
        # Somebody reads again, and every line is there or is counted.
        read: list[str] = []
        reads = threading.Thread(target=lambda: read.extend(reader))
        reads.start()
        handler.flush()
        logger.info("%d the last", fillers)
        handler.close()
        writer.close()
        reads.join()
    lost = [int(match[1]) for line in read if (match := re.match(r"(\d+) lines of", line))]
    whole = [int(line.split()[0]) for line in read if line.endswith(("x\n", "last\n"))]
    assert whole == sorted(set(whole))
    assert whole[-1] == fillers
    assert sum(lost) > 0
    assert len(whole) + sum(lost) == fillers + 1


def test_whoever_stopped_to_read_does_not_keep_the_service_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("seqloss.logs._LAST_SECONDS", 0.05)
    reading, writing = os.pipe()
    with os.fdopen(reading) as reader:
        writer = os.fdopen(writing, "w")
        handler = WaitingLines(writer, most_waiting=3)
        logger = logger_to(handler)
        for _ in range(50):
            logger.info("x" * 4096)
        handler.close()
        drain = threading.Thread(target=reader.read)
        drain.start()
        handler._thread.join()
        writer.close()
        drain.join()


def test_a_log_that_nobody_can_read_any_more_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = os.fdopen(writing, "w")
    handler = WaitingLines(writer)
    logger_to(handler).info("to nobody")
    handler.close()
    with contextlib.suppress(BrokenPipeError):
        writer.close()


class FullDisk(io.StringIO):
    """Has no room at first."""

    refusals = 2

    def write(self, text: str) -> int:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.ENOSPC, "no space left on device")
        return super().write(text)


def test_a_disk_that_was_full_gets_the_next_lines_and_how_many_it_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("seqloss.logs._PAUSE_SECONDS", 0.0)
    stream = FullDisk()
    handler = WaitingLines(stream)
    logger = logger_to(handler)
    for word in ("one", "two", "three"):
        logger.info(word)
        handler.flush()
    handler.close()
    assert stream.getvalue() == "2 lines of the log were lost: nobody read them\nthree\n"


def test_all_that_was_logged_is_written_before_a_signal_ends_the_process(
    serve: Serve, bundle_of: Any
) -> None:
    server = serve(f"m={bundle_of('marian').folder}", "--device", "cpu")
    with server.client() as client:
        for index in range(200):
            client.post("/loss", json=GOOD, headers={"X-Request-ID": f"r{index}."})
    server.process.send_signal(signal.SIGTERM)
    server.exit_status()
    assert all(f"request_id=r{index}. " in server.log for index in range(200))
    assert "got SIGTERM" in server.log
    assert "Finished server process" in server.log


def test_two_ports_cannot_be_one(serve: Serve, bundle_of: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    server = serve(f"m={bundle_of('marian').folder}", "--admin-port", port, port=int(port))
    assert server.exit_status() == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in server.log
