"""Compiles the kernels, once for each machine's instructions, into a folder of the user's.

Whoever could write there could run code in the service: the folder is private, and nothing in it
is trusted that belongs to somebody else.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seqloss import __version__
from seqloss.errors import KernelsUnavailableError

_SOURCES = Path(__file__).parent / "cpu"
# Of a package that was built with `python -m seqloss.kernels`.
PREBUILT = Path(__file__).parent / "prebuilt"
# GCC finds uninitialised values in its own header of vector functions; contraction into fused
# operations would make results depend on what it fuses.
_FLAGS = (
    "-std=c++20 -O3 -fPIC -fopenmp -ffp-contract=off -Wall -Wextra -Wno-uninitialized "
    "-Wno-maybe-uninitialized"
).split()

# A process may load the libraries of two CPUs, whose functions have the same names.
_LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic")

# What kernels are made for, by the names of `instructions`.
AVX2 = frozenset("abm avx2 bmi1 bmi2 f16c fma movbe popcnt".split())
AVX512 = AVX2 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
AVX512_BF16 = AVX512 | {"avx512_bf16"}
# The best first. GCC 11 is the first that knows these architectures.
_ARCHITECTURES = {
    AVX512_BF16: ("-march=x86-64-v4", "-mavx512bf16"),
    AVX512: ("-march=x86-64-v4",),
    AVX2: ("-march=x86-64-v3",),
}

_TIMEOUT_SECONDS = 300
# Models of one process want the same library at the same time.
_COMPILING = threading.Lock()


def instructions() -> frozenset[str]:
    """What the CPU has, by the names that Linux has for it; none where they cannot be known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def built(cache: Path) -> Path:
    """The library for this machine: one that came with the package, else the cache's.

    Args:
        cache: the user's folder, where it is compiled if it is not there; made private.

    Raises:
        KernelsUnavailableError: there is no compiler, it fails, the CPU is another one, or the
            folder is not the user's own.
    """
    flags = _flags(instructions())
    if _is_there(came := PREBUILT / _name(flags)):
        return came
    path = _own_folder(cache) / _name(flags)
    with _COMPILING, _written_to(cache):
        if not _is_there(path):
            _compile(path, flags)
    if path.stat().st_uid != os.getuid():
        raise KernelsUnavailableError(f"{path} belongs to somebody else")
    return path


def is_built(cache: Path) -> bool:
    """Whether `built` has nothing to compile; not where the folder cannot be looked into."""
    try:
        name = _name(_flags(instructions()))
    except KernelsUnavailableError:
        return False
    return any(_is_there(folder / name) for folder in (PREBUILT, cache))


def build_for_all(folder: Path) -> list[Path]:
    """Libraries for all CPUs that there are kernels for, whatever this one is.

    Raises:
        KernelsUnavailableError: there is no compiler, it fails, or the folder cannot be written to.
    """
    made = []
    with _written_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for needed in _ARCHITECTURES:
            flags = _flags(needed)
            made.append(folder / _name(flags))
            _compile(made[-1], flags)
    return made


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as that of a folder of somebody else's
        return False


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KernelsUnavailableError(f"{folder} cannot be written to: {error}") from error


def _flags(found: frozenset[str]) -> tuple[str, ...]:
    needed = next((needed for needed in _ARCHITECTURES if found >= needed), None)
    if platform.system() != "Linux" or needed is None:
        raise KernelsUnavailableError(
            f"they are for Linux, on a CPU with {', '.join(sorted(AVX2))}"
        )
    return (*_FLAGS, *_ARCHITECTURES[needed])


def _compiler() -> str:
    """The first that is not clang: what that compiles wants an OpenMP that Torch does not bring."""
    refused = []
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++")):
        if found := shutil.which(name):
            if "clang" not in _run([found, "--version"]).lower():
                return found
            refused.append(found)
    if refused:
        names = " and ".join(dict.fromkeys(refused))
        raise KernelsUnavailableError(
            f"{names} is clang, whose OpenMP is not Torch's: install g++, of GCC 11 or newer"
        )
    raise KernelsUnavailableError(
        "there is no C++ compiler (c++, g++, or what CXX names): install g++, of GCC 11 or newer"
    )


def _name(flags: tuple[str, ...]) -> str:
    """By a digest of all that the library is made of."""
    digest = hashlib.sha256(" ".join((__version__, *flags, *_LINK_FLAGS)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return f"kernels-{digest.hexdigest()[:32]}.so"


def _own_folder(cache: Path) -> Path:
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache.stat()
    except OSError as error:
        raise KernelsUnavailableError(f"{cache} cannot be used: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KernelsUnavailableError(f"others than this user may write to {cache}")
    return cache


def _compile(path: Path, flags: tuple[str, ...]) -> None:
    """Written whole or not at all, however many processes do it at a time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        sources = sorted(map(str, _SOURCES.glob("*.cpp")))
        # Linked with no OpenMP: Torch has loaded its own, and two would fight over the cores.
        objects = [str(Path(folder) / f"{Path(source).stem}.o") for source in sources]
        compiler = _compiler()
        for source, made_of in zip(sources, objects, strict=True):
            _run([compiler, *flags, "-c", source, "-o", made_of])
        _run([compiler, *_LINK_FLAGS, *objects, "-o", str(made)])
        made.chmod(0o755)
        # A library that is cut off where the power failed would end each process that loads it.
        with made.open("rb") as written:
            os.fsync(written)
        made.replace(path)


def _lowest_priority() -> list[str]:
    """The service answers meanwhile."""
    nice = shutil.which("nice")
    return [nice, "-n", "19"] if nice else []


def _run(command: list[str]) -> str:
    """What it prints."""
    try:
        done = subprocess.run(  # noqa: S603 - a compiler, and files of this package
            [*_lowest_priority(), *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise KernelsUnavailableError(f"{command[0]} fails: {done.stderr[-2000:]}")
    return done.stdout
