"""Every metric of the service, in one place; the registry is injected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from seqloss.records import Batch, Priority

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_SIZES = tuple(float(2**power) for power in range(15))
_NATS = (0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20)


BatchReason = Literal["full", "idle", "drain"]
ReloadOutcome = Literal["loaded", "unchanged", "failed"]


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What there is to count of a batch that was computed."""

    num_pairs: int
    num_sources: int
    source_tokens: int
    padded_source_tokens: int
    grid_source_tokens: int
    target_tokens: int
    padded_target_tokens: int
    collate_seconds: float
    forward_seconds: float
    scatter_seconds: float

    @classmethod
    def of(
        cls,
        batch: Batch,
        num_pairs: int,
        seconds: tuple[float, float, float],
        source_multiple: int = 1,
        *,
        is_packed: bool = False,
    ) -> BatchReport:
        """Counts a batch.

        Args:
            batch: what was computed.
            num_pairs: that were answered with it; equal ones are one target of the batch.
            seconds: to collate it, to compute it, and to scatter its terms.
            source_multiple: what sources are padded to multiples of.
            is_packed: whether the engine pads nothing.
        """
        sources, targets = batch.sources, batch.decoder_input_ids
        longest, longest_target = int(sources.lengths.max()), int(targets.lengths.max())
        on_grid = -(-longest // source_multiple) * source_multiple
        collate, forward, scatter = seconds
        return cls(
            num_pairs=num_pairs,
            num_sources=len(sources),
            source_tokens=len(sources.values),
            padded_source_tokens=len(sources.values) if is_packed else len(sources) * longest,
            grid_source_tokens=len(sources) * (on_grid - longest),
            target_tokens=len(targets.values),
            padded_target_tokens=(
                len(targets.values) if is_packed else len(targets) * longest_target
            ),
            collate_seconds=collate,
            forward_seconds=forward,
            scatter_seconds=scatter,
        )


class _NllCollector(Collector):
    """Histograms filled with a count per bucket, never with an `observe` per token."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation
        self._counts: dict[tuple[str, str], tuple[NDArray[np.int64], float]] = {}

    def add(self, labels: tuple[str, str], values: NDArray[np.floating]) -> None:
        """Counts finite values, in nats."""
        values = values[np.isfinite(values)]
        # A bucket holds what is at most its bound.
        bucket = np.searchsorted(np.array(_NATS), values, side="left")
        counts, total = self._counts.get(labels, (np.zeros(len(_NATS) + 1, np.int64), 0.0))
        self._counts[labels] = (
            counts + np.bincount(bucket, minlength=len(_NATS) + 1),
            total + float(values.sum(dtype=np.float64)),
        )

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=["model", "stream"])
        bounds = [*map(str, map(float, _NATS)), "+Inf"]
        for labels, (counts, total) in self._counts.items():
            buckets = list(zip(bounds, map(float, np.cumsum(counts)), strict=True))
            family.add_metric(list(labels), buckets, total)
        yield family


class Metrics:
    """All families of the service; `model(name)` is what one model's code reports to."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def histogram(
            name: str, text: str, labels: list[str], buckets: tuple[float, ...]
        ) -> Histogram:
            return Histogram(f"seqloss_{name}", text, labels, registry=registry, buckets=buckets)

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"seqloss_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: list[str]) -> Gauge:
            return Gauge(f"seqloss_{name}", text, labels, registry=registry)

        self.http_request_duration = histogram(
            "http_request_duration_seconds",
            "From the first byte of a request to the last byte of its reply",
            ["route", "method", "status"],
            _SECONDS,
        )
        self.parse_duration = histogram(
            "parse_duration_seconds", "From a body to arrays", ["format"], _SECONDS
        )
        self.request_duration = histogram(
            "request_duration_seconds",
            "From a parsed request to its reduced losses",
            ["model", "priority"],
            _SECONDS,
        )
        self.queue_wait = histogram(
            "queue_wait_seconds",
            "From admission to a request's first batch",
            ["model", "priority"],
            _SECONDS,
        )
        self.compute_duration = Summary(
            "seqloss_compute_duration_seconds",
            "Of the batches that held pairs of a request, other requests' share included",
            ["model"],
            registry=registry,
        )
        self.batch_duration = histogram(
            "batch_duration_seconds", "Stages of a batch", ["model", "stage"], _SECONDS
        )
        self.batch_pairs = histogram("batch_pairs", "Targets in a batch", ["model"], _SIZES)
        self.batch_padded_tokens = histogram(
            "batch_padded_tokens", "Tokens of a batch, padding included", ["model", "side"], _SIZES
        )
        self.tokens = counter(
            "tokens_total", "Tokens that went through the model", ["model", "side", "kind"]
        )
        self.pairs = counter(
            "pairs_total", "Pairs answered, by outcome", ["model", "priority", "outcome"]
        )
        self.batches = counter("batches_total", "Batches computed", ["model", "reason"])
        self.encoder_reuse = counter(
            "encoder_reuse_total", "Pairs whose source was encoded for another one", ["model"]
        )
        self.rejected = counter("rejected_total", "Requests refused", ["code"])
        self.cancelled_pairs = counter(
            "cancelled_pairs_total", "Pairs whose client went away or ran out of time", ["model"]
        )
        self.tenant_tokens = counter(
            "tenant_tokens_total", "Tokens that were computed for a tenant", ["tenant"]
        )
        self.reloads = counter("reloads_total", "Bundles loaded anew", ["model", "outcome"])
        self.deadline_missed = counter(
            "deadline_missed_total", "Requests whose timeout passed", ["model"]
        )
        self.oom = counter("oom_total", "Batches that did not fit the device", ["model"])
        self.non_finite = counter("non_finite_total", "Pairs with NaN or infinity", ["model"])
        self.batch_splits = counter(
            "batch_splits_total", "Batches halved since they did not fit the device", ["model"]
        )
        self.queue = {
            name: gauge(name, text, ["model"])
            for name, text in (
                ("queue_pairs", "Pairs in no batch yet"),
                ("queue_tokens", "Tokens admitted and not computed"),
                ("queue_oldest_age_seconds", "Since the oldest request was admitted"),
                ("estimated_wait_seconds", "What all that waits takes at the measured rate"),
                ("token_budget", "Padded tokens that the device is given at a time"),
            )
        }
        self.device_memory = gauge(
            "device_memory_bytes", "Memory of a GPU, as the engine counts it", ["device", "kind"]
        )
        self.event_loop_lag = histogram(
            "event_loop_lag_seconds",
            "How much later than asked for the event loop goes on",
            [],
            _SECONDS,
        )
        self.inflight_requests = gauge("inflight_requests", "Scoring requests under way", [])
        self.ready = gauge("ready", "1 while the model takes requests", ["model"])
        self.build_info = gauge(
            "build_info",
            "1, with what is served as labels",
            ["model", "version", "engine", "device", "precision", "bundle_digest"],
        )
        self.kernels = gauge(
            "compiled_kernels",
            "1 where kernels compiled for this CPU compute, 0 where the engine's own operators do",
            ["model"],
        )
        self.token_nll = _NllCollector("seqloss_token_nll", "Nll of counted tokens, in nats")
        self.pair_mean_nll = _NllCollector("seqloss_pair_mean_nll", "Mean nll of pairs, in nats")
        registry.register(self.token_nll)
        registry.register(self.pair_mean_nll)

    def model(self, name: str) -> ModelMetrics:
        """The metrics of one model."""
        return ModelMetrics(self, name)


