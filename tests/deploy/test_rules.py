"""Prometheus' own tool accepts the configuration and the rules, and finds their values right."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring import GRAFANA, PROMETHEUS, ROOT, alerts, recorded, rules, tools_python

RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
RUNBOOK = ROOT / "docs" / "alerts.md"

# Line length is for people; two spaces after a brace are not.
YAMLLINT = """
extends: default
rules:
  document-start: disable
  line-length: {max: 140, allow-non-breakable-inline-mappings: true}
  braces: {max-spaces-inside: 0}
"""


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed; Debian has it in the package prometheus")
    return found


def run(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration(promtool: str) -> None:
    run(promtool, "check", "config", PROMETHEUS / "prometheus.yml")


def test_promtool_accepts_the_rules(promtool: str) -> None:
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", *RULES)


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_rules_have_the_values_that_their_tests_expect(path: Path, promtool: str) -> None:
    run(promtool, "test", "rules", path)


def test_yamllint_finds_nothing() -> None:
    files = [*PROMETHEUS.rglob("*.yml"), *GRAFANA.rglob("*.yml")]
    run(tools_python(), "-m", "yamllint", "--strict", "-d", YAMLLINT, *files)


# ---------------------------------------------------------------- what those tests cover


def unit_tests() -> list[dict[str, Any]]:
    return [test for path in UNIT_TESTS for test in yaml.safe_load(path.read_text())["tests"]]


def test_every_alert_fires_in_one_case_and_is_silent_in_another() -> None:
    cases = [
        (case["alertname"], bool(case.get("exp_alerts")))
        for test in unit_tests()
        for case in test.get("alert_rule_test", ())
    ]
    assert set(cases) == {(name, fires) for name in alerts() for fires in (True, False)}


def test_every_recording_rule_has_an_expected_value() -> None:
    expected = {
        case["expr"].split("{")[0]
        for test in unit_tests()
        for case in test.get("promql_expr_test", ())
        if case["exp_samples"]
    }
    assert set(recorded()) - expected == set()


# ---------------------------------------------------------------- what a person is told


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for name, alert in alerts().items():
        assert alert["labels"]["severity"] in {"page", "ticket"}, name
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert alert["annotations"]["runbook_url"] == f"docs/alerts.md#{name.lower()}"


def test_the_runbook_has_a_paragraph_for_each_alert_and_no_other() -> None:
    paragraphs = re.findall(r"^### (\w+)\n\n(.+)", RUNBOOK.read_text(), re.MULTILINE)
    assert [name for name, _ in paragraphs] == list(alerts())


def test_the_runbook_states_the_thresholds_of_the_rules() -> None:
    """Each number that an alert compares with, and how long it has to hold, is in its paragraph."""
    text = RUNBOOK.read_text()
    for name, alert in alerts().items():
        (paragraph,) = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
        row = re.search(r"^`(.+)` for (\S+), (page|ticket)\.$", paragraph, re.MULTILINE)
        row = row or re.search(r"^`(.+)`( at once), (page|ticket)\.$", paragraph, re.MULTILINE)
        assert row, name
        assert row[2].strip() == alert.get("for", "at once"), name
        assert row[3] == alert["labels"]["severity"], name
        compared = re.findall(r"(==|>|<=) ([\d.e+]+)", alert["expr"])
        stated = re.findall(r"(==|>|<=) ([\d.e+]+)", row[1])
        assert set(stated) == set(compared), name


def test_names_are_not_used_twice() -> None:
    names = [rule.get("alert") or rule["record"] for rule in rules()]
    assert len(set(names)) == len(names)
