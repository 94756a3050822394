"""What dashboards, rules and the chart ask Prometheus for, read from their files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from clients_environment import python_with
from seqloss.metrics import Metrics

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
PROMETHEUS = ROOT / "deploy" / "prometheus"
CHART = ROOT / "deploy" / "helm" / "seqloss"

# Not the service's own: the Python client library's, and the one that Prometheus makes itself.
# test_prometheus.py looks for all of them in a real scrape.
OTHERS = {
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "up",
}

_WORDS_OF_PROMQL = {"and", "bool", "by", "ignoring", "offset", "on", "or", "unless", "without"}


def tools_python() -> str:
    """The interpreter that has the library for dashboards and yamllint."""
    folder = ROOT / "build" / "dashboards-venv"
    return python_with(Path(__file__).parent / "dashboards-requirements.txt", folder)


@dataclass(frozen=True, slots=True)
class Expression:
    """What stands somewhere, and where; `legend` names labels that its series must have."""

    where: str
    text: str
    legend: str = ""


# ---------------------------------------------------------------- where expressions stand


def rules() -> Iterator[dict[str, Any]]:
    """All rules as they are written."""
    for path in sorted((PROMETHEUS / "rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def alerts() -> dict[str, dict[str, Any]]:
    """The alerts by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def recorded() -> dict[str, str]:
    """The recorded series' names with their expressions."""
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def boards() -> dict[str, dict[str, Any]]:
    """The dashboards by the names of their files."""
    return {
        path.stem: json.loads(path.read_text()) for path in (GRAFANA / "dashboards").glob("*.json")
    }


def panel_expressions() -> Iterator[Expression]:
    """Of every panel of every dashboard."""
    for name, board in boards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                where = f"{name}: {panel['title']} {target['refId']}"
                yield Expression(where, target["expr"], target["legendFormat"])


def variable_queries() -> Iterator[tuple[str, str, str]]:
    """The dashboards' variables: where they stand, a selector, and the label that is wanted."""
    for name, board in boards().items():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
                assert match, variable["query"]
                yield f"{name}: variable {variable['name']}", match[1], match[2]


def chart_expressions() -> Iterator[Expression]:
    """What the chart's autoscaler asks for, for all series: its templates' texts with metrics."""
    for path in sorted(CHART.glob("templates/*.yaml")):
        for text in re.findall(
            r'"((?:[^"\\\n]|\\.)*seqloss_\w+[{\[](?:[^"\\\n]|\\.)*)"', path.read_text()
        ):
            expr = text.replace('\\"', '"').replace("%s", 'job="seqloss"')
            yield Expression(f"chart: {path.name}", expr)


def all_expressions() -> list[Expression]:
    """Of panels, rules and the chart."""
    of_rules = [Expression(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    return [*panel_expressions(), *of_rules, *chart_expressions()]


# ---------------------------------------------------------------- names


def metrics_of(expr: str) -> set[str]:
    """The names of the series that an expression asks for."""
    expr = re.sub(r'"(?:[^"\\]|\\.)*"', "", expr)
    expr = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", expr)
    grouping = r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
    expr = re.sub(grouping, " ", expr)
    words = re.findall(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?![\w:])(?!\s*\()", expr)
    return set(words) - _WORDS_OF_PROMQL


def families() -> dict[str, set[str]]:
    """The service's metrics, with the names of their series."""
    registry = CollectorRegistry()
    Metrics(registry)
    endings = {
        "counter": ("_total",),
        "gauge": ("",),
        "histogram": ("_bucket", "_sum", "_count"),
        "summary": ("_sum", "_count"),
    }
    return {
        family.name: {family.name + ending for ending in endings[family.type]}
        for family in registry.collect()
    }
