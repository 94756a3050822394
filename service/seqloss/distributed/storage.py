"""Files on this machine, or in a store that Arrow knows."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from seqloss.errors import ConfigurationError

_UNFINISHED = ".tmp"


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
        return self.filesystem.get_file_info(self.path)

    @property
    def contents(self) -> dict[str, int]:
        """The files of a folder by their names, and their sizes in bytes."""
        found = self.filesystem.get_file_info(fs.FileSelector(self.path))
        return {one.base_name: one.size for one in found if one.type == fs.FileType.File}

    def all_files(self) -> Iterator[fs.FileInfo]:
        """Those of a folder and all below it."""
        for one in self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=True)):
            if one.type == fs.FileType.File:
                yield one

    def contains(self, other: Location) -> bool:
        """Whether the other is the same, or lies in it."""
        if not self.filesystem.equals(other.filesystem):
            return False
        return f"{other.path.rstrip('/')}/".startswith(f"{self.path.rstrip('/')}/")

    def read(self) -> bytes:
        """All of a file."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write(self, content: bytes) -> None:
        """A whole file, that replaces what is there; nobody ever sees a part of it."""
        unfinished = f"{self.path}.{uuid.uuid4().hex}{_UNFINISHED}"
        with self.filesystem.open_output_stream(unfinished) as stream:
            stream.write(content)
        if isinstance(self.filesystem, fs.LocalFileSystem):
            _flush(unfinished)
        self.filesystem.move(unfinished, self.path)

    def sweep(self) -> None:
        """Removes from a folder what somebody began to write and never finished."""
        for name in self.contents:
            if name.endswith(_UNFINISHED):
                self.filesystem.delete_file((self / name).path)


def absolute(text: str) -> str:
    """The path, or the URI, from wherever it is read: other processes have other folders."""
    return text if "://" in text else str(Path(text).absolute())


def _flush(path: str) -> None:
    """Else a machine that loses its power may keep the name and lose what is behind it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
