"""How fast seqloss computes losses, beside transformers, CTranslate2 and what a machine can do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import plots, report
from benchmarks.arguments import common_parser, exits_with_workers, positive, set_environment, write
from benchmarks.memory import MemorySize
from benchmarks.models import MODELS
from benchmarks.results import Results
from benchmarks.session import Plan, measure
from seqloss.bundle.manifest import EngineName


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes what was asked for."""
    options = _parser().parse_args(arguments)
    set_environment(options.threads)
    with exits_with_workers():
        results = measure(_plan(options))
    print(f"\n{report.terminal(results)}")
    write(options.output, _document(results))
    if options.markdown:
        options.markdown.write_text(report.markdown(results))
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        plots.write_limits(options.plots / "limits.svg", results.summaries())


def _document(results: Results) -> dict[str, object]:
    """Every single measurement, and what is computed from them."""
    computed = {"summaries": results.summaries(), "ratios": results.ratios()}
    return asdict(results) | computed


def _plan(options: argparse.Namespace) -> Plan:
    engines: dict[EngineName, list[str]] = {
        "torch": options.precisions,
        "onnx": options.onnx_precisions,
    }
    memory = MemorySize(options.memory_vocabulary, options.memory_tokens)
    return Plan(
        model=options.model,
        scale=options.scale or MODELS[options.model].default_scale(),
        num_pairs=options.pairs,
        sweep_pairs=options.sweep_pairs,
        rounds=options.rounds,
        threads=options.threads,
        precisions={
            engine: tuple(precisions) for engine, precisions in engines.items() if precisions
        },
        variants=tuple(options.variants),
        memory=None if options.no_memory else memory,
        independence=not options.no_independence,
        folder=options.folder,
    )


def _parser() -> argparse.ArgumentParser:
    parser = common_parser("benchmarks", __doc__)
    parser.add_argument(
        "--scale",
        type=float,
        help="the logits' standard deviation; by default such that drawn tokens cost some 3 nats",
    )
    parser.add_argument("--pairs", type=positive, default=512, help="how many are scored")
    parser.add_argument(
        "--sweep-pairs", type=positive, default=256, help="how many a setting is tried on"
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--precisions", nargs="*", default=["float32", "bfloat16"], help="of Torch's graphs"
    )
    parser.add_argument(
        "--onnx-precisions", nargs="*", default=["float32", "int8"], help="of ONNX graphs"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="names as in the tables, with * for anything",
    )
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="a picture of all variants beside the limit"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the memory benchmark out")
    parser.add_argument(
        "--no-independence", action="store_true", help="leave out the pairs in other batches"
    )
    parser.add_argument("--memory-vocabulary", type=positive, default=MemorySize().vocabulary)
    parser.add_argument("--memory-tokens", type=positive, default=MemorySize().target_tokens)
    return parser


if __name__ == "__main__":
    main()
