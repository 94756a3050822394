"""`seqloss-client report`: one page about the losses of a corpus."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from seqloss_client.corpus.arguments import add_input_arguments, positive
from seqloss_client.corpus.blocks import Block, Reader, Side
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus_input import CorpusInput
from seqloss_client.filtering.formula import adequacy
from seqloss_client.models import Ragged
from seqloss_client.plain_lines import LineWriter
from seqloss_client.report.counting import Density, Distribution, Extremes
from seqloss_client.report.page import Picture, Section, Table, page
from seqloss_client.score_files import aligned, mean_nlls

Losses = NDArray[np.float64]

_BLOCK_PAIRS = 2**16
_READER_PAIRS = 2000
_BARS, _CELLS = 80, 100
# What is above belongs to so few pairs that the others would be a thin column at the left.
_SHOWN_SHARE = 0.995
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(slots=True)
class Counts:
    """What is counted of the losses of one direction, or of two.

    Attributes:
        names: of the directions.
        size: how many of the best and the worst pairs are kept.
        distributions: of each direction.
        density: of both, where there are two.
        extremes: by adequacy where there are two directions, else by loss, its sign changed.
    """

    names: Sequence[str]
    size: int
    num_pairs: int = 0
    distributions: list[Distribution] = field(init=False)
    density: Density | None = field(init=False)
    extremes: Extremes = field(init=False)

    def __post_init__(self) -> None:
        self.distributions = [Distribution() for _ in self.names]
        self.density = Density() if len(self.names) == 2 else None
        self.extremes = Extremes(self.size)

    def add(self, losses: Sequence[Losses]) -> None:
        """Counts the next pairs.  `losses` has an array of the shape (N,) for each direction."""
        for distribution, column in zip(self.distributions, losses, strict=True):
            distribution.add(column)
        if self.density is None:
            self.extremes.add(self.num_pairs, -losses[0], *losses)
        else:
            self.density.add(*losses)
            self.extremes.add(self.num_pairs, adequacy(*losses), *losses)
        self.num_pairs += len(losses[0])


def texts_at(reader: Reader, places: Iterable[int], num_pairs: int) -> dict[int, tuple[str, str]]:
    """Source and target of some pairs, as the input has them.

    Raises:
        CorpusError: the input has more pairs or fewer.
    """
    wanted = sorted(places)
    found: dict[int, tuple[str, str]] = {}
    start = 0
    for raw in reader.blocks():
        within = [place - start for place in wanted if start <= place < start + raw.num_pairs]
        if within:
            found |= _texts(reader.parse(raw), start, within)
        start += raw.num_pairs
    if start != num_pairs:
        raise CorpusError(
            f"the input has {start:,} pairs, and there are losses for {num_pairs:,}: they are of "
            "another input, or of one with another header"
        )
    return found


def _texts(block: Block, start: int, within: Sequence[int]) -> dict[int, tuple[str, str]]:
    good = {int(place): index for index, place in enumerate(block.places)}
    sources, targets = (_shown_texts(side) for side in (block.sources, block.targets))
    found = {}
    for place in within:
        if place in good:
            found[start + place] = (sources[good[place]], targets[good[place]])
        else:
            found[start + place] = (f"({block.bad[place].detail})", "")
    return found


def _shown_texts(side: Side) -> list[str]:
    if isinstance(side, Ragged):
        return [" ".join(map(str, row.tolist())) for row in side.rows()]
    return side


# ---------------------------------------------------------------- what the page shows


def sections(counts: Counts, texts: dict[int, tuple[str, str]], first_line: int) -> list[Section]:
    """All of the page."""
    parts = [Section("Losses", [_summary(counts)])]
    for name, distribution in zip(counts.names, counts.distributions, strict=True):
        parts.append(Section(f"{name}: loss per token", [_histogram(name, distribution)]))
    if counts.density is not None:
        parts.append(Section(" and ".join(counts.names), [_density(counts)]))
    extremes = {"Worst pairs": counts.extremes.worst, "Best pairs": counts.extremes.best}
    for title, rows in extremes.items():
        parts.append(Section(title, [_pairs(title, counts, rows, texts, first_line)]))
    return parts


def _summary(counts: Counts) -> Table:
    headings = ["", "pairs", "without a loss", "mean", *(_quantile_name(q) for q in _QUANTILES)]
    rows = []
    for name, distribution in zip(counts.names, counts.distributions, strict=True):
        quantiles = [
            distribution.smallest,
            *map(distribution.quantile, _QUANTILES[1:-1]),
            distribution.largest,
        ]
        numbers = [distribution.mean, *quantiles]
        rows.append(
            [
                name,
                f"{counts.num_pairs:,}",
                f"{distribution.num_missing:,}",
                *(_number(number) for number in numbers),
            ]
        )
    return Table("Mean nll per token of a pair, in nats", headings, rows, texts=frozenset({0}))


def _quantile_name(share: float) -> str:
    return {0.0: "smallest", 0.5: "median", 1.0: "largest"}.get(share, f"{share:.0%}")


def _number(number: float) -> str:
    return f"{number:.3f}" if math.isfinite(number) else "none"


def _histogram(name: str, distribution: Distribution) -> Picture:
    from seqloss_client.report.pictures import histogram  # noqa: PLC0415 - an extra

    counts, edges, num_above = distribution.bars(_shown(distribution), _BARS)
    outside = f" {num_above:,} pairs are above {edges[-1]:.3g} and not shown." if num_above else ""
    return Picture(
        histogram(counts, edges, f"{name}: mean nll per token, in nats"),
        f"Histogram of {distribution.num_scored:,} pairs: half of them have a loss of up to "
        f"{_number(distribution.quantile(0.5))} nats per token, 95% of up to "
        f"{_number(distribution.quantile(0.95))}.",
        f"How many pairs have which loss ({name.lower()}).{outside}",
    )


def _shown(distribution: Distribution) -> float:
    limit = distribution.quantile(_SHOWN_SHARE)
    return limit if limit > 0 else 1.0


def _density(counts: Counts) -> Picture:
    from seqloss_client.report.pictures import density  # noqa: PLC0415 - an extra

    if counts.density is None:
        raise RuntimeError("there is no density of one direction. This is a bug.")
    limit = max(map(_shown, counts.distributions))
    cells, limit, num_outside = counts.density.cells(limit, _CELLS)
    first, second = counts.names
    outside = f" {num_outside:,} pairs are above {limit:.3g} and not shown." if num_outside else ""
    return Picture(
        density(cells, limit, (f"{first}: nats per token", f"{second}: nats per token")),
        f"Map of how many pairs have which loss {first.lower()} (to the right) and "
        f"{second.lower()} (up). Good pairs are near the lower left corner; pairs far from the "
        "diagonal are those that the two models disagree on.",
        f"The two losses of each pair; on the dashed line they are equal.{outside}",
    )


def _pairs(
    title: str,
    counts: Counts,
    rows: dict[int, tuple[float, ...]],
    texts: dict[int, tuple[str, str]],
    first_line: int,
) -> Table:
    has_adequacy = counts.density is not None
    headings = ["line", *(["adequacy"] if has_adequacy else []), *counts.names, "source", "target"]
    cells = []
    for place, (score, *losses) in rows.items():
        shown = [f"{score:.3g}"] if has_adequacy else []
        shown += [_number(loss) for loss in losses]
        cells.append([f"{first_line + place:,}", *shown, *texts[place]])
    by = "adequacy" if has_adequacy else "mean nll per token"
    columns = frozenset({len(headings) - 2, len(headings) - 1})
    return Table(f"{title} by {by}", headings, cells, texts=columns)


# ---------------------------------------------------------------- the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that `run` reads."""
    parser.description = (
        "Writes a page about the losses of a corpus: how they are distributed, how those of two "
        "directions agree, and which pairs are the best and the worst. It needs no network."
    )
    add_input_arguments(parser.add_argument_group("input"))
    group = parser.add_argument_group("report")
    group.add_argument(
        "--forward-scores",
        required=True,
        metavar="FILE",
        help="losses of targets given sources, as `seqloss-client score` wrote them",
    )
    group.add_argument("--backward-scores", metavar="FILE", help="of sources given targets")
    group.add_argument("--output", required=True, metavar="FILE", help="the page, .html")
    group.add_argument("--title", default="Losses of a corpus")
    group.add_argument(
        "--examples", type=positive, default=20, metavar="N", help="best and worst pairs each"
    )
    parser.set_defaults(pairs_per_request=_READER_PAIRS)


def run(arguments: argparse.Namespace) -> int:
    """Writes the page; the exit status is 0.

    Raises:
        CorpusError: it could not be done.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise CorpusError(
            "report needs Matplotlib: pip install 'seqloss-client[report]'"
        ) from error
    corpus = CorpusInput.of(arguments)
    files = {"Forward": arguments.forward_scores, "Backward": arguments.backward_scores}
    given = {name: path for name, path in files.items() if path}
    counts = Counts(tuple(given), arguments.examples)
    streams = {f"--{name.lower()}-scores {path}": mean_nlls(path) for name, path in given.items()}
    for block in aligned(streams, _BLOCK_PAIRS):
        counts.add(block)
    places = counts.extremes.best.keys() | counts.extremes.worst.keys()
    with closing(corpus.reader(arguments.output)) as reader:
        texts = texts_at(reader, places, counts.num_pairs)
    html = page(arguments.title, sections(counts, texts, corpus.first_line))
    with LineWriter(arguments.output) as output:
        output.write([html.encode()])
    print(f"{counts.num_pairs:,} pairs in {arguments.output}", file=sys.stderr)
    return 0
