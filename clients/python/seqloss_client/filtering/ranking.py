"""The order of scores by size, for more of them than fit into memory."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import duckdb
import numpy as np
from numpy.typing import NDArray

from seqloss_client.corpus.errors import CorpusError

# DuckDB wants some 100 MB for each thread that sorts; more threads than these need a larger limit.
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Cutoff:
    """The last pair that is kept: those that score more are, and of equals those before it.

    Attributes:
        score: its score.
        index: its place in the input, from 0.
    """

    score: float
    index: int

    def keeps(self, start: int, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether each of the pairs from `start` on is kept; one without a score never is."""
        indices = np.arange(start, start + len(scores))
        is_before = (scores == self.score) & (indices <= self.index)
        kept: NDArray[np.bool_] = (scores > self.score) | is_before
        return kept


NOTHING = Cutoff(score=float("inf"), index=-1)


class Ranking:
    """Takes scores in the order of the input, then tells which rank has which.

    They are kept in a DuckDB database in `folder`; DuckDB sorts them within the memory limit and
    puts what does not fit beside the database.

    Args:
        folder: an existing folder, for this ranking alone.
        memory_limit: how much memory DuckDB may use, such as `1GB`.

    Raises:
        CorpusError: DuckDB does not start; or, at the end, there was no room for it to sort in.
    """

    def __init__(self, folder: Path, memory_limit: str) -> None:
        self.num_pairs = 0
        self.num_scored = 0
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": memory_limit,
            "temp_directory": str(folder / "spilled"),
            "threads": _THREADS,
        }
        try:
            self._database = duckdb.connect(folder / "ranking.duckdb", config=config)
        except duckdb.Error as error:
            raise CorpusError(f"DuckDB does not start: {error}") from error
        self._database.execute("create table scores (index bigint, score double)")

    def __enter__(self) -> Ranking:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._database.close()
        if isinstance(error, duckdb.Error):
            raise CorpusError(f"the scores cannot be sorted: {error}") from error

    def add(self, scores: NDArray[np.float64]) -> None:
        """Takes the scores of the next pairs; NaN where a pair has none."""
        indices = np.arange(self.num_pairs, self.num_pairs + len(scores))
        self._database.register("chunk", {"index": indices, "score": scores})
        self._database.execute("insert into scores select index, score from chunk")
        self._database.unregister("chunk")
        self.num_pairs += len(scores)
        self.num_scored += int(np.count_nonzero(~np.isnan(scores)))

    def sort(self) -> None:
        """Orders what was added: the best first, and of equal scores the earlier pair."""
        # DuckDB keeps the order of rows that it inserts, and LIMIT honours it.  Some versions make
        # NULL of NaN.
        self._database.execute(
            "create table ranked as select index, score from scores where score is not null "
            "and not isnan(score) order by score desc, index"
        )

    def at(self, rank: int) -> Cutoff:
        """The pair of a rank; 0 is the best."""
        row = self._database.execute(
            "select score, index from ranked limit 1 offset ?", [rank]
        ).fetchone()
        if row is None:
            raise IndexError(f"there is no rank {rank}, {self.num_scored} pairs have a score")
        return Cutoff(*row)

    def at_least(self, score: float) -> Cutoff:
        """Keeps the pairs with this score or a better one."""
        return Cutoff(score, self.num_pairs)

    def best(self, count: int) -> Cutoff:
        """Keeps as many pairs, or all that have a score where there are fewer."""
        count = min(count, self.num_scored)
        return self.at(count - 1) if count else NOTHING

    def best_percent(self, percent: Fraction) -> Cutoff:
        """Keeps as many percent of all pairs, rounded down."""
        return self.best(int(self.num_pairs * percent / 100))

    def quantile(self, share: float) -> float:
        """The score that this share of the scored pairs has or falls below (the nearest rank)."""
        from_worst = max(1, int(np.ceil(share * self.num_scored)))
        return self.at(self.num_scored - from_worst).score

    def scores(self, start: int, stop: int) -> NDArray[np.float64]:
        """The scores of the pairs from `start` until before `stop`, in their order."""
        rows = self._database.execute(
            "select score from scores where index >= ? and index < ? order by index", [start, stop]
        ).fetchnumpy()
        return np.asarray(np.ma.filled(rows["score"], np.nan), dtype=np.float64)