@dataclass(frozen=True, slots=True)
class ModelTotals:
    """What there was of a model since the start."""

    num_requests: int
    request_seconds: float
    queue_seconds: float
    compute_seconds: float
    num_pairs: int
    num_batches: int
    collate_seconds: float
    scatter_seconds: float


class ModelMetrics:
    """What the code around one model reports; it never names a label."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        # The first of a rare event is an increase, too.
        for counter in (
            metrics.cancelled_pairs,
            metrics.deadline_missed,
            metrics.oom,
            metrics.batch_splits,
            metrics.non_finite,
        ):
            counter.labels(model)
        for outcome in get_args(ReloadOutcome):
            metrics.reloads.labels(model, outcome)

    def watch_queue(self, state: Callable[[], Mapping[str, float]]) -> None:
        """Gauges of the queue show what `state` returns whenever they are read."""
        for name, gauge in self._metrics.queue.items():
            gauge.labels(self._model).set_function(partial(lambda name: state()[name], name))

    def device_memory(self, device: str, num_bytes: Mapping[str, int]) -> None:
        """What the engine holds of the device's memory, by kind."""
        for kind, count in num_bytes.items():
            self._metrics.device_memory.labels(device, kind).set(count)

    def queue_wait(self, priority: Priority, seconds: float) -> None:
        """A request's first batch begins."""
        self._metrics.queue_wait.labels(self._model, priority).observe(seconds)

    def batch(self, report: BatchReport, reason: BatchReason) -> None:
        """A batch was computed; the reason says why it was not larger."""
        metrics, model = self._metrics, self._model
        for stage, seconds in (
            ("collate", report.collate_seconds),
            ("forward", report.forward_seconds),
            ("scatter", report.scatter_seconds),
        ):
            metrics.batch_duration.labels(model, stage).observe(seconds)
        metrics.batches.labels(model, reason).inc()
        metrics.batch_pairs.labels(model).observe(report.num_pairs)
        metrics.encoder_reuse.labels(model).inc(report.num_pairs - report.num_sources)
        for side, real, padded in (
            ("source", report.source_tokens, report.padded_source_tokens),
            ("target", report.target_tokens, report.padded_target_tokens),
        ):
            metrics.batch_padded_tokens.labels(model, side).observe(padded)
            metrics.tokens.labels(model, side, "real").inc(real)
            metrics.tokens.labels(model, side, "padding").inc(padded - real)
        if report.grid_source_tokens:
            metrics.tokens.labels(model, "source", "grid").inc(report.grid_source_tokens)

    def request(self, priority: Priority, seconds: float, compute_seconds: float) -> None:
        """A request was scored, with batches that took so long."""
        self._metrics.request_duration.labels(self._model, priority).observe(seconds)
        self._metrics.compute_duration.labels(self._model).observe(compute_seconds)

    def pairs(self, priority: Priority, outcome: str, count: int) -> None:
        """Pairs were answered; the outcome is `scored` or a `Fault.code`."""
        if count:
            self._metrics.pairs.labels(self._model, priority, outcome).inc(count)

    def losses(
        self, stream: str, token_nlls: NDArray[np.floating], pair_means: NDArray[np.floating]
    ) -> None:
        """Feeds the drift histograms."""
        self._metrics.token_nll.add((self._model, stream), token_nlls)
        self._metrics.pair_mean_nll.add((self._model, stream), pair_means)

    def cancelled(self, num_pairs: int) -> None:
        """Pairs nobody waits for any more."""
        self._metrics.cancelled_pairs.labels(self._model).inc(num_pairs)

    def deadline_missed(self) -> None:
        """A request's timeout passed."""
        self._metrics.deadline_missed.labels(self._model).inc()

    def out_of_memory(self) -> None:
        """A batch did not fit the device."""
        self._metrics.oom.labels(self._model).inc()

    def batch_split(self) -> None:
        """A batch goes on as two halves."""
        self._metrics.batch_splits.labels(self._model).inc()

    def non_finite(self, num_pairs: int) -> None:
        """Pairs for which the model produced NaN or infinity."""
        self._metrics.non_finite.labels(self._model).inc(num_pairs)

    def tenant_tokens(self, tenant: str, num_tokens: int) -> None:
        """Tokens of both sides that a tenant had computed."""
        self._metrics.tenant_tokens.labels(tenant).inc(num_tokens)

    def reloaded(self, outcome: ReloadOutcome) -> None:
        """Somebody asked for the bundle to be loaded anew."""
        self._metrics.reloads.labels(self._model, outcome).inc()

    def ready(self, ready: bool) -> None:
        """Whether the model takes requests."""
        self._metrics.ready.labels(self._model).set(ready)

    def built(self, version: str, engine: str, device: str, precision: str, digest: str) -> None:
        """What is served, in place of what was."""
        self._metrics.build_info.remove_by_labels({"model": self._model})
        self._metrics.build_info.labels(
            self._model, version, engine, device, precision, digest
        ).set(1)

    def watch_kernels(self, has_kernels: Callable[[], bool]) -> None:
        """The gauge shows what `has_kernels` returns whenever it is read."""
        self._metrics.kernels.labels(self._model).set_function(has_kernels)

    def totals(self) -> ModelTotals:
        """Sums over priorities; pairs and requests are those that were scored."""
        metrics = self._metrics

        def total(metric: MetricWrapperBase, ending: str, **labels: str) -> float:
            labels["model"] = self._model
            return sum(
                sample.value
                for family in metric.collect()
                for sample in family.samples
                if sample.name.endswith(ending) and labels.items() <= sample.labels.items()
            )

        return ModelTotals(
            num_requests=int(total(metrics.request_duration, "_count")),
            request_seconds=total(metrics.request_duration, "_sum"),
            queue_seconds=total(metrics.queue_wait, "_sum"),
            compute_seconds=total(metrics.compute_duration, "_sum"),
            num_pairs=int(total(metrics.pairs, "_total", outcome="scored")),
            num_batches=int(total(metrics.batches, "_total")),
            collate_seconds=total(metrics.batch_duration, "_sum", stage="collate"),
            scatter_seconds=total(metrics.batch_duration, "_sum", stage="scatter"),
        )
