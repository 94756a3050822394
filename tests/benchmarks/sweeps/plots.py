"""A picture of a sweep: cost, share of the limit, and memory, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, NullLocator, PercentFormatter, StrMethodFormatter

from benchmarks.plots import BLUE, GREY, write_svg
from benchmarks.sweeps.results import Summary, SweepResult

_INCHES = (9.0, 2.7)
# The fastest precision comes first.
_COLOURS = (BLUE, GREY, "#c8641e", "#3c8c50")
# Where the largest value is so many times the least one, an axis from 0 would hide the least.
_MOST_LINEAR = 20


@dataclass(frozen=True, slots=True)
class _Panel:
    """One of the quantities; None where a point has none."""

    label: str
    value: Callable[[Summary], float | None]
    form: Formatter


@dataclass(frozen=True, slots=True)
class _Line:
    """Of one precision: where its points are on both axes."""

    precision: str
    places: list[int]
    values: list[float]


def write_sweep(path: Path, result: SweepResult) -> None:
    """Writes the picture of one sweep."""
    write_svg(path, _INCHES, partial(_draw, result=result))


def _draw(figure: Figure, result: SweepResult) -> None:
    panels = (
        _Panel(result.unit, lambda summary: summary.cost_micros, StrMethodFormatter("{x:,.4g}")),
        _Panel(
            "share of the GEMM rate's limit",
            lambda summary: summary.limit_share,
            PercentFormatter(1),
        ),
        _Panel("peak memory, MB", _peak_megabytes, StrMethodFormatter("{x:,.0f}")),
    )
    summaries = result.summaries()
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        lines = list(_lines(summaries, panel))
        for line, colour in zip(lines, _COLOURS, strict=False):
            axes.plot(line.places, line.values, "o-", color=colour, ms=3, label=line.precision)
        _set_value_axis(axes, panel, [value for line in lines for value in line.values])
        _set_sweep_axis(axes, [point.value for point in result.sweep.points])
    figure.axes[0].legend(frameon=False)
    figure.supxlabel(result.sweep.axis, fontsize="medium")


def _lines(summaries: Sequence[Summary], panel: _Panel) -> Iterator[_Line]:
    for precision in dict.fromkeys(summary.precision for summary in summaries):
        places, values = [], []
        for summary in summaries:
            value = panel.value(summary)
            if summary.precision == precision and value is not None:
                places.append(summary.value)
                values.append(value)
        yield _Line(precision, places, values)


def _set_value_axis(axes: Axes, panel: _Panel, values: Sequence[float]) -> None:
    if min(values, default=0) > 0 and max(values) > _MOST_LINEAR * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0, top=1.08 * max(values, default=1))
    axes.yaxis.set_major_formatter(panel.form)
    axes.set_title(panel.label, fontsize="medium")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)


def _set_sweep_axis(axes: Axes, values: Sequence[int]) -> None:
    """Every step multiplies: all have the same width, and a number of their own."""
    axes.set_xscale("log")
    axes.set_xticks(values, labels=[_short(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def _short(value: int) -> str:
    """A number with few digits: `64k` is 65,536, and `100,000` is what it says."""
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else f"{value:,}"


def _peak_megabytes(summary: Summary) -> float | None:
    return None if summary.peak_bytes is None else summary.peak_bytes / 1e6
