"""What goes on inside the service: batches, what goes wrong, and the process."""

from __future__ import annotations

from panels import Panel, Query, Row
from queries import by_model, per_second, quantiles

_PADDING = 'seqloss_tokens_total{@model,kind="padding"}[$__rate_interval]'
_NOT_GRID = 'seqloss_tokens_total{@model,kind=~"real|padding"}[$__rate_interval]'

_BATCHES = Row(
    "Batches",
    (
        Panel(
            "Batches per second",
            "By why they were not larger: full; idle, nothing else waited; drain, it shuts down.",
            (per_second("seqloss_batches_total", "reason"),),
            unit="cps",
            kind="stacked",
        ),
        Panel(
            "Pairs per batch",
            "Few pairs where many wait: they are long, or their lengths differ.",
            quantiles("seqloss_batch_pairs", "@model"),
        ),
        Panel(
            "Padded tokens per batch",
            "The 95th percentile of each side. At most max_batch_tokens, both sides together.",
            (
                Query(
                    "histogram_quantile(0.95, sum by (side, le) "
                    "(rate(seqloss_batch_padded_tokens_bucket{@model}[$__rate_interval])))",
                    "{{side}}",
                ),
            ),
        ),
        Panel(
            "Share of the time in each stage",
            "Seconds per second. Forward near 1 is a device that is busy; collating and scattering "
            "go on beside it.",
            (
                Query(
                    "sum by (instance, stage) "
                    "(rate(seqloss_batch_duration_seconds_sum{@model}[$__rate_interval]))",
                    "{{instance}} {{stage}}",
                ),
            ),
            unit="percentunit",
        ),
        Panel(
            "Padding",
            "The share of padding among what the device computes. A twentieth for bulk alone, "
            "a sixth beside interactive requests: see docs/serving.md.",
            (
                Query(
                    f"sum by (model, side) (rate({_PADDING})) "
                    f"/ sum by (model, side) (rate({_NOT_GRID}))",
                    "{{model}} {{side}}",
                ),
            ),
            unit="percentunit",
        ),
        Panel(
            "Sources encoded once for several pairs",
            "The share of pairs whose source was encoded for another one.",
            (
                Query(
                    "sum by (model) (rate(seqloss_encoder_reuse_total{@model}[$__rate_interval])) "
                    "/ sum by (model) (rate(seqloss_batch_pairs_sum{@model}[$__rate_interval]))",
                    "{{model}}",
                ),
            ),
            unit="percentunit",
        ),
        Panel(
            "Token budget",
            "Padded tokens that the device is given at a time; fewer after a batch did not fit.",
            by_model("seqloss_token_budget", "min"),
        ),
        Panel(
            "Compiled kernels",
            "1 where kernels compiled for the CPU compute; at 0 the engine's own operators do, "
            "more slowly where there could be some.",
            by_model("seqloss_compiled_kernels", "min"),
        ),
        Panel(
            "Device memory",
            "Of a GPU, as the engine counts it; there is none of a CPU.",
            (
                Query(
                    "sum by (instance, device, kind) (seqloss_device_memory_bytes{@process})",
                    "{{instance}} {{device}} {{kind}}",
                ),
            ),
            unit="bytes",
            kind="stacked",
        ),
        Panel(
            "Batches that did not fit",
            "And how many of them went on as two halves.",
            (
                Query(
                    "sum by (model) (rate(seqloss_oom_total{@model}[$__rate_interval]))",
                    "{{model}} out of memory",
                ),
                Query(
                    "sum by (model) (rate(seqloss_batch_splits_total{@model}[$__rate_interval]))",
                    "{{model}} halved",
                ),
            ),
            unit="cps",
        ),
    ),
)

_ERRORS = Row(
    "What goes wrong",
    (
        Panel(
            "Refused requests",
            "By the code of the reply.",
            (per_second("seqloss_rejected_total", "code", "@process"),),
            unit="reqps",
            kind="stacked",
        ),
        Panel(
            "Failed and refused for lack of room",
            "Shares of scoring requests: status 500 or 503, and status 429.",
            (
                Query("job:seqloss_scoring_errors:ratio_rate5m{@job}", "{{job}} failed"),
                Query("job:seqloss_scoring_rejected:ratio_rate5m{@job}", "{{job}} refused"),
            ),
            unit="percentunit",
        ),
        Panel(
            "Out of time",
            "The share of admitted requests whose timeout passed.",
            (Query("job_model:seqloss_deadline_missed:ratio_rate5m{@job_model}", "{{model}}"),),
            unit="percentunit",
        ),
        Panel(
            "Pairs that are NaN or infinite",
            "Per second. A sound model never gives one.",
            (per_second("seqloss_non_finite_total", "model"),),
            unit="cps",
        ),
        Panel(
            "Cancelled pairs",
            "Per second: their client went away or ran out of time.",
            (per_second("seqloss_cancelled_pairs_total", "model"),),
            unit="cps",
        ),
        Panel(
            "Pairs by outcome",
            "Per second. What is not scored has the reason that the client was given.",
            (per_second("seqloss_pairs_total", "outcome"),),
            unit="cps",
            kind="stacked",
        ),
    ),
)

_PROCESS = Row(
    "Process",
    (
        Panel(
            "Event loop",
            "How much later than asked for it goes on. All requests wait that long, and probes.",
            quantiles("seqloss_event_loop_lag_seconds", "@process"),
            unit="s",
        ),
        Panel(
            "Memory",
            "Resident, of each process.",
            (Query("process_resident_memory_bytes{@process}", "{{instance}}"),),
            unit="bytes",
        ),
        Panel(
            "CPU",
            "Cores in use by each process.",
            (Query("rate(process_cpu_seconds_total{@process}[$__rate_interval])", "{{instance}}"),),
        ),
        Panel(
            "Open files",
            "The share of the limit. Connections are most of them.",
            (
                Query(
                    "process_open_fds{@process} / process_max_fds{@process}",
                    "{{instance}}",
                ),
            ),
            unit="percentunit",
        ),
    ),
    per_line=4,
)

ROWS = (_BATCHES, _ERRORS, _PROCESS)
