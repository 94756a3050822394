"""Pictures as SVG: the same bytes for the same results, so that a difference is one of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.results import Summary

BLUE, GREY = "#1f5fa8", "#a9a9a9"
_BAR_INCHES = 0.24
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Names of shapes are random without it.
    "svg.hashsalt": "seqloss",
}


def write_svg(path: Path, inches: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Writes what is drawn on a figure of that width and height."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def write_limits(path: Path, summaries: Sequence[Summary]) -> None:
    """A bar for each variant: its share of what bfloat16 products would allow, largest first."""
    height = 0.7 + _BAR_INCHES * len(summaries)
    write_svg(path, (6.5, height), partial(_draw_limits, summaries=summaries))


def _draw_limits(figure: Figure, summaries: Sequence[Summary]) -> None:
    ordered = sorted(summaries, key=lambda summary: summary.bfloat16_limit_share)
    names = [summary.name for summary in ordered]
    axes = figure.add_subplot()
    bars = axes.barh(
        names,
        [summary.bfloat16_limit_share for summary in ordered],
        height=0.7,
        color=[BLUE if name.startswith("seqloss") else GREY for name in names],
    )
    axes.bar_label(bars, fmt="{:.0%}", padding=3)
    axes.margins(x=0.1, y=0.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time of the matrix products at the bfloat16 GEMM rate, over the measured time")
