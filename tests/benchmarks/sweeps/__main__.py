"""How the cost of a token depends on numbers of pairs, lengths, classes, candidates and batches."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from benchmarks.arguments import common_parser, exits_with_workers, positive, set_environment, write
from benchmarks.sweeps import plots, report
from benchmarks.sweeps.catalogue import SWEEPS, Size
from benchmarks.sweeps.results import Results
from benchmarks.sweeps.session import Plan, measure
from seqloss.bundle.manifest import Precision


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes what was asked for."""
    options = _parser().parse_args(arguments)
    set_environment(options.threads)
    with exits_with_workers():
        results = measure(_plan(options))
    print(f"\n{report.terminal(results)}")
    write(options.output, _document(results))
    if options.markdown:
        folder = options.plots and os.path.relpath(options.plots, options.markdown.parent)
        options.markdown.write_text(report.markdown(results, folder))
    if options.plots:
        _write_plots(results, options.plots)


def _document(results: Results) -> dict[str, object]:
    """Every single measurement, and what is computed from them."""
    summaries = {result.sweep.name: result.summaries() for result in results.sweeps}
    return asdict(results) | {"summaries": summaries}


def _write_plots(results: Results, folder: Path) -> None:
    """One picture for each sweep that has points."""
    folder.mkdir(parents=True, exist_ok=True)
    for result in results.sweeps:
        if result.summaries():
            plots.write_sweep(folder / f"{result.sweep.name}.svg", result)


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        sweeps=tuple(name for name in SWEEPS if name in options.sweeps),
        size=Size(options.model, options.tokens, options.most_pairs),
        precisions=tuple(options.precisions),
        device=options.device,
        threads=options.threads,
        rounds=options.rounds,
        folder=options.folder,
    )


def _parser() -> argparse.ArgumentParser:
    parser = common_parser("benchmarks.sweeps", __doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument(
        "--tokens",
        type=positive,
        default=2048,
        help="of the sources and of the targets of a point; four times that for batch-tokens",
    )
    parser.add_argument(
        "--most-pairs", type=positive, default=100_000, help="where the sweep over pairs ends"
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=get_args(Precision),
        default=[],
        help="of all sweeps; without it the device's fastest, and float32 beside it in some",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="a picture of each sweep")
    return parser


if __name__ == "__main__":
    main()
