"""Kernels are compiled once, into a folder that nobody else writes to, or not at all."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from seqloss.errors import KernelsUnavailableError
from seqloss.kernels import build
from seqloss.kernels.build import build_for_all, built, is_built

MakeCompiler = Callable[..., Path]

CLANG = "Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu"


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small sources and a header in the place of the kernels, on any CPU."""
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "number.h").write_text('extern "C" int number();\n')
    (folder / "one.cpp").write_text('#include "number.h"\nint number() { return 1; }\n')
    (folder / "two.cpp").write_text('extern "C" int other() { return 2; }\n')
    monkeypatch.setattr(build, "_SOURCES", folder)
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(build, "instructions", lambda: build.AVX512)
    return folder


@pytest.fixture
def make_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeCompiler:
    """Makes a script the compiler, which writes down what it is asked to compile."""

    def make(script: str = 'exec g++ "$@"', version: str = "g++ (GCC) 12.2.0") -> Path:
        log, path = tmp_path / "compiler.log", tmp_path / "compiler"
        says_version = f'if [ "$1" = --version ]; then echo "{version}"; exit; fi'
        path.write_text(f'#!/bin/sh\n{says_version}\necho "$@" >> {log}\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return log

    return make


def runs(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def number(library: Path) -> int:
    result: int = ctypes.CDLL(str(library)).number()
    return result


def test_what_was_compiled_once_is_not_compiled_again(
    make_compiler: MakeCompiler, tmp_path: Path
) -> None:
    log = make_compiler('exec g++ "$@"')
    assert not is_built(tmp_path / "cache")
    path = built(tmp_path / "cache")
    assert len(runs(log)) == 3  # each source, and the linker
    assert number(path) == 1
    assert is_built(tmp_path / "cache")
    assert built(tmp_path / "cache") == path
    assert len(runs(log)) == 3
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [path.name]


def test_the_folder_is_private(make_compiler: MakeCompiler, tmp_path: Path) -> None:
    make_compiler('exec g++ "$@"')
    before = os.umask(0)
    try:
        path = built(tmp_path / "deep" / "cache")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(
    mode: int, make_compiler: MakeCompiler, tmp_path: Path
) -> None:
    """Also where it holds a library already: who could write there may have put it there."""
    log = make_compiler('exec g++ "$@"')
    cache = tmp_path / "cache"
    built(cache)
    cache.chmod(mode)
    with pytest.raises(
        KernelsUnavailableError, match=r"others than this user may write to .*cache"
    ):
        built(cache)
    assert len(runs(log)) == 3


def test_what_belongs_to_somebody_else_is_refused(
    make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_compiler('exec g++ "$@"')
    built(tmp_path / "cache")
    monkeypatch.setattr(os, "getuid", lambda: 1_234_567)
    with pytest.raises(KernelsUnavailableError, match="others than this user"):
        built(tmp_path / "cache")


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelsUnavailableError, match="cannot be used"):
        built(tmp_path / "file" / "cache")


def test_a_folder_that_cannot_be_written_to_is_said(
    make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose file system is read-only."""
    make_compiler('exec g++ "$@"')

    def refuse(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(KernelsUnavailableError, match=r"cache cannot be written to: .*Read"):
        built(tmp_path / "cache")
    with pytest.raises(KernelsUnavailableError, match=r"made cannot be written to: .*Read"):
        build_for_all(tmp_path / "made")


def test_nothing_is_built_where_nobody_may_look(
    make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it an error to ask. A path that is too long fails alike, and for root too."""
    make_compiler('exec g++ "$@"')
    cache = tmp_path / "cache"
    path = built(cache)
    look = Path.stat

    def refuse(asked: Path, **options: Any) -> os.stat_result:
        if asked == path:
            raise PermissionError(13, "Permission denied")
        return look(asked, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    assert not is_built(cache)
    assert not is_built(tmp_path / ("long" * 100))
    with pytest.raises(KernelsUnavailableError, match="cannot be used"):
        built(tmp_path / ("long" * 100))


def test_without_a_compiler_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelsUnavailableError, match=r"no C\+\+ compiler .*: install g\+\+"):
        built(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["CXX", "c++"])
def test_clang_is_passed_over(
    name: str, make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs want functions of its own OpenMP, which Torch does not bring."""
    log = make_compiler("exit 1", CLANG)
    if name == "c++":
        monkeypatch.delenv("CXX")
        (tmp_path / "compiler").rename(tmp_path / "c++")
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert number(built(tmp_path / "cache")) == 1
    assert not runs(log)


def test_clang_alone_is_refused(
    make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_compiler("exit 1", CLANG)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(KernelsUnavailableError, match=r"compiler is clang.* install g\+\+"):
        built(tmp_path / "cache")
    assert not runs(log)
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_compiler_complains_of_is_said(make_compiler: MakeCompiler, tmp_path: Path) -> None:
    make_compiler("echo out of coffee >&2; exit 3")
    with pytest.raises(KernelsUnavailableError, match=r"compiler fails: out of coffee"):
        built(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_compiler_that_does_not_run_is_said(
    make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_compiler("")
    (tmp_path / "compiler").write_bytes(b"\x7fELF, or so it says")
    monkeypatch.setattr(build, "_lowest_priority", list)
    with pytest.raises(KernelsUnavailableError, match="does not run"):
        built(tmp_path / "cache")


def test_a_compiler_that_hangs_is_ended(
    make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_compiler("exec tail -f /dev/null")
    monkeypatch.setattr(build, "_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(KernelsUnavailableError, match="timed out"):
        built(tmp_path / "cache")


def test_a_cpu_without_the_instructions_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in build.AVX2:
        monkeypatch.setattr(build, "instructions", lambda missing=missing: build.AVX512 - {missing})
        with pytest.raises(KernelsUnavailableError, match="on a CPU with"):
            built(tmp_path / "cache")
        assert not is_built(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_changed_source_is_another_library(
    make_compiler: MakeCompiler, sources: Path, tmp_path: Path
) -> None:
    log = make_compiler('exec g++ "$@"')
    first = built(tmp_path / "cache")
    (sources / "number.h").write_text('extern "C" int number();  // changed\n')
    assert not is_built(tmp_path / "cache")
    second = built(tmp_path / "cache")
    (sources / "one.cpp").write_text('extern "C" int number() { return 5; }\n')
    third = built(tmp_path / "cache")
    assert len({first, second, third}) == 3
    assert len(runs(log)) == 9
    assert (number(first), number(second), number(third)) == (1, 1, 5)


def test_other_flags_another_cpu_and_another_version_are_other_libraries(
    make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_compiler('exec g++ "$@"')
    paths = [built(tmp_path / "cache")]
    for name, value in (
        ("_FLAGS", (*build._FLAGS, "-DCHANGED")),
        ("instructions", lambda: build.AVX512_BF16),
        ("instructions", lambda: build.AVX2),
        ("__version__", "another"),
    ):
        monkeypatch.setattr(build, name, value)
        paths.append(built(tmp_path / "cache"))
    assert len(set(paths)) == 5


def test_what_came_with_the_package_is_not_compiled(
    make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each CPU that there are kernels for, whatever the one is that made the package."""
    log = make_compiler('exec g++ "$@"')
    made = build_for_all(build.PREBUILT)
    assert len(set(made)) == 3
    num_runs = len(runs(log))
    for has in (build.AVX2, build.AVX512, build.AVX512_BF16):
        monkeypatch.setattr(build, "instructions", lambda has=has: has)
        assert is_built(tmp_path / "cache")
        assert built(tmp_path / "cache") in made
    assert len(runs(log)) == num_runs
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "script",
    [
        "exit 1",
        # The linker stops halfway.
        """for last; do :; done
        case "$*" in *-shared*) echo half > "$last"; exit 1;; esac
        exec g++ "$@" """,
        "kill -9 $$",
    ],
)
def test_a_failure_leaves_the_library_that_works(
    script: str, make_compiler: MakeCompiler, tmp_path: Path
) -> None:
    make_compiler('exec g++ "$@"')
    made = build_for_all(tmp_path / "made")
    content = [path.read_bytes() for path in made]
    make_compiler(script)
    with pytest.raises(KernelsUnavailableError, match="compiler fails"):
        build_for_all(tmp_path / "made")
    assert [path.read_bytes() for path in made] == content
    assert set((tmp_path / "made").iterdir()) == set(made)


def test_models_of_one_process_compile_it_once(
    make_compiler: MakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_compiler('exec g++ "$@"')
    all_are_here, own_folder = threading.Barrier(4), build._own_folder

    def wait_for_others(cache: Path) -> Path:
        all_are_here.wait(30)
        return own_folder(cache)

    monkeypatch.setattr(build, "_own_folder", wait_for_others)
    with ThreadPoolExecutor(4) as models:
        paths = list(models.map(built, [tmp_path / "cache"] * 4))
    assert len(set(paths)) == 1
    assert len(runs(log)) == 3


PROCESS = """
import sys
from pathlib import Path
from seqloss.kernels import build

build._SOURCES = Path(sys.argv[1])
build.instructions = lambda: build.AVX512
sys.stdin.readline()
print(build.built(Path(sys.argv[2])))
"""


def test_two_processes_may_compile_at_a_time(
    make_compiler: MakeCompiler, sources: Path, tmp_path: Path
) -> None:
    # Neither goes on before the other one is here too.
    meet = tmp_path / "meet"
    meet.mkdir()
    log = make_compiler(
        f'touch {meet}/$PPID; while [ "$(ls {meet} | wc -l)" -lt 2 ]; do :; done; exec g++ "$@"'
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, sources, tmp_path / "cache"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        printed = [process.communicate(timeout=600)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert printed[0] == printed[1]
    assert len(runs(log)) == 6
    assert number(Path(printed[0])) == 1
    assert [str(one) for one in (tmp_path / "cache").iterdir()] == printed[:1]


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("made", "there is no C++ compiler"),
        ("file/made", "file/made cannot be written to: [Errno 20] Not a directory"),
    ],
)
def test_the_command_for_packages_says_what_is_missing(
    folder: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    script = (
        "import runpy, sys; from pathlib import Path; from seqloss.kernels import build; "
        "build.PREBUILT = Path(sys.argv[1]); "
        "runpy.run_module('seqloss.kernels', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, tmp_path / folder],
        env={**os.environ, "CXX": "no-such-compiler", "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("seqloss.kernels: ")
    assert said in done.stderr
