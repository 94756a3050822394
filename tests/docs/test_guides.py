"""The README's sections for people with a task do what they say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from readme import GUIDES, ROOT, Section, section
from seqloss.demo.corpus import corpus
from server import Server

FILTER, CANDIDATES, DASHBOARD = map(section, GUIDES)
RUN = {
    "python": [sys.executable],
    "seqloss": [sys.executable, "-m", "seqloss.cli"],
    "seqloss-client": [sys.executable, "-m", "seqloss_client.cli"],
}


def run(command: str, address: str = "") -> str:
    """A command of the README; what it printed."""
    program, *arguments = shlex.split(command.replace("http://localhost:8000", address))
    if command.startswith("seqloss-client score"):
        arguments += ["--url", address]
    whole = [*RUN.get(program, [program]), *arguments]
    done = subprocess.run(whole, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README calls build."""
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def in_folder(folder: Path) -> Callable[[str], str]:
    return lambda command: command.replace("build/", f"{folder}/")


def server_of(guide: Section, in_folder: Callable[[str], str]) -> Server:
    (command,) = guide.commands_of("seqloss serve")
    _, _, *arguments = shlex.split(in_folder(command))
    place = arguments.index("--port")
    return Server(*arguments[:place], *arguments[place + 2 :])


@pytest.fixture(scope="module")
def address(in_folder: Callable[[str], str]) -> Iterator[str]:
    """The service of the first guide, with both models, beside the corpus."""
    for command in FILTER.commands_of("seqloss export") + FILTER.commands_of("python -m"):
        run(in_folder(command))
    server = server_of(FILTER, in_folder)
    yield server.address
    server.process.kill()
    server.process.communicate()


def test_every_command_of_the_guides_is_tried() -> None:
    programs = {command.split()[0] for guide in map(section, GUIDES) for command in guide.commands}
    assert programs == {*RUN, "pip", "curl", "SEQLOSS_STREAMS=newswire"}


def test_pip_installs_extras_that_exist() -> None:
    (command,) = FILTER.commands_of("pip")
    _, _, *wanted = shlex.split(command)
    assert len(wanted) == 2
    for one in wanted:
        folder, _, extras = one.rstrip("]").partition("[")
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def test_filtering_keeps_what_is_right(
    address: str, folder: Path, in_folder: Callable[[str], str]
) -> None:
    for command in FILTER.commands_of("seqloss-client"):
        run(in_folder(command), address)
    (made,) = FILTER.commands_of("python -m")
    num_pairs = int(made.split("--pairs ")[1].split()[0])
    lines = list(islice(corpus("de", 0.3, seed=2026), num_pairs))
    table = [line.split("\t") for line in (folder / "scores.tsv").read_text().splitlines()[1:]]
    assert len(table) == num_pairs

    kept = set(zip(*map(read_lines, (folder / "kept.en", folder / "kept.de")), strict=True))
    is_kept = np.array([(line.source, line.target) in kept for line in lines])
    is_right = np.array([line.is_right for line in lines])
    print(f"kept of the right: {is_kept[is_right].mean():.2%}", end=", ")
    print(f"dropped of the wrong: {(~is_kept)[~is_right].mean():.2%}")
    assert is_kept[is_right].mean() >= 0.998
    assert (~is_kept)[~is_right].mean() >= 0.998
    page = (folder / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert not re.search(r"""(src|href)=["']https?:""", page)


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_wrong_hour_is_what_costs(address: str) -> None:
    (command,) = CANDIDATES.commands_of("curl")
    reply = json.loads(run(command, address))
    right, wrong = reply["losses"]
    assert right < 0.1
    assert wrong > 5
    costs = reply["token_losses"][1]
    assert reply["target_tokens"][1][int(np.argmax(costs))] == "5"


def test_python_prefers_the_right_candidate(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = CANDIDATES.only_block("python").replace("http://localhost:8000", address)
    exec(compile(program, "README.md", "exec"), {})  # noqa: S102 - it is what readers do
    assert re.fullmatch(r"0 \[0\.\d+, 1\d\.\d+\]\n", capsys.readouterr().out)


def test_the_dashboard_has_data(
    address: str, in_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = DASHBOARD.commands_of("seqloss serve")
    (line,) = (line for line in DASHBOARD.commands if line.endswith(command))
    name, value = line.removesuffix(command).strip().split("=")
    monkeypatch.setenv(name, value)
    server = server_of(DASHBOARD, in_folder)
    try:
        post, get = DASHBOARD.commands_of("curl")
        assert json.loads(run(post, server.address))["aggregate"]["num_pairs"] == 1
        metrics = run(get, server.address)
    finally:
        server.process.kill()
        server.process.communicate()
    samples = re.findall(r"^(seqloss_\w+)(\{.*\})? ", metrics, re.MULTILINE)
    assert any('stream="newswire"' in labels for _, labels in samples)
    for expression in DASHBOARD.only_block("promql").splitlines():
        for metric, selector in re.findall(r"(seqloss_\w+)(?:\{(.*?)\})?", expression):
            mine = [labels for found, labels in samples if found == metric]
            assert any(selector in labels for labels in mine), f"{metric} {selector}"
