"""The clients of Triton and KServe, in an environment of their own.

They want other versions of what the service pins, so they never share its environment: a script in
`http/clients` asks the service with one of them, and prints what it heard as JSON.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parent
_REQUIREMENTS = _TESTS / "http" / "clients-requirements.txt"
_FOLDER = _TESTS.parent / "build" / "clients-venv"


def heard_by(script: str, address: str, **given: Any) -> dict[str, Any]:
    """What a script of `http/clients` says of the service at an address."""
    done = subprocess.run(
        [_python(), str(_TESTS / "http" / "clients" / script), address.removeprefix("http://")],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def _python() -> str:
    return python_with(_REQUIREMENTS, _FOLDER)


def python_with(requirements: Path, folder: Path) -> str:
    """The interpreter of an environment that has all of a list, made once for each list.

    Args:
        requirements: pinned, with everything that these need.
        folder: the environment's.
    """
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    python, made = folder / "bin" / "python", folder / "made-of"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not made.exists() or made.read_text() != digest:
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder)
            # pip takes a minute for what takes this seconds.
            uv = [sys.executable, "-m", "uv", "pip", "install", "--python", str(python)]
            command = [*uv, "--no-deps", "--requirement", str(requirements)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            made.write_text(digest)
    return str(python)
