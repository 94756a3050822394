"""What the loss itself does, by model and stream: for those who look after models and data."""

from __future__ import annotations

from panels import Board, Panel, Query, Row

_LEGEND = "{{model}} {{stream}}"
_TOKENS, _PAIRS = "seqloss_token_nll", "seqloss_pair_mean_nll"
# Recorded by deploy/prometheus/rules/recording.yml.
_MEAN = "job_model_stream:seqloss_token_nll:mean_1h{@job_model_stream}"
_DISTANCE = "job_model_stream:seqloss_pair_mean_nll:distance_{}{{@job_model_stream}}"
_SHARE = "job_model_stream_le:seqloss_pair_mean_nll:share_1h{@job_model_stream}"
_COUNT = "job_model_stream:seqloss_pair_mean_nll:count_1h{@job_model_stream}"


def _mean(histogram: str) -> Query:
    summed, counted = (
        f"sum by (model, stream) (rate({histogram}_{part}{{@stream}}[$__rate_interval]))"
        for part in ("sum", "count")
    )
    return Query(f"{summed} / {counted}", _LEGEND)


def _quantiles(histogram: str) -> tuple[Query, ...]:
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by (model, stream, le) "
            f"(rate({histogram}_bucket{{@stream}}[$__rate_interval])))",
            f"{_LEGEND} p{share * 100:g}",
        )
        for share in (0.1, 0.5, 0.9, 0.99)
    )


def _buckets(histogram: str) -> tuple[Query, ...]:
    increase = f"increase({histogram}_bucket{{@stream}}[$__rate_interval])"
    return (Query(f"sum by (le) ({increase})", "{{le}}"),)


def _share_of_pairs(outcomes: str) -> str:
    """Of the pairs that were asked for, by outcome."""
    return (
        "sum by (model, outcome) "
        f"(rate(seqloss_pairs_total{{@model{outcomes}}}[$__rate_interval])) "
        "/ on (model) group_left () "
        "sum by (model) (rate(seqloss_pairs_total{@model}[$__rate_interval]))"
    )


_MEANS = Row(
    "Means",
    (
        Panel(
            "Mean nll per token",
            "Of counted tokens, in nats: the usual training loss without label smoothing.",
            (_mean(_TOKENS),),
        ),
        Panel(
            "Mean of pairs' means",
            "Each pair counts as much as every other, however long it is.",
            (_mean(_PAIRS),),
        ),
        Panel(
            "Pairs above one nat per token",
            "The share of pairs that the model finds unlikely. What is much depends on the model.",
            (
                Query(
                    "1 - sum by (model, stream) "
                    f'(rate({_PAIRS}_bucket{{@stream,le="1.0"}}[$__rate_interval])) '
                    f"/ sum by (model, stream) (rate({_PAIRS}_count{{@stream}}[$__rate_interval]))",
                    _LEGEND,
                ),
            ),
            unit="percentunit",
        ),
    ),
)

_DISTRIBUTION = Row(
    "Distribution",
    (
        Panel(
            "Tokens",
            "How many tokens have what nll, in nats, all chosen models and streams together.",
            _buckets(_TOKENS),
            kind="heatmap",
        ),
        Panel(
            "Pairs",
            "How many pairs have what mean nll, in nats, all chosen models and streams together.",
            _buckets(_PAIRS),
            kind="heatmap",
        ),
        Panel(
            "Quantiles of tokens",
            "In nats, even within a bucket. "
            "The axis is logarithmic: most tokens cost next to nothing.",
            _quantiles(_TOKENS),
            log_base=10,
        ),
        Panel(
            "Quantiles of pairs' means",
            "In nats, even within a bucket.",
            _quantiles(_PAIRS),
            log_base=10,
        ),
    ),
    per_line=2,
    height=10,
)

_DRIFT = Row(
    "Drift: the last hour beside the same one before",
    (
        Panel(
            "Distance from yesterday",
            "The largest difference between the cumulative distributions of pairs' means: 0 alike, "
            "1 apart. Above 0.1 is a change, with a thousand pairs in each hour.",
            (Query(_DISTANCE.format("1d"), _LEGEND),),
            unit="percentunit",
        ),
        Panel(
            "Distance from last week",
            "Far from yesterday and near to last week is the rhythm of a week.",
            (Query(_DISTANCE.format("1w"), _LEGEND),),
            unit="percentunit",
        ),
        Panel(
            "Pairs in the hour",
            "With few of them a distance says little: 0.1 comes by chance below a thousand.",
            (Query(_COUNT, _LEGEND),),
        ),
        Panel(
            "Mean nll per token, now and before",
            "Of an hour each, in nats.",
            (
                Query(_MEAN, f"{_LEGEND} now"),
                Query(f"{_MEAN} offset 1d", f"{_LEGEND} yesterday"),
                Query(f"{_MEAN} offset 1w", f"{_LEGEND} last week"),
            ),
        ),
        Panel(
            "Where they differ",
            "The share of pairs at or below each bound in nats, less that of yesterday. Below 0 "
            "at a small bound: fewer pairs are likely.",
            (
                Query(
                    f"{_SHARE} - {_SHARE} offset 1d",
                    f"{_LEGEND} ≤ {{{{le}}}}",
                ),
            ),
            unit="percentunit",
            kind="signed",
        ),
    ),
)

_REFUSED = Row(
    "Pairs without a loss",
    (
        Panel(
            "Refused pairs",
            "The share of pairs that have a reason in place of a loss, by reason.",
            (Query(_share_of_pairs(',outcome!="scored"'), "{{model}} {{outcome}}"),),
            unit="percentunit",
            kind="stacked",
        ),
        Panel(
            "Pairs that are NaN or infinite",
            "The share among all pairs. A sound model never gives one.",
            (Query(_share_of_pairs(',outcome="non_finite"'), "{{model}}"),),
            unit="percentunit",
        ),
    ),
    per_line=2,
)

LOSS = Board(
    "seqloss-loss",
    "seqloss: the loss",
    "Losses of live data by model and stream, and how they differ from what they were.",
    labels=(
        ("job", "seqloss_ready"),
        ("instance", "seqloss_ready{@job}"),
        ("model", "seqloss_ready{@process}"),
        ("stream", "seqloss_token_nll_count{@model}"),
    ),
    rows=(_MEANS, _DISTRIBUTION, _DRIFT, _REFUSED),
    time_from="now-24h",
)
