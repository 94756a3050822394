"""What a result was measured on, and with what."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# Instructions that matter to matrix products.
_FLAGS = re.compile(r"avx2|avx512f|avx512_(bf16|vnni|fp16)|avx_vnni|amx_\w+|asimd|sve2?|bf16|i8mm")
_PACKAGES = ("seqloss", "torch", "transformers", "onnxruntime", "ctranslate2", "numpy")


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware and its system."""

    cpu: str
    flags: list[str]
    cores: int
    memory_bytes: int
    system: str


@dataclass(frozen=True, slots=True)
class Origin:
    """From what code a result is, and how to have it again."""

    commit: str
    command: str
    versions: dict[str, str]
    environment: dict[str, str]


def machine() -> Machine:
    """This one."""
    text = _cpu_info()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return Machine(
        cpu=model.group(1) if model else platform.processor() or platform.machine(),
        flags=[flag for flag in flags.group(1).split() if _FLAGS.fullmatch(flag)] if flags else [],
        cores=available_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=platform.system(),
    )


def available_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def origin(make_target: str) -> Origin:
    """Of this process, which `make` can start again."""
    arguments = shlex.join(sys.argv[1:])
    return Origin(
        commit=_commit(),
        # What the shell had quoted is now in single quotes, so that double ones go around it.
        command=f"make {make_target}" + (f' BENCH_ARGS="{arguments}"' if arguments else ""),
        versions={"python": platform.python_version()} | dict(map(_version, _PACKAGES)),
        environment={
            name: value for name, value in sorted(os.environ.items()) if name.startswith("SEQLOSS_")
        },
    )


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _version(package: str) -> tuple[str, str]:
    try:
        return package, metadata.version(package)
    except metadata.PackageNotFoundError:
        return package, "not installed"


def _commit() -> str:
    """The commit, and whether files differ from it."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with changes" if changes else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
