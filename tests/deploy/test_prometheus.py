"""A real Prometheus scrapes real services, and has data for whatever is asked of it."""

from __future__ import annotations

import math
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from loads import Load, ask_a_sound_service, ask_a_troubled_service
from monitoring import (
    OTHERS,
    PROMETHEUS,
    Expression,
    alerts,
    chart_expressions,
    panel_expressions,
    recorded,
    variable_queries,
)

from server import Server

# Nobody waits here for an hour, or for tomorrow: a scrape a second stands for one in fifteen, and
# the windows and what is compared with shrink alike.
WINDOW = "10s"
OFFSETS = {"1d": "3s", "1w": "6s", "15m": "4s"}
VARIABLES = {
    "$__rate_interval": WINDOW,
    "$job": "seqloss",
    "$instance": ".*",
    "$model": ".*",
    "$stream": ".*",
}
# All of it needs about 20 s on two cores; whatever does not come by then never does.
DEADLINE_SECONDS = 300

# What the load brings about on any machine.
FIRING = {
    "SeqlossErrors",
    "SeqlossNonFinite",
    "SeqlossOutOfMemory",
    "SeqlossReloadFailed",
}


def shortened(text: str) -> str:
    """The same with windows, offsets and waits that a test can wait for."""
    text = re.sub(r"\[\d+[smhdw]\]", f"[{WINDOW}]", text)
    text = re.sub(r"offset (\w+)", lambda match: f"offset {OFFSETS[match[1]]}", text)
    text = re.sub(r"(?m)^(\s+for:) \w+$", r"\1 0s", text)
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    return text


def operands(expr: str) -> list[str]:
    """The parts of an alert's expression that must have data, whether or not it fires.

    These are what stands between its logical operators, each with 0 or 1 in place of a comparison's
    silence; and what is absent only if nothing is wrong.
    """
    if match := re.fullmatch(r"absent\((.*)\)", expr.strip()):
        return [match[1]]
    parts, depth, last = [], 0, 0
    for token in re.finditer(r"[({\[]|[)}\]]|\b(?:and|or|unless)\b(?: on \([^)]*\))?", expr):
        if token[0] in "({[":
            depth += 1
        elif token[0] in ")}]":
            depth -= 1
        elif depth == 0:
            parts.append(expr[last : token.start()])
            last = token.end()
    parts.append(expr[last:])
    compared = (re.sub(r" (==|<=|>) (?=[\d.])", r" \1 bool ", part) for part in parts)
    return [part.replace(" unless ", " and ").strip() for part in compared]


def what_is_asked() -> list[Expression]:
    """Every expression there is, in a form that has data on any day."""
    asked = [
        *panel_expressions(),
        *(Expression(f"recorded {name}", name) for name in recorded()),
        *(Expression(f"recorded {name}, anew", expr) for name, expr in recorded().items()),
        *(
            Expression(f"{name} {number}", part)
            for name, alert in alerts().items()
            for number, part in enumerate(operands(alert["expr"]))
        ),
        *(
            Expression(each.where, part)
            for each in chart_expressions()
            for part in operands(each.text)
        ),
        *(
            Expression(f"a metric not our own: {name}", f'{name}{{job="seqloss"}}')
            for name in OTHERS
        ),
    ]
    return [Expression(each.where, shortened(each.text), each.legend) for each in asked]


# ---------------------------------------------------------------- Prometheus


class Prometheus:
    """Its HTTP interface."""

    def __init__(self, address: str, process: subprocess.Popen[bytes]) -> None:
        self._client = httpx.Client(base_url=address, timeout=30)
        self.process = process
        self._since = time.time()

    def get(self, path: str, **given: Any) -> Any:
        reply = self._client.get(f"/api/v1/{path}", params=given)
        assert reply.status_code == 200, (given, reply.text)
        return reply.json()["data"]

    def series(self, expr: str) -> list[dict[str, str]]:
        """The labels of all series that had a number at any time."""
        found = self.get("query_range", query=expr, start=self._since, end=time.time(), step=1)
        return [
            series["metric"]
            for series in found["result"]
            if any(math.isfinite(float(value)) for _, value in series["values"])
        ]

    def firing(self) -> set[str]:
        """The alerts that fired at any time."""
        return {one["alertname"] for one in self.series('ALERTS{alertstate="firing"}')}

    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            assert self.process.poll() is None, "Prometheus ended"
            return False

    def close(self) -> None:
        self._client.close()
        self.process.terminate()
        self.process.wait(DEADLINE_SECONDS)


