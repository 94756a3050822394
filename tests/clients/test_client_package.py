"""The client as it is installed: what comes with it, and what importing it costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seqloss_client import __version__
from server import Server

PROJECT = Path(__file__).parents[2] / "clients" / "python"
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
README = (PROJECT / "README.md").read_text()

# What httpx needs; NumPy and orjson need nothing.
OF_HTTPX = {"anyio", "certifi", "h11", "httpcore", "idna", "sniffio", "typing-extensions"}


def run(*command: str | Path) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def test_it_needs_three_packages() -> None:
    names = {re.match(r"[a-z]+", one).group() for one in PYPROJECT["dependencies"]}  # type: ignore[union-attr]
    assert names == {"httpx", "numpy", "orjson"}


def test_versions_agree() -> None:
    assert PYPROJECT["version"] == __version__


def test_the_license_is_that_of_the_project() -> None:
    root = PROJECT.parents[1]
    assert (PROJECT / "LICENSE").read_text() == (root / "LICENSE").read_text()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the client alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = PROJECT.parents[1] / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, PROJECT)
    return python


def test_an_empty_environment_gets_what_is_needed_and_nothing_else(python: Path) -> None:
    listed = run(python, "-m", "pip", "list", "--format", "freeze")
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert {"seqloss-client", "httpx", "numpy", "orjson"} <= names
    assert names - {"seqloss-client", "httpx", "numpy", "orjson", "pip", "setuptools"} <= OF_HTTPX


def test_the_installed_package_is_whole(python: Path) -> None:
    code = "import seqloss_client, importlib.resources as r; print(seqloss_client.__file__); "
    code += "print(r.files(seqloss_client).joinpath('py.typed').is_file())"
    place, typed = run(python, "-I", "-c", code).split()
    assert place.startswith(str(python.parents[1]))
    assert typed == "True"


def test_every_module_but_those_with_extras_imports(python: Path) -> None:
    code = "from seqloss_client import *; print(LossClient().ready.__name__)"
    assert run(python, "-I", "-c", code).split() == ["ready"]


def test_importing_costs_little(python: Path) -> None:
    """At most 100 ms beyond httpx and NumPy, of the processor: others may be busy with the rest."""
    code = (
        "import time, httpx, numpy; begun = time.process_time(); import seqloss_client; "
        "print(time.process_time() - begun)"
    )
    assert min(float(run(python, "-I", "-c", code)) for _ in range(7)) < 0.1


def test_importing_leaves_for_later_what_not_everybody_uses(python: Path) -> None:
    code = "import httpx, numpy, seqloss_client, sys; print(*sys.modules)"
    imported = set(run(python, "-I", "-c", code).split())
    assert "seqloss_client._client" in imported
    assert not imported & {"asyncio", "argparse", "pyarrow", "duckdb", "matplotlib", "zstandard"}


def test_the_readme_works(
    serve: Callable[..., Server], bundle_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    address = serve(f"demo={bundle_of('demo').folder}").address
    printed = [
        run(sys.executable, "-c", block.replace("http://localhost:8000", address))
        for block in blocks
    ]
    right, wrong = map(float, re.findall(r"[\d.]+", printed[0])[:2])
    assert right < wrong  # the second candidate is wrong by an hour
    assert float(printed[1]) > 0
    assert "422 invalid_request" in printed[2]
