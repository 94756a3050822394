"""What a dashboard is made of here, and how Grafana has it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    HeatmapCellLayout,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

# The dashboard's own choice among Grafana's data sources.
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH = 24

# What stands in an expression for the matchers of the dashboard's variables.
_MATCHERS = {
    # Recorded for a whole job: without an instance.
    "@job_model_stream": 'job=~"$job",model=~"$model",stream=~"$stream"',
    "@job_model": 'job=~"$job",model=~"$model"',
    "@job": 'job=~"$job"',
    "@process": 'job=~"$job",instance=~"$instance"',
    "@model": 'job=~"$job",instance=~"$instance",model=~"$model"',
    "@stream": 'job=~"$job",instance=~"$instance",model=~"$model",stream=~"$stream"',
}

Kind = Literal["lines", "signed", "stacked", "number", "heatmap", "table"]


@dataclass(frozen=True, slots=True)
class Query:
    """A line or several: an expression, and what its legend says."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """Something to look at, as data.

    Args:
        title: a few words.
        description: what it tells, and what is normal.
        queries: what is drawn; a heatmap has one, of buckets.
        unit: Grafana's name of it.
        kind: what it looks like; an axis begins at 0 unless it is `signed` or logarithmic.
        red_from: where a number turns red; it never does by default.
        log_base: of the axis, 0 for a linear one.
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Kind = "lines"
    red_from: float | None = None
    log_base: float = 0


@dataclass(frozen=True, slots=True)
class Row:
    """Panels side by side, as wide as fits; several lines of them where there are many."""

    title: str
    panels: tuple[Panel, ...]
    per_line: int = 3
    height: int = 8


@dataclass(frozen=True, slots=True)
class Board:
    """A dashboard.

    Args:
        uid: its address; links go by it.
        title: what it is called.
        description: whom it is for.
        labels: of which one can choose values, with the metric that has them all.
        rows: what there is to see.
        time_from: what part of the past is shown at first.
    """

    uid: str
    title: str
    description: str
    labels: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    time_from: str = "now-1h"


def matched(expr: str) -> str:
    """The expression with the matchers of the variables."""
    for name, matchers in _MATCHERS.items():
        expr = expr.replace("{" + name + "}", "{" + matchers + "}")
        expr = expr.replace("{" + name + ",", "{" + matchers + ",")
    if "@" in expr:
        raise ValueError(f"no such matchers: {expr}")
    return expr


def build(board: Board) -> Any:
    """The dashboard as Grafana's model has it."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["seqloss"])
        .timezone("browser")
        .time(board.time_from, "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboard.DashboardLink("seqloss")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["seqloss"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource")
            .label("data source")
            .type("prometheus")
            .current(VariableOption(text="Prometheus", value="prometheus"))
        )
    )
    for name, metric in board.labels:
        built = built.with_variable(_variable(name, metric))
    ids = count(1)
    for row in board.rows:
        built = built.with_row(dashboard.Row(row.title).id(next(ids)))
        for panel in row.panels:
            made = _BUILDERS[panel.kind](panel).id(next(ids))
            made = made.span(_WIDTH // row.per_line).height(row.height)
            built = built.with_panel(made)
    return built.build()


def _variable(name: str, metric: str) -> Any:
    """All values of a label, those of the variables before it considered."""
    return (
        dashboard.QueryVariable(name)
        .label(name)
        .datasource(_SOURCE)
        .query(f"label_values({matched(metric)}, {name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .hide(VariableHide.DONT_HIDE)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(text=["All"], value=["$__all"]))
    )


def _common(made: Any, panel: Panel) -> Any:
    """What panels of all kinds have."""
    made = made.title(panel.title).description(panel.description).datasource(_SOURCE)
    made = made.unit(panel.unit)
    for number, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(matched(query.expr)).ref_id(chr(ord("A") + number))
        target = target.legend_format(query.legend or "__auto")
        if panel.kind == "table":
            target = target.format(PromQueryFormat.TABLE).instant()
        elif panel.kind == "heatmap":
            target = target.format(PromQueryFormat.HEATMAP).range()
        elif panel.kind == "number":
            target = target.instant()
        else:
            target = target.range()
        made = made.with_target(target)
    return made


def _lines(panel: Panel) -> Any:
    made = _common(timeseries.Panel(), panel)
    made = made.show_points(VisibilityMode.NEVER).line_width(1)
    made = made.legend(
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .calcs(["mean", "lastNotNull"])
    ).tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    if panel.log_base:
        scale = common.ScaleDistributionConfig().type(ScaleDistribution.LOG)
        return made.scale_distribution(scale.log(panel.log_base))
    if panel.kind != "signed":
        made = made.min(0)
    if panel.kind == "stacked":
        made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(30)
    return made


def _number(panel: Panel) -> Any:
    steps = [Threshold(color="green")]
    if panel.red_from is not None:
        steps.append(Threshold(value=panel.red_from, color="red"))
    thresholds = dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
    made = _common(stat.Panel(), panel).thresholds(thresholds)
    made = made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return made.color_mode(BigValueColorMode.VALUE).no_value("none")


def _heatmap(panel: Panel) -> Any:
    made = _common(heatmap.Panel(), panel)
    # Prometheus' buckets are made before: Grafana has nothing to calculate.
    return (
        made.calculate(False)
        .cell_values(heatmap.CellValues().unit("short"))
        .y_axis(heatmap.YAxisConfig().unit(panel.unit))
        .rows_frame(heatmap.RowsHeatmapOptions().layout(HeatmapCellLayout.AUTO))
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges"))
        .show_legend()
    )


def _table(panel: Panel) -> Any:
    hidden = {"Time": True, "Value": True}
    return _common(table.Panel(), panel).with_transformation(
        DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    )


_BUILDERS = {
    "lines": _lines,
    "signed": _lines,
    "stacked": _lines,
    "number": _number,
    "heatmap": _heatmap,
    "table": _table,
}
