"""What the README shows is what happens."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from readme import README, ROOT, Section, others
from seqloss import __version__
from seqloss.demo.greeting import example_request
from seqloss.export.families import FAMILIES, REFUSED
from seqloss.http.schemas import LossReply, LossRequest
from server import Server

REFERENCE = others()
commands, only = REFERENCE.commands_of, REFERENCE.only_block


@pytest.fixture
def address(serve: Callable[..., Server], bundle_of: Any) -> str:
    server = serve(f"demo={bundle_of('demo').folder}")
    with server.client() as client:
        return str(client.base_url).rstrip("/")


def test_every_command_is_tried_by_some_test() -> None:
    programs = {command.split()[0] for command in REFERENCE.commands}
    assert programs == {"make", "curl", "pip", "seqloss"}


@pytest.mark.parametrize("command", commands("make"))
def test_make_knows_its_targets(command: str) -> None:
    subprocess.run([*shlex.split(command), "--dry-run"], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("command", commands("pip"))
def test_pip_installs_extras_that_exist(command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\[(\w+)\]", command):
        assert extra in project["optional-dependencies"]


def test_curl_has_the_reply_that_is_shown(address: str) -> None:
    (command,) = commands("curl")
    command = command.replace("http://localhost:8000", address)
    done = subprocess.run(shlex.split(command), check=True, capture_output=True)
    reply, shown = json.loads(done.stdout), json.loads(only("json"))
    LossReply.model_validate(reply)
    assert reply.keys() == shown.keys()
    for name in ("losses", "nlls", "mean_losses", "perplexities", "aggregate"):
        assert reply[name] == pytest.approx(shown[name], rel=1e-3), name
    for name in ("model", "num_tokens", "errors"):
        assert reply[name] == shown[name], name
    for name in shown["usage"].keys() - {"queue_ms", "compute_ms"}:
        assert reply["usage"][name] == shown["usage"][name]


def test_every_field_of_the_reply_is_explained() -> None:
    for name in json.loads(only("json")).keys() - {"model"}:
        assert f"| `{name}` |" in README


def test_the_examples_are_the_texts_that_they_claim_to_be() -> None:
    (command,) = commands("curl")
    body = shlex.split(command)[-1]
    assert json.loads(body) == example_request()
    (example,) = LossRequest.model_json_schema()["examples"]
    assert example == example_request() | {"return": ["token_losses"]}


def test_python_prints_losses_and_errors(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = only("python").replace("http://localhost:8000", address)
    exec(compile(program, "README.md", "exec"), {})  # noqa: S102 - it is what readers do
    losses, error = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[\d+\.\d+, None\]", losses)
    assert error.startswith("1 token_out_of_range target 1 has the id 99999 at position 3")


def test_recipes_for_languages_are_requests() -> None:
    page = (ROOT / "docs/token-ids.md").read_text()
    recipes = Section("ids", page).blocks("jsonc")
    assert len(recipes) == 2
    for recipe in recipes:
        LossRequest.model_validate_json(recipe)


def test_the_table_of_models_names_every_family() -> None:
    table = README.partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    _, *rows = re.findall(r"^\| .* \| `([\w-]+)` \| (.*?) \|", table, re.MULTILINE)
    assert {name for name, cell in rows if not cell.startswith("no: ")} == FAMILIES.keys()
    assert {name: cell for name, cell in rows if cell.startswith("no: ")} == {
        name: f"no: {refusal.reason}" for name, refusal in REFUSED.items()
    }
    assert all(float(cell) <= 2e-5 for _, cell in rows if not cell.startswith("no: "))


def test_commands_on_bundles_work_as_shown(tmp_path: Path, serve: Callable[..., Server]) -> None:
    seqloss = [sys.executable, "-m", "seqloss.cli"]
    programs = ("seqloss export", "seqloss inspect", "seqloss verify")
    for command in (command for program in programs for command in commands(program)):
        _, *arguments = shlex.split(command.replace("build/", f"{tmp_path}/"))
        subprocess.run([*seqloss, *arguments], check=True, cwd=ROOT, capture_output=True)
    engines = []
    for command in commands("seqloss serve"):
        _, _, *arguments = shlex.split(command.replace("build/", f"{tmp_path}/"))
        place = arguments.index("--port")
        with serve(*arguments[:place], *arguments[place + 2 :]).client() as client:
            (model,) = client.get("/models").json()["models"]
            assert model["name"] == "mine"
            engines.append((model["engine"], model["precision"]))
    assert [engine for engine, _ in engines] == ["torch", "onnx"]
    assert engines[1] == ("onnx", "int8")


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in wanted} - {"seqloss"}
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(re.search(rf"^{name}==[\w.]+", pinned, re.MULTILINE) for name in names)
    assert not re.search(r"file:|://|@", pinned)


def test_every_setting_says_its_trade_off_or_needs_none() -> None:
    """Units stand in names: what is counted has one."""
    source = (ROOT / "service/seqloss/settings.py").read_text()
    names = re.findall(r"^    (\w+): .*=", source, re.MULTILINE)
    explained = re.findall(r'^    (\w+): .*=.*\n    """', source, re.MULTILINE)
    assert set(names) - set(explained) <= {"model_config", "port"}
