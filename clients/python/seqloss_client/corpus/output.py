"""Where scores go: a file that survives a kill at any moment, or a pipe.

A run writes OUTPUT.partial, and notes in OUTPUT.journal how much of it counts; reports of bad pairs
go to REPORT.partial likewise. The names OUTPUT and REPORT appear once everything is there.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus.journal import Journal, Progress, sync_folder

Assemble = Callable[[Path, Path], None]
"""Makes the output of the finished partial file, where it is not that file itself."""


class Output(Protocol):
    """Takes what is written, in order."""

    @property
    def progress(self) -> Progress:
        """What counts; changes to it do from the next `commit` on."""
        ...

    def write(self, scores: bytes, report: bytes) -> None:
        """Adds a block."""
        ...

    def commit(self) -> None:
        """What was written counts, with the progress that is noted."""
        ...

    def finish(self) -> None:
        """All is written and committed."""
        ...

    def close(self) -> None:
        """Lets go of files; an unfinished run may go on later."""
        ...


class PipeOutput:
    """The standard output, or what is no regular file: nothing can be taken back."""

    def __init__(self, path: Path | None, report: Path | None) -> None:
        self._progress = Progress()
        self._file: IO[bytes] = sys.stdout.buffer if path is None else path.open("wb")
        self._report: IO[bytes] = sys.stderr.buffer if report is None else report.open("wb")
        self._opened = [file for file in (path and self._file, report and self._report) if file]

    @property
    def progress(self) -> Progress:
        """Of this run; none follows it."""
        return self._progress

    def write(self, scores: bytes, report: bytes) -> None:
        """At once."""
        try:
            self._file.write(scores)
            self._file.flush()
        except BrokenPipeError as error:
            # Python flushes the standard output once more when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            raise CorpusError("whoever read the scores has gone") from error
        self._progress.output_bytes += len(scores)
        self._report.write(report)
        self._report.flush()

    def commit(self) -> None:
        """It did when it was written."""

    def finish(self) -> None:
        """It is."""

    def close(self) -> None:
        """The standard streams stay open."""
        for file in self._opened:
            file.close()


class FileOutput:
    """A file that a later run goes on with.

    Args:
        path: the output.
        report: for bad pairs; it is only there if there are any.
        journal: with this run's parameters.
        assemble: makes the output of the partial file; None where that is it.
        replace: whether an output and a report of before may be there.

    Raises:
        CorpusError: another process writes it, or what is there does not fit.
    """

    def __init__(
        self, path: Path, report: Path, journal: Journal, assemble: Assemble | None, replace: bool
    ) -> None:
        self._path, self._report_path = path, report
        self._journal, self._assemble = journal, assemble
        self._partial = _added(path, ".partial")
        self._report_partial = _added(report, ".partial")
        self._assembled = _added(path, ".assembled")
        self._files: list[IO[bytes]] = []
        if journal.read():
            if self.progress.is_whole:
                return
        else:
            for one in (path, report):
                if one.exists() and not replace:
                    raise CorpusError(f"{one} is there already; --force replaces it")
        try:
            self._begin(replace)
        except BaseException:
            self.close()
            raise

    @property
    def progress(self) -> Progress:
        """What counts; changes to it do from the next `commit` on."""
        return self._journal.progress

    def write(self, scores: bytes, report: bytes) -> None:
        """Adds a block."""
        self._file.write(scores)
        self._report.write(report)
        self.progress.output_bytes += len(scores)
        self.progress.report_bytes += len(report)

    def commit(self) -> None:
        """Returns once all of it is on disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._journal.write()

    def finish(self) -> None:
        """Gives the files their names."""
        if not self.progress.is_whole:
            if self._assemble is not None:
                self._assemble(self._partial, self._assembled)
                _sync(self._assembled)
            self.progress.is_whole = True
            self.commit()
        if self._assemble is not None:
            self._partial.unlink(missing_ok=True)
        _rename(self._partial if self._assemble is None else self._assembled, self._path)
        if self.progress.report_bytes:
            _rename(self._report_partial, self._report_path)
        else:
            # An older one would be taken for this output's.
            self._report_partial.unlink(missing_ok=True)
            self._report_path.unlink(missing_ok=True)
        for path in (self._path, self._report_path):
            sync_folder(path)
        self._journal.remove()

    def close(self) -> None:
        """Lets go of the files, and of the lock."""
        for file in self._files:
            # What was not committed does not count; a full disk has been told of.
            with suppress(OSError):
                file.close()

    def _begin(self, replace: bool) -> None:
        self._file = self._open(self._partial)
        _lock(self._file, self._partial, self._path)
        # Whoever held the lock before may have gone on since the journal was read.
        was_there = self._journal.read()
        if self.progress.is_whole or (not was_there and self._path.exists() and not replace):
            self._remove_if_made_here(was_there)
            raise CorpusError(f"another process has finished {self._path} just now")
        self._report = self._open(self._report_partial)
        journal = self._journal.path
        _cut(self._file, self._partial, self.progress.output_bytes, journal)
        _cut(self._report, self._report_partial, self.progress.report_bytes, journal)
        if not was_there:
            self._journal.write()

    def _remove_if_made_here(self, was_there: bool) -> None:
        """An empty partial file beside a finished output would be taken for it."""
        is_empty = os.fstat(self._file.fileno()).st_size == 0
        if is_empty and (not was_there or self.progress.output_bytes):
            self._partial.unlink()

    def _open(self, path: Path) -> IO[bytes]:
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise CorpusError(f"{path} cannot be written: {error.strerror}") from error
        self._files.append(file)
        return file


def is_pipe(path: str) -> bool:
    """Whether nothing can be appended to it later: `-`, a pipe, a device."""
    return path == "-" or (Path(path).exists() and not Path(path).is_file())


def _added(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _lock(file: IO[bytes], path: Path, output: Path) -> None:
    """Until the file is closed; a process that is killed lets go of it too."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CorpusError(f"another process is writing {output}") from error
    opened, named = os.fstat(file.fileno()), path.stat() if path.exists() else None
    if named is None or not os.path.samestat(opened, named):
        raise CorpusError(f"another process has finished {output} just now")


def _cut(file: IO[bytes], path: Path, size: int, journal: Path) -> None:
    """Drops what was written after the last commit."""
    present = os.fstat(file.fileno()).st_size
    if present < size:
        raise CorpusError(
            f"{path} has {present} bytes, and {journal} says {size}: delete both to begin anew"
        )
    os.ftruncate(file.fileno(), size)
    file.seek(size)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _rename(path: Path, name: Path) -> None:
    """Unless a run that was killed has done it already."""
    if path.exists():
        path.replace(name)


class Committer:
    """Commits every so often: each commit waits for the disk.

    Attributes:
        output: what is committed.

    Args:
        output: likewise.
        check: is called before; raises where what was written must not count.
        seconds: between two commits.
    """

    def __init__(self, output: Output, check: Callable[[], Any], seconds: float) -> None:
        self.output = output
        self._check = check
        self._seconds = seconds
        self._last = time.monotonic()

    def written(self) -> None:
        """A block was."""
        if time.monotonic() - self._last >= self._seconds:
            self.now()

    def now(self) -> None:
        """Commits."""
        self._check()
        self.output.commit()
        self._last = time.monotonic()
