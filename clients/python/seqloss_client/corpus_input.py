"""A corpus as the arguments of a command name it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from seqloss_client.corpus.arguments import open_reader
from seqloss_client.corpus.blocks import Reader
from seqloss_client.corpus.errors import CorpusError


@dataclass(frozen=True, slots=True)
class CorpusInput:
    """A corpus on disk, which may be read several times.

    Attributes:
        paths: of the file with columns, or of sources and targets.
        arguments: the command's; `pairs_per_request` is the size of a block.
    """

    paths: tuple[str, ...]
    arguments: argparse.Namespace

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> CorpusInput:
        """Raises CorpusError where the arguments name no corpus, or a pipe."""
        sides = (arguments.source, arguments.target)
        if bool(arguments.input) == any(sides) or (any(sides) and not all(sides)):
            raise CorpusError("give --source and --target, or --input")
        paths = (arguments.input,) if arguments.input else sides
        if "-" in paths:
            raise CorpusError("the corpus is read more than once: it must be a file, not a pipe")
        return cls(paths, arguments)

    @property
    def is_parquet(self) -> bool:
        """Whether its pairs are rows, and no lines."""
        chosen = self.arguments.input_format
        return chosen == "parquet" or (
            chosen is None and self.paths[0].lower().endswith(".parquet")
        )

    @property
    def has_header(self) -> bool:
        """Whether the first line is no pair."""
        return bool(self.arguments.header)

    @property
    def first_line(self) -> int:
        """The number of the first pair's line."""
        return 2 if self.has_header else 1

    def reader(self, output: str = "-") -> Reader:
        """Opens it, from its beginning.

        Args:
            output: what will be written, and must not be the corpus itself.
        """
        return open_reader(argparse.Namespace(**vars(self.arguments) | {"output": output}))
