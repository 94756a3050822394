"""What a report shows of any number of losses, counted as they pass by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]

# Nats per token.  A uniform choice among a million classes is 13.8 nats, so all but broken models
# stay below the limits; the last bin takes what does not.
_BIN_WIDTH, _NUM_BINS = 0.001, 100_000
_CELL_WIDTH, _NUM_CELLS = 0.01, 2000


def _empty_bins() -> NDArray[np.int64]:
    return np.zeros(_NUM_BINS, dtype=np.int64)


def _empty_cells() -> NDArray[np.int64]:
    return np.zeros((_NUM_CELLS, _NUM_CELLS), dtype=np.int64)


@dataclass(slots=True)
class Distribution:
    """How often each loss occurs, to a thousandth of a nat.

    Attributes:
        counts: pairs with a loss of i to i + 1 thousandths; the last entry has all above, too.
        num_missing: pairs without a loss.
        total: the sum of the losses.
        smallest, largest: of the losses.
    """

    counts: NDArray[np.int64] = field(default_factory=_empty_bins)
    num_missing: int = 0
    total: float = 0.0
    smallest: float = math.inf
    largest: float = -math.inf

    def add(self, losses: Losses) -> None:
        """Counts more losses; NaN is a pair without one."""
        scored = losses[~np.isnan(losses)]
        self.num_missing += len(losses) - len(scored)
        if not len(scored):
            return
        self.counts += np.bincount(_bins(scored, _BIN_WIDTH, _NUM_BINS), minlength=_NUM_BINS)
        self.total += float(scored.sum())
        self.smallest = min(self.smallest, float(scored.min()))
        self.largest = max(self.largest, float(scored.max()))

    @property
    def num_scored(self) -> int:
        """Pairs with a loss."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Of the losses; NaN where there is none."""
        return self.total / self.num_scored if self.num_scored else math.nan

    def quantile(self, share: float) -> float:
        """What this share of the losses stays below, to a thousandth; NaN where there is none."""
        if not self.num_scored:
            return math.nan
        rank = max(1, math.ceil(share * self.num_scored))
        place = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min((place + 1) * _BIN_WIDTH, self.largest)

    def bars(self, limit: float, num_bars: int) -> tuple[NDArray[np.int64], Losses, int]:
        """Counts for a picture.

        Args:
            limit: where the picture ends; bars are as wide as whole thousandths allow.
            num_bars: how many there are at most.

        Returns:
            The counts of the bars.  Shape: (bars,).
            Their edges.  Shape: (bars + 1,).
            How many losses lie above the last edge.
        """
        bins_per_bar = max(1, math.ceil(limit / _BIN_WIDTH / num_bars))
        num_bars = min(num_bars, math.ceil(limit / _BIN_WIDTH / bins_per_bar))
        shown = self.counts[: bins_per_bar * num_bars]
        counts: NDArray[np.int64] = np.add.reduceat(shown, np.arange(0, len(shown), bins_per_bar))
        edges = np.arange(len(counts) + 1, dtype=np.float64) * (bins_per_bar * _BIN_WIDTH)
        return counts, edges, self.num_scored - int(counts.sum())


@dataclass(slots=True)
class Density:
    """How often two losses occur together, to a hundredth of a nat.

    Attributes:
        counts: pairs whose first loss is in cell i and whose second one is in cell j.
    """

    counts: NDArray[np.int64] = field(default_factory=_empty_cells)

    def add(self, first: Losses, second: Losses) -> None:
        """Counts more pairs; those without one of the losses are left out."""
        both = ~(np.isnan(first) | np.isnan(second))
        rows = _bins(first[both], _CELL_WIDTH, _NUM_CELLS)
        columns = _bins(second[both], _CELL_WIDTH, _NUM_CELLS)
        np.add.at(self.counts, (rows, columns), 1)

    def cells(self, limit: float, num_cells: int) -> tuple[NDArray[np.int64], float, int]:
        """Counts for a picture.

        Returns:
            The counts.  Shape: (cells, cells).
            Where the picture ends, on both axes.
            How many pairs lie outside.
        """
        per_cell = max(1, math.ceil(limit / _CELL_WIDTH / num_cells))
        needed = math.ceil(limit / _CELL_WIDTH / per_cell)
        num_cells = min(num_cells, needed, _NUM_CELLS // per_cell)
        size = num_cells * per_cell
        shown = self.counts[:size, :size].reshape(num_cells, per_cell, num_cells, per_cell)
        counts = shown.sum(axis=(1, 3))
        return counts, size * _CELL_WIDTH, int(self.counts.sum() - counts.sum())


def _bins(losses: Losses, width: float, num_bins: int) -> NDArray[np.int64]:
    """The bin of each loss, the last one for those above all bins."""
    return np.minimum(losses / width, num_bins - 1).astype(np.int64)


@dataclass(slots=True)
class Extremes:
    """The pairs with the best and the worst scores; of equal ones, the earlier.

    Attributes:
        size: how many of each are kept.
        best, worst: by the pair's place, its score and its losses; in order.
    """

    size: int
    best: dict[int, tuple[float, ...]] = field(default_factory=dict)
    worst: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def add(self, start: int, scores: Losses, *losses: Losses) -> None:
        """Takes the pairs from `start` on.

        Args:
            start: the first one's place.
            scores: higher ones are better; NaN is left out.  Shape: (N,).
            losses: what to keep beside.  Shape: (N,) each.
        """
        self.best = self._top(-1, self.best, start, scores, losses)
        self.worst = self._top(1, self.worst, start, scores, losses)

    def _top(
        self,
        sign: int,
        kept: dict[int, tuple[float, ...]],
        start: int,
        scores: Losses,
        losses: tuple[Losses, ...],
    ) -> dict[int, tuple[float, ...]]:
        first = np.argsort(sign * scores, kind="stable")[: self.size]  # NaN comes last
        first = first[~np.isnan(scores[first])]
        rows = np.stack([scores[first], *(column[first] for column in losses)], axis=1)
        places = (start + first).tolist()
        candidates = kept | dict(zip(places, map(tuple, rows.tolist()), strict=True))
        ranked = sorted(candidates.items(), key=lambda item: (sign * item[1][0], item[0]))
        return dict(ranked[: self.size])
