"""How the service answers: its state, traffic, latency, and what waits."""

from __future__ import annotations

from panels import Panel, Query, Row
from queries import by_model, per_second, quantiles

_STATE = Row(
    "State",
    (
        Panel(
            "Models not ready",
            "Models that take no requests, over all processes: loading, draining or failed.",
            (Query("count(seqloss_ready{@model}) - sum(seqloss_ready{@model})"),),
            kind="number",
            red_from=1,
        ),
        Panel(
            "Processes up",
            "Processes that Prometheus can scrape.",
            (Query("sum(up{@process})"),),
            kind="number",
        ),
        Panel(
            "Youngest process",
            "Since the last start of any of them. Short again and again: they restart.",
            (Query("min(time() - process_start_time_seconds{@process})"),),
            unit="s",
            kind="number",
        ),
        Panel(
            "Requests per second",
            "Scoring requests, over all routes.",
            (Query("sum(job:seqloss_scoring_requests:rate5m{@job})"),),
            unit="reqps",
            kind="number",
        ),
        Panel(
            "Failed",
            "The share of scoring requests that ended with 500 or 503 in the last five minutes.",
            (Query("max(job:seqloss_scoring_errors:ratio_rate5m{@job})"),),
            unit="percentunit",
            kind="number",
            red_from=0.02,
        ),
        Panel(
            "Interactive p95",
            "From a parsed request to its losses, the slowest model's.",
            (
                Query(
                    "max(job_model_priority:seqloss_request_duration_seconds:p95_5m"
                    '{@job_model,priority="interactive"})'
                ),
            ),
            unit="s",
            kind="number",
            red_from=1,
        ),
    ),
    per_line=6,
    height=4,
)

_SERVED = Row(
    "What is served",
    (
        Panel(
            "Models",
            "A line for each model of each process, with the bundle it was loaded from.",
            (
                Query(
                    "max by (instance, model, version, engine, device, precision, bundle_digest) "
                    "(seqloss_build_info{@model})"
                ),
            ),
            kind="table",
        ),
        Panel(
            "Reloads",
            "In the last hour. A failed one leaves the old bundle in place.",
            (
                Query(
                    "sum by (model, outcome) (increase(seqloss_reloads_total{@model}[1h]))",
                    "{{model}} {{outcome}}",
                ),
            ),
        ),
    ),
    per_line=2,
    height=6,
)

_TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "Requests by route",
            "Everything that was asked, probes and scrapes included.",
            (per_second("seqloss_http_request_duration_seconds_count", "route", "@process"),),
            unit="reqps",
            kind="stacked",
        ),
        Panel(
            "Requests by status",
            "An empty status is a client that left before its reply began.",
            (per_second("seqloss_http_request_duration_seconds_count", "status", "@process"),),
            unit="reqps",
            kind="stacked",
        ),
        Panel(
            "Requests under way",
            "Scoring requests that are parsed, wait, or are computed.",
            (Query("sum by (instance) (seqloss_inflight_requests{@process})", "{{instance}}"),),
        ),
        Panel(
            "Pairs per second",
            "By class; scored or not.",
            (per_second("seqloss_pairs_total", "priority"),),
            unit="cps",
            kind="stacked",
        ),
        Panel(
            "Tokens per second",
            "That went through the model, without padding. A source that is encoded for several "
            "pairs counts once.",
            (per_second("seqloss_tokens_total", "side", '@model,kind="real"'),),
            unit="cps",
            kind="stacked",
        ),
        Panel(
            "Tokens by tenant",
            "Per second, as the quota counts them. Without keys all are anonymous.",
            (per_second("seqloss_tenant_tokens_total", "tenant", "@process"),),
            unit="cps",
            kind="stacked",
        ),
    ),
)

_LATENCY = Row(
    "Latency",
    (
        Panel(
            "Interactive requests",
            "From a parsed request to its losses.",
            quantiles("seqloss_request_duration_seconds", '@model,priority="interactive"'),
            unit="s",
        ),
        Panel(
            "Bulk requests",
            "From a parsed request to its losses.",
            quantiles("seqloss_request_duration_seconds", '@model,priority="bulk"'),
            unit="s",
        ),
        Panel(
            "The whole reply",
            "From the first byte of a request to the last of its reply, by route: the 95th "
            "percentile. The client's own speed is in it.",
            (
                Query(
                    "histogram_quantile(0.95, sum by (route, le) "
                    "(rate(seqloss_http_request_duration_seconds_bucket"
                    "{@process}[$__rate_interval])))",
                    "{{route}}",
                ),
            ),
            unit="s",
        ),
        Panel(
            "Interactive: wait in the queue",
            "Until the first batch of a request begins.",
            quantiles("seqloss_queue_wait_seconds", '@model,priority="interactive"'),
            unit="s",
        ),
        Panel(
            "Bulk: wait in the queue",
            "Until the first batch of a request begins.",
            quantiles("seqloss_queue_wait_seconds", '@model,priority="bulk"'),
            unit="s",
        ),
        Panel(
            "Where the time goes",
            "Means: parsing a body, and the batches that held pairs of a request.",
            (
                Query(
                    "sum by (format) (rate(seqloss_parse_duration_seconds_sum"
                    "{@process}[$__rate_interval])) / sum by (format) "
                    "(rate(seqloss_parse_duration_seconds_count{@process}[$__rate_interval]))",
                    "parse {{format}}",
                ),
                Query(
                    "sum by (model) (rate(seqloss_compute_duration_seconds_sum"
                    "{@model}[$__rate_interval])) / sum by (model) "
                    "(rate(seqloss_compute_duration_seconds_count{@model}[$__rate_interval]))",
                    "compute {{model}}",
                ),
            ),
            unit="s",
        ),
    ),
)

_QUEUE = Row(
    "Queue",
    (
        Panel(
            "Tokens admitted and not computed",
            "At max_queue_tokens, two millions by default, requests get 429.",
            by_model("seqloss_queue_tokens"),
        ),
        Panel("Pairs in no batch yet", "What waits.", by_model("seqloss_queue_pairs")),
        Panel(
            "Oldest request and estimated wait",
            "Since the oldest one was admitted; and what all of them take at the measured rate.",
            (
                Query("max by (model) (seqloss_queue_oldest_age_seconds{@model})", "{{model}} age"),
                Query("max by (model) (seqloss_estimated_wait_seconds{@model})", "{{model}} wait"),
            ),
            unit="s",
        ),
    ),
)

ROWS = (_STATE, _SERVED, _TRAFFIC, _LATENCY, _QUEUE)
