"""Files are there whole or not at all, and who fails for a moment is asked again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from seqloss.distributed import storage
from seqloss.distributed.storage import Location, patiently
from seqloss.errors import ConfigurationError


def test_a_file_is_there_whole_and_nothing_else_is(tmp_path: Path) -> None:
    for content in (b"one", b"another"):
        (Location.of(str(tmp_path)) / "a.parquet").write(content)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
            "a.parquet": content
        }


def test_what_was_never_finished_is_no_data_to_those_who_read_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = Location.of(str(tmp_path)) / "a.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"row": [1]}), sink)
    content = sink.getvalue().to_pybytes()
    location.write(content)
    Path(location.unfinished().path).write_bytes(content[:9])  # and here its writer is killed
    assert len(list(tmp_path.iterdir())) == 2
    assert pq.read_table(tmp_path).to_pydict() == {"row": [1]}


def test_only_what_was_begun_of_ours_is_swept(tmp_path: Path) -> None:
    folder = Location.of(str(tmp_path))
    begun = [(folder / name).unfinished() for name in ("a.parquet", "b.parquet")]
    for one in begun:
        Path(one.path).touch()
    others = ["a.parquet.tmp", "_unfinished-a.parquet", "notes.tmp", "a.parquet"]
    for name in others:
        (tmp_path / name).touch()
    folder.sweep(["a.parquet"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, Path(begun[1].path).name}


@pytest.mark.parametrize("write", [Location.write, Location.write_first])
@pytest.mark.parametrize("before", ["_flush", "move"])
def test_what_another_run_sweeps_is_written_again(
    before: str,
    write: Callable[[Location, bytes], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As soon as the file has a name, or when all of it is there."""
    monkeypatch.setattr(storage, "_PAUSES_SECONDS", (0.0,))
    flush, num_swept = storage._flush, 0

    def sweeping(path: str) -> None:
        for step in (flush, sweep) if before == "move" else (sweep, flush):
            step(path)

    def sweep(_: str) -> None:
        nonlocal num_swept
        if not num_swept:
            num_swept += 1
            Location.of(str(tmp_path)).sweep(["a.parquet"])

    monkeypatch.setattr(storage, "_flush", sweeping)
    write(Location.of(str(tmp_path)) / "a.parquet", b"scores")
    assert num_swept == 1
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"scores"]


def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise OSError("no space is left")

    monkeypatch.setattr(storage, "_PAUSES_SECONDS", (0.0,))
    monkeypatch.setattr(storage, "_flush", fail)
    with pytest.raises(OSError, match="no space"):
        (Location.of(str(tmp_path)) / "a.parquet").write(b"scores")
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_gone_is_asked_for_no_longer_than_patience_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        """Says so, whatever is asked."""

        def __getattr__(self, _: str) -> Callable[..., None]:
            def fail(*_: object) -> None:
                raise OSError("the store is gone")

            return fail

    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    for write in (Location.write, Location.write_first):
        pauses.clear()
        with pytest.raises(OSError, match="is gone"):
            write(Location(cast("fs.FileSystem", Gone()), "bucket/part"), b"scores")
        assert pauses == [*storage._PAUSES_SECONDS]


def test_a_folder_that_is_not_there_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        (Location.of(str(tmp_path / "gone")) / "a.parquet").write(b"scores")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jsonl")).touch()
    with pytest.raises(ConfigurationError, match=r"xff.* is not UTF-8; rename it"):
        list(Location.of(str(tmp_path)).all_files())


def test_of_many_who_write_a_file_first_one_does(tmp_path: Path) -> None:
    location = Location.of(str(tmp_path)) / "plan"
    barrier = threading.Barrier(8)

    def write(content: bytes) -> None:
        barrier.wait()
        location.write_first(content)
        seen.append(location.read())

    seen: list[bytes] = []
    threads = [threading.Thread(target=write, args=(b"%d" % number * 1000,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_without_links_does_without(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError("there are no links here")

    monkeypatch.setattr(os, "link", link)
    if is_there:
        (tmp_path / "plan").write_bytes(b"the first")
    (Location.of(str(tmp_path)) / "plan").write_first(b"the second")
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
    assert (tmp_path / "plan").read_bytes() == (b"the first" if is_there else b"the second")


@pytest.mark.parametrize(("num_failures", "is_enough"), [(0, True), (2, True), (3, False)])
def test_a_store_is_asked_three_times(
    num_failures: int, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage, "_PAUSES_SECONDS", (1.0, 4.0))
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    left = [OSError("busy")] * num_failures

    def ask() -> str:
        if left:
            raise left.pop()
        return "here"

    if is_enough:
        assert patiently(ask) == "here"
    else:
        with pytest.raises(OSError, match="busy"):
            patiently(ask)
    assert pauses == [1.0, 4.0][:num_failures]


def test_an_answer_is_not_asked_for_again() -> None:
    num_asked = 0

    def ask() -> None:
        nonlocal num_asked
        num_asked += 1
        raise FileNotFoundError("there is none")

    with pytest.raises(FileNotFoundError):
        patiently(ask)
    assert num_asked == 1


@pytest.mark.parametrize(
    ("folder", "other", "is_in_it"),
    [
        ("in", "in", True),
        ("in", "in/scores", True),
        ("in", "inside", False),
        ("in", "out", False),
        ("in", "out/../in/scores", True),
        ("in", "link/scores", True),
        ("link", "in/scores", True),
        ("in", "in/../out", False),
    ],
)
def test_what_lies_in_a_folder_does_so_by_whatever_name(
    folder: str, other: str, is_in_it: bool, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("in")
    outer, inner = (Location.of(f"{tmp_path}/{name}") for name in (folder, other))
    assert outer.contains(inner) == is_in_it
    assert Location.of(f"file://{tmp_path}/{folder}").contains(inner) == is_in_it


def test_folders_of_two_stores_contain_nothing_of_each_other(tmp_path: Path) -> None:
    here = Location.of(str(tmp_path))
    there = Location(fs.SubTreeFileSystem("/", fs.LocalFileSystem()), str(tmp_path / "a"))
    assert not here.contains(there)
