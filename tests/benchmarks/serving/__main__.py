"""How the service behaves: its own cost, its padding, what it gives to whom, and how it starts."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import get_args

from benchmarks.arguments import common_parser, exits_with_workers, positive, set_environment, write
from benchmarks.machine import machine, origin
from benchmarks.pairs import sentence_lengths
from benchmarks.serving import encode_once, mixed, overhead, padding, report, stages, start
from benchmarks.serving.figures import PartResult
from benchmarks.serving.report import Results
from benchmarks.serving.workbench import Plan, Workbench
from seqloss.bundle.manifest import Precision

PARTS: dict[str, Callable[[Workbench], PartResult]] = {
    "stages": stages.measure,
    "padding": padding.measure,
    "encode_once": encode_once.measure,
    "overhead": overhead.measure,
    "mixed": mixed.measure,
    "start": start.measure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes what was asked for."""
    options = _parser().parse_args(arguments)
    set_environment(options.threads)
    # Clients run here: what was loaded shall not be walked over while they wait for answers.
    gc.collect()
    gc.freeze()
    with exits_with_workers():
        results = _measured(_plan(options))
    print(f"\n{report.terminal(results)}")
    write(options.output, _document(results))
    if options.markdown:
        options.markdown.write_text(report.markdown(results))


def _measured(plan: Plan) -> Results:
    started_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    bench = Workbench(plan)
    return Results(
        started_at=started_at,
        origin=origin("bench-serving"),
        machine=machine(),
        plan=plan,
        lengths_from=sentence_lengths(1)[0],
        parts=[PARTS[name](bench) for name in plan.parts],
    )


def _document(results: Results) -> dict[str, object]:
    """Every single measurement, and the verdicts."""
    document = asdict(results)
    document["plan"]["folder"] = str(results.plan.folder)
    document["verdicts"] = {
        figure.name: figure.verdict for part in results.parts for figure in part.figures
    }
    return document


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        parts=tuple(name for name in PARTS if name in options.parts),
        model=options.model,
        precision=options.precision,
        device=options.device,
        threads=options.threads,
        rounds=options.rounds,
        seconds=options.seconds,
        repetitions=options.repetitions,
        waiting_pairs=options.waiting_pairs,
        pairs=options.pairs,
        folder=options.folder,
    )


def _parser() -> argparse.ArgumentParser:
    parser = common_parser("benchmarks.serving", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--precision", choices=get_args(Precision), default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--rounds", type=positive, default=5, help="of those that compare in turn")
    parser.add_argument(
        "--seconds",
        type=_positive_seconds,
        default=40.0,
        help="of each load in padding and mixed, after a quarter of that to warm up",
    )
    parser.add_argument("--repetitions", type=positive, default=50, help="of each stage")
    parser.add_argument(
        "--waiting-pairs", type=positive, default=100_000, help="that batches are formed of"
    )
    parser.add_argument(
        "--pairs", type=positive, default=1024, help="in overhead; the demo gets 16 times as many"
    )
    return parser


def _positive_seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is no time")
    return value


if __name__ == "__main__":
    main()
