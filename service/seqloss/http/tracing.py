"""OpenTelemetry: a span for each request, and one for each of its stages.

Spans are made when a request has been answered, of times that are noted anyway: while it is under
way tracing does nothing, and where it is off this module is not imported.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from seqloss import __version__
from seqloss.http.middleware import RequestRecord

_NANOSECONDS = 1e9
_SERVER_ERROR = 500
# A service that ends has no more time than its supervisor gives it.
_LAST_SECONDS = 5.0
# It repeats headers that are malformed: anything may stand there.
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)


class Stage(NamedTuple):
    """A part of a request, in seconds of the monotonic clock."""

    name: str
    begin: float
    end: float
    num_pairs: int | None = None


class RequestTracer:
    """Hands spans to an exporter; as the standard variables `OTEL_*` say where that is silent."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Starts the thread that exports.

        Args:
            exporter: where spans go; None for the collector that the environment names, by OTLP
                over HTTP.
        """
        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter,
            )

            exporter = OTLPSpanExporter()
        resource = Resource.create({SERVICE_VERSION: __version__})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "seqloss"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("seqloss", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: RequestRecord) -> None:
        """Makes the spans of a request, as a part of its caller's trace where it names one."""
        if record.is_probe:
            return
        # Both clocks now: between them lies the same for all times of this request.
        epoch = time.time() - time.monotonic()

        def nanoseconds(seconds: float) -> int:
            return round((seconds + epoch) * _NANOSECONDS)

        whole = self._tracer.start_span(
            f"{record.method} {record.route}",
            self._propagator.extract(record.headers),
            trace.SpanKind.SERVER,
            start_time=nanoseconds(record.started),
        )
        if whole.is_recording():
            whole.set_attributes(_attributes_of(record))
            if record.status and int(record.status) >= _SERVER_ERROR:
                whole.set_status(trace.StatusCode.ERROR)
            inside = trace.set_span_in_context(whole)
            for stage in stages_of(record):
                span = self._tracer.start_span(
                    stage.name, inside, start_time=nanoseconds(stage.begin)
                )
                if stage.num_pairs is not None:
                    span.set_attribute("seqloss.batch.pairs", stage.num_pairs)
                span.end(nanoseconds(stage.end))
        whole.end(nanoseconds(record.finished))

    def close(self) -> None:
        """Exports what is left, unless the collector takes too long for it."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_LAST_SECONDS)


def _attributes_of(record: RequestRecord) -> dict[str, str | int | float]:
    """Counts and names, never ids, texts or keys."""
    return {
        "http.request.method": record.method,
        "http.route": record.route,
        "seqloss.request_id": record.request_id,
        **({"http.response.status_code": int(record.status)} if record.status else {}),
        **{f"seqloss.{name}": value for name, value in record.facts.items()},
    }


def stages_of(record: RequestRecord) -> Iterator[Stage]:
    """What a request went through, in order; of one batch they follow on each other without a gap.

    Where a request was computed in several batches, theirs overlap: one is collated while another
    one is computed.
    """
    if record.parsed is None:
        return
    parsing, parsed = record.parsed
    yield Stage("receive", record.started, parsing)
    yield Stage("parse", parsing, parsed)
    if record.times is None:
        yield Stage("reply", parsed, record.finished)
        return
    times = record.times
    yield Stage("check", parsed, times.admitted)
    done = times.admitted
    for batch in times.batches:
        yield Stage("queue", times.admitted, batch.collating, batch.num_pairs)
        yield Stage("collate", batch.collating, batch.collated, batch.num_pairs)
        yield Stage("queue", batch.collated, batch.computing, batch.num_pairs)
        yield Stage("forward", batch.computing, batch.computed, batch.num_pairs)
        yield Stage("scatter", batch.computed, batch.scattered, batch.num_pairs)
        done = batch.scattered
    yield Stage("reduce", done, times.reduced)
    yield Stage("reply", times.reduced, record.finished)