def until(holds: Callable[[], bool], what: Callable[[], Any], seconds: float) -> None:
    """Polls until it holds; says what there is otherwise."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


@contextmanager
def prometheus_of(folder: Path, targets: list[str]) -> Iterator[Prometheus]:
    """A Prometheus with a copy of the configuration and the rules, faster than they are."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed; Debian has it in the package prometheus")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    assert scrape["job_name"] == "seqloss"
    scrape["static_configs"] = [{"targets": targets}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "rules").mkdir()
    for path in (PROMETHEUS / "rules").glob("*.yml"):
        (folder / "rules" / path.name).write_text(shortened(path.read_text()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    prometheus = Prometheus(f"http://{address}", process)
    try:
        until(prometheus.is_ready, (folder / "log").read_text, DEADLINE_SECONDS)
        yield prometheus
    finally:
        prometheus.close()


# ---------------------------------------------------------------- the services


class TroubledServer(Server):
    """A server of the fake model on a device that fails; its queue holds two requests."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        self._start(
            str(here / "troubled_service.py"),
            PYTHONPATH=str(here.parent),
            SEQLOSS_MAX_QUEUE_TOKENS="200",
            SEQLOSS_WARM_UP="false",
        )


@pytest.fixture
def troubled() -> Iterator[TroubledServer]:
    server = TroubledServer()
    yield server
    server.process.kill()
    server.process.wait()


def reload_twice(server: Server, bundle: Path) -> None:
    """With another bundle, and after somebody broke it."""
    manifest = bundle / "manifest.json"
    text = manifest.read_text()
    for changed, outcome in ((text + " ", "loaded"), (text[:-20], "failed")):
        manifest.write_text(changed)
        server.process.send_signal(signal.SIGHUP)
        server.read_until(rf"reloaded: demo {outcome}")


@pytest.mark.deploy
def test_prometheus_has_data_for_everything_that_is_asked_of_it(
    serve: Callable[..., Server],
    bundle_of: Any,
    troubled: TroubledServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEQLOSS_STREAMS", "news")
    bundle = Path(shutil.copytree(bundle_of("demo").folder, tmp_path / "bundle"))
    sound = serve(f"demo={bundle}", "--device", "cpu", "--precision", "float32")
    addresses = [sound.address, troubled.address]
    targets = [address.removeprefix("http://") for address in addresses]
    folder = tmp_path / "prometheus"
    folder.mkdir()
    with prometheus_of(folder, targets) as prometheus:
        with Load() as load:
            load.add(addresses[0], ask_a_sound_service)
            for _ in range(3):
                load.add(addresses[1], ask_a_troubled_service)
            reload_twice(sound, bundle)
            check_expressions(prometheus, load)
            wait_for_alerts(prometheus, FIRING)
        assert load.error is None
        assert "SeqlossDown" not in prometheus.firing()
        check_variables(prometheus)
        check_rules(prometheus)
        sound.process.kill()
        wait_for_alerts(prometheus, {"SeqlossDown"})


def check_expressions(prometheus: Prometheus, load: Load) -> None:
    """Every one has data, and its series the labels that its legend names."""
    missing = set(what_is_asked())
    unlabelled: dict[Expression, Any] = {}

    def has_all() -> bool:
        assert load.error is None, load.error
        for each in list(missing):
            if found := prometheus.series(each.text):
                missing.remove(each)
                wanted = set(re.findall(r"{{(\w+)}}", each.legend))
                unlabelled[each] = [one for one in found if not wanted <= set(one)]
        return not missing

    until(has_all, lambda: f"nothing for {missing}", DEADLINE_SECONDS)
    assert {each: found for each, found in unlabelled.items() if found} == {}


def wait_for_alerts(prometheus: Prometheus, names: set[str]) -> None:
    """They fire, or have fired."""
    firing = prometheus.firing
    until(lambda: names <= firing(), lambda: names - firing(), DEADLINE_SECONDS)


def check_variables(prometheus: Prometheus) -> None:
    """Every variable of the dashboards has values to choose from."""
    for where, selector, label in variable_queries():
        given = {"match[]": shortened(selector)}
        assert prometheus.get(f"label/{label}/values", **given), where
    streams = prometheus.get("label/stream/values")
    assert set(streams) == {"news", "other"}


def check_rules(prometheus: Prometheus) -> None:
    """Prometheus evaluates all of them without an error or a warning."""
    loaded = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in loaded} == {*alerts(), *recorded()}
    assert {rule["name"]: rule.get("lastError") for rule in loaded if rule["health"] != "ok"} == {}
