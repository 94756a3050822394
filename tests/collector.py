"""An OpenTelemetry collector that remembers: OTLP over HTTP, on a port of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

_PATIENCE_SECONDS = 300


class Collector:
    """Every span that came, and the bytes that it came in."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.bodies = b""
        self.address = ""
        self._changed = threading.Condition()

    def take(self, body: bytes) -> None:
        export = ExportTraceServiceRequest.FromString(body)
        with self._changed:
            self.bodies += body
            for of_resource in export.resource_spans:
                attributes = of_resource.resource.attributes
                self.resources.append({one.key: one.value.string_value for one in attributes})
                for of_scope in of_resource.scope_spans:
                    self.spans.extend(of_scope.spans)
            self._changed.notify_all()

    def wait_for(self, found: Callable[[list[Span]], bool]) -> list[Span]:
        """All spans, once they are as wanted."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with self._changed:
            while not found(self.spans):
                assert self._changed.wait(deadline - time.monotonic()), "no such spans came"
            return list(self.spans)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector for as long as it lasts."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    collector.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
