"""Files on this machine, or in a store that Arrow knows."""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from seqloss.errors import ConfigurationError

_Result = TypeVar("_Result")

# What begins with an underscore is no data to Arrow, Spark and others that read the folder.
_UNFINISHED = "_unfinished-"
_UNFINISHED_NAME = re.compile(rf"{_UNFINISHED}[0-9a-f]{{32}}-(.+)")

# Between tries: a store that does not answer often does a moment later.
_PAUSES_SECONDS = (0.5, 2.0, 8.0)
# These are answers.
_ANSWERS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)

_LOG = logging.getLogger(__name__)


def patiently(attempt: Callable[[], _Result]) -> _Result:
    """What a function gives, which may fail a few times.

    Raises:
        OSError: it failed too often, or said what no other try will change.
    """
    for seconds in _PAUSES_SECONDS:
        try:
            return attempt()
        except _ANSWERS:
            raise
        except OSError as error:
            _LOG.warning("%s; it is tried again in %g s", error, seconds)
            time.sleep(seconds)
    return attempt()


@dataclass(frozen=True, slots=True)
class Location:
    """A file or folder on this machine, or in a store: s3, gs, abfs, hdfs."""

    filesystem: fs.FileSystem
    path: str

    @classmethod
    def of(cls, text: str) -> Location:
        """A path, or a URI.

        Raises:
            ConfigurationError: it is a URI that Arrow does not know.
        """
        try:
            if "://" in text:
                return cls(*fs.FileSystem.from_uri(text))
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigurationError(f"{text}: {error}") from error
        return cls(fs.LocalFileSystem(), absolute(text))

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    @property
    def info(self) -> fs.FileInfo:
        """Whether it is there, and what it is."""
        return patiently(lambda: self.filesystem.get_file_info(self.path))

    @property
    def contents(self) -> dict[str, int]:
        """The files of a folder by their names, and their sizes in bytes."""
        found = self._found(fs.FileSelector(self.path))
        return {one.base_name: one.size for one in found if one.type == fs.FileType.File}

    def all_files(self) -> Iterator[fs.FileInfo]:
        """Those of a folder and all below it, and whatever else is there that is no folder."""
        below = fs.FileSelector(self.path, recursive=True)
        folders = [self.path]
        for one in self._found(below):
            if one.type == fs.FileType.Directory:
                folders.append(one.path)
            else:
                yield one
        for path in chain.from_iterable(map(_dangling, folders if self._is_local else ())):
            yield fs.FileInfo(str(path), fs.FileType.NotFound)

    def _found(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        found = patiently(lambda: self.filesystem.get_file_info(selector))
        try:
            return [one for one in found if one.path]  # names are read when they are asked for
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"below {self.path} the name {error.object!r} is not UTF-8; rename it"
            ) from error

    def contains(self, other: Location) -> bool:
        """Whether the other is the same, or lies in it, wherever links lead."""
        if not self.filesystem.equals(other.filesystem):
            return False
        return f"{other._real}/".startswith(f"{self._real}/")

    @property
    def _real(self) -> str:
        return str(Path(self.path).resolve() if self._is_local else self.path).rstrip("/")

    @property
    def _is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def read(self) -> bytes:
        """All of a file."""

        def read() -> bytes:
            with self.filesystem.open_input_stream(self.path) as stream:
                return bytes(stream.read())

        return patiently(read)

    def write(self, content: bytes) -> None:
        """A whole file, that replaces what is there; nobody ever sees a part of it."""

        def finish(begun: Location) -> None:
            self.filesystem.move(begun.path, self.path)

        patiently(lambda: self._write(content, finish))

    def write_first(self, content: bytes) -> None:
        """A whole file, unless there is one; of those who try at once one writes it.

        In a store, which knows no way to keep others out, the last one does.
        """

        def finish(begun: Location) -> None:
            if (self._is_local and _linked(begun.path, self.path)) or self.info.is_file:
                begun.remove()
            else:
                self.filesystem.move(begun.path, self.path)

        patiently(lambda: self._write(content, finish))

    def _write(self, content: bytes, finish: Callable[[Location], None]) -> None:
        """A file of another name, which is given this one when all of it is there.

        Raises:
            OSError: it cannot be written, or another run has swept it. It is gone then.
        """
        begun = self.unfinished()
        try:
            with self.filesystem.open_output_stream(begun.path) as stream:
                stream.write(content)
            if self._is_local:
                _flush(begun.path)
            finish(begun)
        except BaseException as error:
            with suppress(OSError):  # asked once: whoever writes has patience already
                self.filesystem.delete_file(begun.path)
            if isinstance(error, FileNotFoundError) and self._has_folder():
                raise OSError(f"{begun.path} was swept by another run") from error
            raise

    def unfinished(self) -> Location:
        """What a file may be called while it is written."""
        folder, _, name = self.path.rpartition("/")
        return Location(self.filesystem, f"{folder}/{_UNFINISHED}{uuid.uuid4().hex}-{name}")

    def _has_folder(self) -> bool:
        folder, _, _ = self.path.rpartition("/")
        found: fs.FileInfo = Location(self.filesystem, folder).info
        return bool(found.type == fs.FileType.Directory)

    def make_folder(self) -> None:
        """And all above it, unless they are there."""
        patiently(lambda: self.filesystem.create_dir(self.path, recursive=True))

    def remove(self) -> None:
        """A file, if it is there."""
        with suppress(FileNotFoundError):
            patiently(lambda: self.filesystem.delete_file(self.path))

    def sweep(self, names: Collection[str]) -> None:
        """Removes from a folder what was begun of files of these names and never finished."""
        for found in self.contents:
            name = _UNFINISHED_NAME.fullmatch(found)
            if name and name[1] in names:
                (self / found).remove()


def absolute(text: str) -> str:
    """The path, or the URI, from wherever it is read: other processes have other folders."""
    return text if "://" in text else str(Path(text).absolute())


def _dangling(folder: str) -> list[Path]:
    """Links that lead nowhere, which Arrow does not list."""
    return [path for path in Path(folder).iterdir() if path.is_symlink() and not path.exists()]


def _linked(begun: str, path: str) -> bool:
    """Whether there is a file of the second name now; unlike a move it replaces none."""
    try:
        os.link(begun, path)
    except FileExistsError:
        return True
    except OSError:  # there are no links in some folders
        return False
    return True


def _flush(path: str) -> None:
    """Else a machine that loses its power may keep the name and lose what is behind it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
