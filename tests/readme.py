"""The README, taken apart: what its sections show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = ("Filter a corpus", "Score candidates", "Watch a dashboard")
"""Sections for people with a task, each of which is tried as a whole."""


@dataclass(frozen=True)
class Section:
    """What stands between a heading and the next one."""

    title: str
    text: str

    def blocks(self, language: str) -> list[str]:
        """The code blocks of a language."""
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE)

    @property
    def commands(self) -> list[str]:
        """The lines of all blocks that are for a shell."""
        joined = "".join(self.blocks("sh")).replace("\\\n", " ")
        return [line for line in joined.splitlines() if line]

    def only_block(self, language: str) -> str:
        """The one block of a language."""
        (block,) = self.blocks(language)
        return block

    def commands_of(self, program: str) -> list[str]:
        """Those that run a program; there are some."""
        found = [command for command in self.commands if f"{program} " in f" {command} "]
        assert found, f"{self.title} shows no {program}"
        return [command[command.index(program) :] for command in found]


def section(title: str) -> Section:
    """One of the README's."""
    _, _, rest = README.partition(f"\n## {title}\n")
    assert rest, f"the README has no section {title!r}"
    return Section(title, rest.partition("\n## ")[0])


def others() -> Section:
    """All that is no guide."""
    text = README
    for title in GUIDES:
        text = text.replace(section(title).text, "")
    return Section("README", text)
