"""What an unfinished run left behind, so that the same command goes on where it ended."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import orjson

from seqloss_client.corpus.errors import CorpusError


@dataclass(slots=True)
class Progress:
    """What is safely on disk.

    Attributes:
        num_pairs: scored and bad ones.
        num_bad_pairs: the bad ones among them.
        num_cut_pairs: those of which tokens were cut.
        input_digest: of the input up to there; "" before its first block.
        output_bytes: of the unfinished output; what lies beyond is written again.
        report_bytes: likewise.
        is_whole: whether all of the input is scored, and files only have to get their names.
    """

    num_pairs: int = 0
    num_bad_pairs: int = 0
    num_cut_pairs: int = 0
    input_digest: str = ""
    output_bytes: int = 0
    report_bytes: int = 0
    is_whole: bool = False


@dataclass(slots=True)
class Journal:
    """A small file that is always whole: it is replaced, never changed.

    Attributes:
        path: of the file.
        parameters: all that changes numbers, by the name that people know it under.
        progress: what is safely on disk.
    """

    path: Path
    parameters: dict[str, Any]
    progress: Progress = field(default_factory=Progress)

    def write(self) -> None:
        """Returns once it is on disk."""
        document = {"parameters": self.parameters, "progress": asdict(self.progress)}
        new = self.path.with_name(self.path.name + ".new")
        with new.open("wb") as file:
            file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)
        sync_folder(self.path)

    def read(self) -> bool:
        """Takes over the progress of the file; whether there is one.

        Raises:
            CorpusError: it is that of a run with other parameters.
        """
        self.progress = Progress()
        try:
            document = orjson.loads(self.path.read_bytes())
            parameters = document["parameters"]
            names = {one.name for one in fields(Progress)}
            progress = Progress(**{name: document["progress"][name] for name in names})
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{self.path} is no journal of this program; delete it to begin anew"
            ) from error
        self._compare(parameters)
        self.progress = progress
        return True

    def remove(self) -> None:
        """The run is over."""
        self.path.unlink(missing_ok=True)

    def _compare(self, before: dict[str, Any]) -> None:
        now = self.parameters
        differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differing:
            listed = "".join(
                f"\n  - {name}: {_shown(before, name)} then, {_shown(now, name)} now"
                for name in differing
            )
            raise CorpusError(
                f"{self.path} is of an unfinished run that was another one:{listed}\n"
                "go on with what it had, or delete the journal to begin anew"
            )


def _shown(parameters: dict[str, Any], name: str) -> str:
    return repr(parameters[name]) if name in parameters else "nothing"


def sync_folder(path: Path) -> None:
    """Returns once the names in a file's folder are on disk."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
