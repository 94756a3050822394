"""What a part of the benchmark found, and what was wanted of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Wanted:
    """A bound that a figure should keep."""

    side: Literal["at least", "at most"]
    bound: float

    def verdict(self, value: float) -> str:
        """`ok`, or what the figure falls short of."""
        kept = value >= self.bound if self.side == "at least" else value <= self.bound
        return "ok" if kept else f"short of {self.bound:.3g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, and what was wanted."""

    name: str
    value: float
    wanted: Wanted

    @property
    def verdict(self) -> str:
        """`ok`, or what it falls short of."""
        return self.wanted.verdict(self.value)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a part's table; None where a column does not apply."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class PartResult:
    """What a part found.

    Attributes:
        name: of the part.
        about: what was measured and how.
        columns: of its table, that of the rows' names first.
        rows: of its table.
        figures: what something was wanted of.
        samples: the single measurements behind them, by name.
    """

    name: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Row]
    figures: Sequence[Figure]
    samples: dict[str, list[float]] = field(default_factory=dict)
