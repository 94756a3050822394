"""The Dockerfile and the Compose file, judged by real tools that need no engine.

Images themselves are built by hand: docs/containers.md says what was measured of them.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from clients_environment import python_with
from seqloss.settings import Settings

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
COMPOSE = ROOT / "docker-compose.yml"
PROFILES: tuple[tuple[str, ...], ...] = ((), ("demo",), ("gpu",), ("demo", "gpu"))
YAML_RULES = "{extends: default, rules: {line-length: {max: 100}, document-start: disable}}"


def run_tool(name: str, *arguments: str) -> str:
    """What a program of the tools' own environment printed; it must be content."""
    python = python_with(
        Path(__file__).parent / "images-requirements.txt", ROOT / "build" / "images-venv"
    )
    program = Path(python).parent / name
    done = subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compose(*profiles: str) -> dict[str, Any]:
    """The Compose file as Compose reads it with these profiles."""
    chosen = [part for profile in profiles for part in ("--profile", profile)]
    read: dict[str, Any] = json.loads(
        run_tool("docker-compose", *chosen, "config", "--format", "json")
    )
    return read


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Every service of every profile."""
    every: dict[str, Any] = compose("demo", "gpu")["services"]
    return every


# ---------------------------------------------------------------- files


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    run_tool("hadolint", "--failure-threshold", "style", str(DOCKER / "Dockerfile"))


def test_yamllint_finds_nothing_in_the_compose_file() -> None:
    run_tool("yamllint", "--strict", "--config-data", YAML_RULES, str(COMPOSE))


def test_what_the_dockerfile_copies_exists() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    copied = [
        source
        for line in re.findall(r"^COPY (?!--)(.+)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    bound = re.findall(r"--mount=type=bind,source=([^,]+)", text)
    assert copied
    assert bound
    for source in {*copied, *bound}:
        assert (ROOT / source).exists(), source


def test_the_dockerignore_lets_through_what_is_copied_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines, "what is not named would go into builds"
    text = (DOCKER / "Dockerfile").read_text()
    for source in allowed:
        named = source if (ROOT / source).is_file() else source.split("/")[0]
        assert named in text, f"{source} is let through and not used"
        assert (ROOT / source).exists(), source


def test_programs_in_images_get_signals_themselves() -> None:
    """A shell in between, as the other form starts one, would keep SIGTERM and SIGHUP."""
    text = (DOCKER / "Dockerfile").read_text()
    starts = re.findall(r"^(?:ENTRYPOINT|CMD|    CMD) (.+)$", text, re.MULTILINE)
    assert len(starts) == 7
    for start in starts:
        assert isinstance(json.loads(start), list)


# ---------------------------------------------------------------- compose


@pytest.mark.parametrize("profiles", PROFILES)
def test_compose_accepts_every_profile(profiles: tuple[str, ...]) -> None:
    always = {"seqloss", "prometheus", "grafana"}
    more = {"demo": {"traffic"}, "gpu": {"seqloss-gpu"}}
    expected = always.union(*(more[profile] for profile in profiles))
    assert compose(*profiles)["services"].keys() == expected


def test_what_compose_mounts_exists(services: dict[str, Any]) -> None:
    mounted = [
        Path(volume["source"])
        for service in services.values()
        for volume in service.get("volumes", ())
        if volume["type"] == "bind"
    ]
    assert len(mounted) == 4
    for path in mounted:
        assert path.exists(), path
        assert path.is_file() or any(path.iterdir()), f"{path} is empty"


def test_what_compose_builds_is_a_target(services: dict[str, Any]) -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    built = {name: one["build"] for name, one in services.items() if "build" in one}
    assert built.keys() == {"seqloss", "seqloss-gpu", "traffic"}
    for build in built.values():
        assert build["target"] in stages


def test_containers_may_do_nothing_that_they_need_not(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert "cap_add" not in service, name


def test_ports_are_open_to_this_machine_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert sorted(port["published"] for port in ports) == ["3000", "8000", "8001", "9090"]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_the_drain_is_over_before_a_container_is_killed(services: dict[str, Any]) -> None:
    for name in ("seqloss", "seqloss-gpu"):
        given = services[name]["environment"]
        settings = Settings(
            **{key.removeprefix("SEQLOSS_").lower(): value for key, value in given.items()}
        )
        drain = settings.drain_delay_seconds + settings.drain_timeout_seconds
        match = re.fullmatch(r"(\d+)s", services[name]["stop_grace_period"])
        assert match is not None
        # Connections are closed after the drain: server.py gives them two seconds.
        assert int(match.group(1)) >= drain + 5


def test_prometheus_asks_a_port_that_the_service_has(services: dict[str, Any]) -> None:
    configuration = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = configuration["scrape_configs"]
    targets = [target for one in job["static_configs"] for target in one["targets"]]
    assert targets
    for target in targets:
        name, _, port = target.partition(":")
        environment = services[name]["environment"]
        assert environment["SEQLOSS_ADMIN_PORT"] == port
        assert environment["SEQLOSS_ADMIN_HOST"] == "0.0.0.0"  # noqa: S104 - compared


def test_grafana_finds_its_dashboards_and_prometheus(services: dict[str, Any]) -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    mounted = {volume["target"] for volume in services["grafana"]["volumes"]}
    for path in (provisioning / "dashboards").glob("*.yml"):
        for provider in yaml.safe_load(path.read_text())["providers"]:
            assert provider["options"]["path"] in mounted
    (path,) = (provisioning / "datasources").glob("*.yml")
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    assert httpx.URL(source["url"]).host in services
    assert "/etc/grafana/provisioning" in mounted
