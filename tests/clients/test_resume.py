"""A run that ends at any moment goes on, and nothing tells its output from an undisturbed one's."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from score_runs import Corpus, demo_corpus, score, start_score
from seqloss.bundle.reader import Bundle
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus.journal import Journal
from seqloss_client.corpus.output import FileOutput
from server import Server

_NUM_PAIRS = 600
_SMALL = ("--pairs-per-request", "12", "--commit-seconds", "0", "--max-requests", "4")
# How often it is looked whether a run has come far enough to be killed.
_LOOK_SECONDS = 0.002


class Service:
    """The demo model on a port that stays, whatever happens to the process."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._server = Server(f"demo={bundle.folder}")
        self.url = self._server.address

    def start_again(self, bundle: Bundle | None = None) -> None:
        """After `kill`."""
        port = int(self.url.rpartition(":")[2])
        self._server = Server(f"demo={(bundle or self._bundle).folder}", port=port)

    def wait(self) -> None:
        """Until it is ready."""
        assert self._server.address == self.url

    def kill(self) -> None:
        """With SIGKILL."""
        self._server.process.kill()
        self._server.process.communicate()


@pytest.fixture(scope="module")
def service(bundle_of: Callable[[str], Bundle]) -> Iterator[Service]:
    """The demo model."""
    service = Service(bundle_of("demo"))
    yield service
    service.kill()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Some pairs, a few of them bad."""
    return demo_corpus(_NUM_PAIRS)


@pytest.fixture
def pairs(corpus: Corpus, tmp_path: Path) -> Path:
    """A TSV of ids; every hundredth line is bad."""
    path = tmp_path / "pairs.tsv"
    lines = [f"{_as_text(source)}\t{_as_text(target)}" for source, target in corpus.ids]
    lines[::100] = ["12 x\t5"] * len(lines[::100])
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def _as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def _arguments(pairs: Path, output: Path) -> list[str]:
    return ["--input", str(pairs), "--ids", "--output", str(output), *_SMALL]


def _files(output: Path) -> dict[str, bytes]:
    """The output, its report, and whatever else a run left."""
    return {
        path.name.removeprefix(output.name): path.read_bytes()
        for path in output.parent.iterdir()
        if path.name.startswith(output.name)
    }


def _num_pairs_done(output: Path) -> int:
    """As the journal says; 0 without one."""
    try:
        journal = json.loads(output.with_name(output.name + ".journal").read_bytes())
    except FileNotFoundError:
        return 0
    done: int = journal["progress"]["num_pairs"]
    return done


def _has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _wait_for(process: subprocess.Popen[bytes], output: Path, num_pairs: int) -> bool:
    """Until so many pairs are done; False where the process has ended before."""
    while _num_pairs_done(output) < num_pairs:
        if _has_ended(process, _LOOK_SECONDS):
            return False
    return True


def _finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


@pytest.mark.parametrize("name", ["scores", "scores.jsonl.gz", "scores.parquet"])
def test_killed_runs_go_on_and_end_as_undisturbed_ones(
    service: Service, pairs: Path, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    whole, killed = tmp_path / "whole" / name, tmp_path / "killed" / name
    for output in (whole, killed):
        output.parent.mkdir()
    assert score(service.url, *_arguments(pairs, whole)) == 0
    assert set(_files(whole)) == {"", ".errors.jsonl"}
    generator = random.Random(request.config.getoption("--kills"))
    kills = 0
    while kills < request.config.getoption("--kills"):
        process = start_score(service.url, *_arguments(pairs, killed))
        # A little further each time, and then at any moment of the next requests.
        threshold = _num_pairs_done(killed) + generator.randrange(_NUM_PAIRS // 3)
        if _wait_for(process, killed, threshold) and not _has_ended(
            process, generator.uniform(0, 0.05)
        ):
            process.kill()
            kills += 1
        process.communicate()
        if killed.exists() and not killed.with_name(name + ".journal").exists():
            assert _files(killed) == _files(whole)
            for path in killed.parent.iterdir():
                path.unlink()
    _finished(start_score(service.url, *_arguments(pairs, killed)))
    assert _files(killed) == _files(whole)


def test_a_killed_service_is_waited_for(
    service: Service, pairs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole, disturbed = tmp_path / "whole" / "scores", tmp_path / "disturbed" / "scores"
    for output in (whole, disturbed):
        output.parent.mkdir()
    assert score(service.url, *_arguments(pairs, whole)) == 0
    generator = random.Random(7)
    for _ in range(request.config.getoption("--service-kills")):
        process = start_score(service.url, *_arguments(pairs, disturbed))
        assert _wait_for(process, disturbed, generator.randrange(_NUM_PAIRS // 2))
        _has_ended(process, generator.uniform(0, 0.05))
        service.kill()
        service.start_again()
        _finished(process)
        assert _files(disturbed) == _files(whole)
        for path in disturbed.parent.iterdir():
            path.unlink()
        service.wait()


# ---------------------------------------------------------------- every single moment


class Crash(BaseException):
    """The process is gone."""


class CrashingFiles:
    """Lets a process crash before its n-th call of the operating system that changes a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._calls_left: int | None = None
        for module, name in (
            (os, "fsync"),
            (os, "ftruncate"),
            (Path, "replace"),
            (Path, "unlink"),
            (Path, "open"),
        ):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def crash_before(self, call: int | None) -> None:
        """Counted from 0; None: not at all."""
        self._calls_left = call

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._calls_left is not None:
                if self._calls_left == 0:
                    raise Crash
                self._calls_left -= 1
            return original(*arguments, **options)

        return call


