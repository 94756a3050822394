"""Expressions that several panels have."""

from __future__ import annotations

from panels import Query

_LATENCIES = (0.5, 0.95, 0.99)


def quantiles(histogram: str, matchers: str, by: str = "") -> tuple[Query, ...]:
    """The quantiles of a histogram, for each value of a label."""
    grouped = f"{by}, le" if by else "le"
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by ({grouped}) "
            f"(rate({histogram}_bucket{{{matchers}}}[$__rate_interval])))",
            f"{{{{{by}}}}} p{share * 100:g}" if by else f"p{share * 100:g}",
        )
        for share in _LATENCIES
    )


def per_second(counter: str, by: str, matchers: str = "@model") -> Query:
    """How much a counter rises in a second, for each value of a label."""
    return Query(
        f"sum by ({by}) (rate({counter}{{{matchers}}}[$__rate_interval]))",
        " ".join(f"{{{{{label}}}}}" for label in by.split(", ")),
    )


def by_model(gauge: str, reduce: str = "sum") -> tuple[Query, ...]:
    """A gauge, over all processes."""
    return (Query(f"{reduce} by (model) ({gauge}{{@model}})", "{{model}}"),)
