"""Traces: what a collector gets, and that nothing is paid for where they are off."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.datastructures import Headers

from collector import Collector, collecting
from seqloss.batching.jobs import BatchTimes
from seqloss.http.middleware import RequestRecord
from seqloss.http.tracing import stages_of
from seqloss.scorer import Times
from server import Server

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where a server that is started now sends its spans."""
    with collecting() as collector:
        monkeypatch.setenv("SEQLOSS_TRACES", "true")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield collector


def test_the_spans_of_a_request_add_up_to_it(
    collector: Collector, serve: Callable[..., Server], bundle_of: Any
) -> None:
    server = serve(f"m={bundle_of('demo').folder}", "--device", "cpu")
    body = {
        "source_ids": [[5 + row, 6, 7, 2] for row in range(100)],
        "target_ids": [[8 + row, 9, 10, 2] for row in range(100)],
    }
    header = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "traced"}
    with server.client() as client:
        client.post("/loss", json=body)  # the first one pays for what is made once
        reply = client.post("/loss", json=body, headers=header)
        assert reply.json()["usage"]["batches"] == 1
        spans = collector.wait_for(
            lambda spans: any(one.kind == 2 and of_caller(one) for one in spans)
        )
    mine = [one for one in spans if of_caller(one)]
    (whole,) = filter(is_whole, mine)
    parts = [one for one in mine if one is not whole]
    assert whole.name == "POST /loss"
    assert [one.name for one in sorted(parts, key=lambda one: one.start_time_unix_nano)] == [
        *("receive", "parse", "check", "queue", "collate", "queue", "forward", "scatter"),
        *("reduce", "reply"),
    ]
    assert all(one.parent_span_id == whole.span_id for one in parts)
    assert sum(map(duration, parts)) == pytest.approx(duration(whole), rel=0.05)
    assert max(parts, key=duration).name == "forward"
    attributes = {one.key: one.value for one in whole.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["seqloss.request_id"].string_value == "traced"
    assert attributes["seqloss.pairs"].int_value == 100
    assert collector.resources[0]["service.name"] == "seqloss"


def is_whole(span: Any) -> bool:
    return bool(span.parent_span_id.hex() == PARENT)


def of_caller(span: Any) -> bool:
    return bool(span.trace_id.hex() == TRACE)


def duration(span: Any) -> int:
    return int(span.end_time_unix_nano - span.start_time_unix_nano)


def test_callers_and_operators_say_what_is_traced(
    collector: Collector,
    serve: Callable[..., Server],
    bundle_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A caller that does not sample its trace is followed; names come from the environment."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "losses")
    server = serve(f"m={bundle_of('marian').folder}", "--device", "cpu")
    with server.client() as client:
        client.get("/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        client.get("/models/none", headers={"traceparent": "garbage"})
        collector.wait_for(lambda spans: any(one.name == "GET /models/{name}" for one in spans))
    server.process.send_signal(signal.SIGTERM)
    server.exit_status()
    assert not any(of_caller(one) for one in collector.spans)
    assert collector.resources[0]["service.name"] == "losses"


def record_of(
    times: Times | None, parsed: tuple[float, float] | None = (1.0, 2.0)
) -> RequestRecord:
    return RequestRecord(
        "id", "POST", "/loss", "200", 0.0, 20.0, Headers({}), {}, {}, parsed, times
    )


def test_stages_of_one_batch_leave_no_gap() -> None:
    times = Times(3.0, [BatchTimes(4.0, 5.0, 6.0, 9.0, 10.0, 7)], 12.0)
    stages = list(stages_of(record_of(times)))
    assert [(one.begin, one.end) for one in stages] == [
        *((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 9), (9, 10), (10, 12), (12, 20)),
    ]
    assert {one.num_pairs for one in stages if one.name == "forward"} == {7}


def test_a_request_that_was_refused_has_the_stages_that_it_came_to() -> None:
    assert [one.name for one in stages_of(record_of(None))] == ["receive", "parse", "reply"]
    assert not list(stages_of(record_of(None, None)))


def test_where_traces_are_off_nothing_of_them_is_imported() -> None:
    program = """
import sys
MINE = ("opentelemetry.sdk", "opentelemetry.exporter", "seqloss.http.tracing")
from prometheus_client import CollectorRegistry
from seqloss.http.app import create_app
from seqloss.settings import Settings
create_app({}, Settings(), registry=CollectorRegistry())
print([name for name in sys.modules if name.startswith(MINE)])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_traces_without_the_library_are_refused_with_what_to_install(
    serve: Callable[..., Server], bundle_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    missing = 'import sys\nsys.modules["opentelemetry.sdk"] = None\n'
    (tmp_path / "sitecustomize.py").write_text(missing)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SEQLOSS_TRACES", "true")
    server = serve(f"m={bundle_of('marian').folder}")
    assert server.exit_status() == 2
    assert "pip install 'seqloss[tracing]'" in server.log