def _write_blocks(path: Path, *, assembled: bool, num_blocks: int) -> None:
    """What a run does, without what is between reading and writing; every block is committed."""

    def assemble(partial: Path, output: Path) -> None:
        output.write_bytes(partial.read_bytes() + b"end")

    output = FileOutput(
        path,
        path.with_name("report"),
        Journal(path.with_name(path.name + ".journal"), {"a": 1}),
        assemble if assembled else None,
        replace=False,
    )
    try:
        progress = output.progress
        if not progress.is_whole:
            for number in range(progress.num_pairs, num_blocks):
                output.write(b"block %d\n" % number, b"bad\n" if number % 3 == 1 else b"")
                progress.num_pairs += 1
                output.commit()
        output.finish()
    finally:
        output.close()


@pytest.mark.parametrize("assembled", [False, True])
@pytest.mark.parametrize("num_blocks", [0, 5])
def test_a_crash_between_any_two_changes_of_files_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assembled: bool, num_blocks: int
) -> None:
    files = CrashingFiles(monkeypatch)
    call, has_crashed = 0, True
    while has_crashed:
        folder = tmp_path / str(call)
        folder.mkdir()
        path = folder / "scores"
        files.crash_before(call)
        has_crashed = False
        try:
            _write_blocks(path, assembled=assembled, num_blocks=num_blocks)
        except Crash:
            has_crashed = True
        files.crash_before(None)
        if not path.exists() or path.with_name("scores.journal").exists():
            _write_blocks(path, assembled=assembled, num_blocks=num_blocks)
        left = {one.name: one.read_bytes() for one in folder.iterdir()}
        text = b"".join(b"block %d\n" % number for number in range(num_blocks))
        expected = {"scores": text + b"end" * assembled}
        if num_blocks:
            expected["report"] = b"bad\n" * 2
        assert left == expected, call
        call += 1
    assert call > 10


# ---------------------------------------------------------------- what is refused


def _unfinished(service: Service, pairs: Path, output: Path) -> None:
    """Leaves a run that was killed in the middle."""
    process = start_score(service.url, *_arguments(pairs, output))
    assert _wait_for(process, output, 60)
    process.kill()
    process.communicate()
    assert 60 <= _num_pairs_done(output) < _NUM_PAIRS


