"""A parallel corpus for the demo models, some of whose pairs are wrong.

`python -m seqloss.demo.corpus` writes sources and targets, a line each, to try filtering with.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seqloss.demo import phrases
from seqloss.demo.corruptions import CORRUPTIONS, corrupt


@dataclass(frozen=True, slots=True)
class Line:
    """One pair of the corpus, in plain text.

    Attributes:
        source: English.
        target: what is claimed to be its translation.
        is_right: whether it is.
    """

    source: str
    target: str
    is_right: bool


def corpus(language: str, share_wrong: float, *, seed: int) -> Iterator[Line]:
    """Draws held-out pairs of one target language for ever, and spoils a share of them."""
    generator = random.Random(seed)  # noqa: S311 - the data is pseudo-random by intent
    kinds = tuple(CORRUPTIONS)
    drawn = (one for one in phrases.pairs("held_out", seed=seed) if one.language == language)
    while True:
        phrase, wrong = next(drawn), None
        is_right = generator.random() >= share_wrong
        while not is_right and wrong is None:  # not every phrase can be spoiled in every way
            phrase = next(drawn)
            wrong = corrupt(phrase, generator.choice(kinds), generator)
        yield Line(phrase.english, wrong or phrase.target, is_right)


def main() -> None:
    """Writes the corpus, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="English, a line each")
    parser.add_argument("--target", type=Path, required=True, help="the other language")
    parser.add_argument("--language", choices=phrases.TARGET_LANGUAGES, default="de")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--wrong", type=float, default=0.3, help="the share of wrong pairs")
    arguments = parser.parse_args()
    lines = corpus(arguments.language, arguments.wrong, seed=2026)
    num_wrong = 0
    with (
        arguments.source.open("w", encoding="utf-8", newline="\n") as sources,
        arguments.target.open("w", encoding="utf-8", newline="\n") as targets,
    ):
        for _ in range(arguments.pairs):
            line = next(lines)
            num_wrong += not line.is_right
            sources.write(line.source + "\n")
            targets.write(line.target + "\n")
    print(f"{arguments.pairs} pairs, {num_wrong} of them wrong")


if __name__ == "__main__":
    main()
