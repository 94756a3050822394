"""The dashboards are what their source makes, and show what the service has."""

from __future__ import annotations

import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring import (
    GRAFANA,
    OTHERS,
    Expression,
    all_expressions,
    boards,
    families,
    metrics_of,
    panel_expressions,
    recorded,
    tools_python,
    variable_queries,
)


def test_the_committed_dashboards_are_what_their_source_makes(tmp_path: Path) -> None:
    made = subprocess.run(
        [tools_python(), "-W", "error", str(GRAFANA / "build.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    committed = {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()}
    again = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert committed == again, "run deploy/grafana/build.py"


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("expr", "names"),
    [
        ('sum by (route, le) (rate(a_total{b="c d(e)"}[5m])) / 2', {"a_total"}),
        ("job:a:rate5m > 1.6e+06 and on (job) b_count offset 1d", {"job:a:rate5m", "b_count"}),
        ("a unless on (x) b_bucket / on (y) group_left (z) c", {"a", "b_bucket", "c"}),
        ("histogram_quantile(0.95, a) or vector(0)", {"a"}),
    ],
)
def test_names_are_found_in_expressions(expr: str, names: set[str]) -> None:
    assert metrics_of(expr) == names


def test_every_metric_that_is_asked_for_exists() -> None:
    known = set().union(*families().values(), recorded(), OTHERS)
    unknown = {each.where: metrics_of(each.text) - known for each in all_expressions()}
    assert {where: names for where, names in unknown.items() if names} == {}


def test_every_metric_and_every_recorded_one_is_used() -> None:
    shown = set[str]().union(*(metrics_of(each.text) for each in panel_expressions()))
    for name in shown & set(recorded()):
        shown |= metrics_of(recorded()[name])
    assert [name for name, series in families().items() if not series & shown] == []
    used = set[str]().union(*(metrics_of(each.text) for each in all_expressions()))
    assert set(recorded()) - used == set()
    assert OTHERS - used == set()


def selectors(expression: Expression) -> list[str]:
    """The matchers of every series that an expression asks for."""
    names = "|".join(sorted(metrics_of(expression.text), key=len, reverse=True))
    return re.findall(rf"(?<![\w:])(?:{names})(?![\w:])(\{{[^}}]*\}})?", expression.text)


def test_panels_show_what_was_chosen() -> None:
    """The variables that the metric has labels of, in every selector."""
    chosen = {name: {f'{name}=~"${name}"'} for name in ("job", "instance", "model", "stream")}
    for each in panel_expressions():
        found = selectors(each)
        assert found, each
        for matchers in found:
            assert all(matcher in matchers for matcher in chosen["job"]), each
            if "seqloss_token_nll" in each.text or "pair_mean_nll" in each.text:
                assert all(m in matchers for m in chosen["model"] | chosen["stream"]), each


# ---------------------------------------------------------------- what Grafana needs


@pytest.fixture(params=sorted(boards()))
def board(request: pytest.FixtureRequest) -> Any:
    return boards()[request.param]


def test_panels_have_places_and_words_of_their_own(board: Any) -> None:
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    shown = [panel for panel in panels if panel["type"] != "row"]
    assert len({panel["title"] for panel in shown}) == len(shown)
    for panel in shown:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24, panel["title"]
    for one, other in combinations(panels, 2):
        assert apart(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def apart(one: dict[str, int], other: dict[str, int]) -> bool:
    return any(
        first[at] + first[size] <= second[at]
        for first, second in ((one, other), (other, one))
        for at, size in (("x", "w"), ("y", "h"))
    )


def test_everything_is_asked_of_the_chosen_data_source(board: Any) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    first, *others = board["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    asking = [*others, *(panel for panel in board["panels"] if panel["type"] != "row")]
    assert [each["datasource"] for each in asking] == [chosen] * len(asking)
    provisioned = yaml.safe_load(
        (GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )["datasources"]
    assert [(each["type"], each["uid"]) for each in provisioned] == [
        ("prometheus", first["current"]["value"])
    ]


def test_variables_come_before_those_that_depend_on_them(board: Any) -> None:
    names = [variable["name"] for variable in board["templating"]["list"]]
    for number, variable in enumerate(board["templating"]["list"]):
        needed = set(re.findall(r"\$(\w+)", str(variable["query"])))
        assert needed <= set(names[:number]), variable["name"]
    asked = " ".join(
        target["expr"] for panel in board["panels"] for target in panel.get("targets", ())
    )
    used = {name for name in re.findall(r"\$(\w+)", asked) if not name.startswith("__")}
    assert used == set(names) - {"datasource"}


def test_variables_ask_for_metrics_that_exist() -> None:
    known = set().union(*families().values())
    asked = {where: metrics_of(selector) for where, selector, _ in variable_queries()}
    assert {where: names for where, names in asked.items() if not names <= known} == {}