def test_a_changed_input_is_refused(
    service: Service, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores"
    _unfinished(service, pairs, output)
    original = pairs.read_bytes()
    lines = original.split(b"\n")
    left = _files(output)
    for changed in (
        b"\n".join([lines[0], lines[1][:-1] + b"9", *lines[2:]]),
        b"\n".join(lines[1:]),
        b"\n".join(lines[:30]) + b"\n",
        b"",
    ):
        pairs.write_bytes(changed)
        assert score(service.url, *_arguments(pairs, output)) == 1
        assert "the input has changed" in capsys.readouterr().err
        assert _files(output) == left
    pairs.write_bytes(original)
    assert score(service.url, *_arguments(pairs, output)) == 0
    assert set(_files(output)) == {"", ".errors.jsonl"}


def test_a_changed_command_is_refused_by_name(
    service: Service, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores"
    _unfinished(service, pairs, output)
    for change, shown in (
        (["--label-smoothing", "0.1"], "--label-smoothing: 0.0 then, 0.1 now"),
        (["--score", "nll"], "--score: None then, 'nll' now"),
        (["--pairs-per-request", "13"], "--pairs-per-request: 12 then, 13 now"),
        (["--format", "tsv"], "--format: 'plain' then, 'tsv' now"),
    ):
        assert score(service.url, *_arguments(pairs, output), *change) == 1
        assert shown in capsys.readouterr().err
    assert score(service.url, *_arguments(pairs, output), "--max-requests", "1") == 0


def test_another_bundle_in_mid_run_is_refused(
    service: Service, pairs: Path, tmp_path: Path, bundle_of: Callable[[str], Bundle]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "scores"
    assert score(service.url, *_arguments(pairs, whole)) == 0
    process = start_score(service.url, *_arguments(pairs, output))
    assert _wait_for(process, output, 60)
    # It stands still, so that it cannot end before the other bundle is there.
    process.send_signal(signal.SIGSTOP)
    service.kill()
    service.start_again(bundle_of("bart"))
    service.wait()
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert b"the service has another model" in errors
    assert b"bundle: " in errors
    assert not output.exists()
    assert score(service.url, *_arguments(pairs, output)) == 1
    service.kill()
    service.start_again()
    service.wait()
    assert score(service.url, *_arguments(pairs, output)) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_a_second_process_on_the_same_output_is_refused(
    service: Service, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores"
    _unfinished(service, pairs, output)
    with output.with_name("scores.partial").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert score(service.url, *_arguments(pairs, output)) == 1
    assert f"another process is writing {output}" in capsys.readouterr().err
    assert score(service.url, *_arguments(pairs, output)) == 0


def test_a_partial_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores"
    with pytest.raises(ZeroDivisionError):
        _crash_after_a_block(path)
    path.with_name("scores.partial").write_bytes(b"bl")
    with pytest.raises(CorpusError, match=r"has 2 bytes, and .* says 8: delete both"):
        _write_blocks(path, assembled=False, num_blocks=2)


def _crash_after_a_block(path: Path) -> None:
    journal = Journal(path.with_name(path.name + ".journal"), {"a": 1})
    output = FileOutput(path, path.with_name("report"), journal, None, replace=False)
    try:
        output.write(b"block 0\n", b"")
        output.progress.num_pairs += 1
        output.commit()
        raise ZeroDivisionError
    finally:
        output.close()


def test_an_interrupted_run_says_how_to_go_on(
    service: Service, pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores"
    # Whoever runs the tests in the background has their children ignore Ctrl-C.
    process = start_score(
        service.url,
        *_arguments(pairs, output),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert _wait_for(process, output, 60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"the same command goes on from there" in errors
    assert b"Traceback" not in errors
    assert score(service.url, *_arguments(pairs, output)) == 0


def test_a_finished_output_is_not_replaced(
    service: Service, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores"
    output.write_text("precious\n")
    assert score(service.url, *_arguments(pairs, output)) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert output.read_text() == "precious\n"
    report = output.with_name("scores.errors.jsonl")
    output.rename(report)
    assert score(service.url, *_arguments(pairs, output)) == 1
    assert f"{report} is there already" in capsys.readouterr().err
    output.write_text("precious\n")
    assert score(service.url, *_arguments(pairs, output), "--force") == 0
    assert report.read_text() != "precious\n"
    assert output.read_text().count("\n") == _NUM_PAIRS
