"""Measures seqloss on one NVIDIA GPU, beside transformers and what the GPU can do at all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.arguments import exits_with_workers, plain_parser, positive, set_environment, write
from benchmarks.gpu import report
from benchmarks.gpu.session import Plan, measure
from benchmarks.machine import available_cores
from benchmarks.models import MODELS
from benchmarks.progress import say

_RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes JSON and Markdown."""
    options = _parser().parse_args(arguments)
    if not options.dry_run_cpu and not torch.cuda.is_available():
        sys.exit(
            f"there is no NVIDIA GPU that Torch {torch.__version__} finds; --dry-run-cpu tries the "
            "program out without one"
        )
    set_environment(options.threads)
    plan = _plan(options)
    with exits_with_workers():
        results = measure(_tiny(plan) if options.dry_run_cpu else plan)
    print(f"\n{report.terminal(results)}")
    options.results.mkdir(parents=True, exist_ok=True)
    name = "gpu-dry-run" if options.dry_run_cpu else "gpu"
    write(options.results / f"{name}.json", asdict(results))
    (options.results / f"{name}.md").write_text(report.markdown(results))
    say(f"written to {options.results / name}.json and .md")


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        models=tuple(options.models),
        device=options.device,
        threads=options.threads,
        rounds=options.rounds,
        num_pairs=options.pairs,
        batch_tokens=tuple(options.batch_tokens),
        transformers_tokens=tuple(options.transformers_tokens),
        compiles=not options.no_compile,
        head_tokens=options.head_tokens,
        square=8192,
        num_requests=options.requests,
        folder=options.folder,
    )


def _tiny(plan: Plan) -> Plan:
    """The whole program in seconds; its figures say nothing."""
    return replace(
        plan,
        models=("tiny",),
        device="cpu",
        rounds=1,
        num_pairs=20,
        batch_tokens=(256, 1024),
        transformers_tokens=(512,),
        compiles=False,
        head_tokens=64,
        square=64,
        num_requests=3,
    )


def _parser() -> argparse.ArgumentParser:
    parser = plain_parser("benchmarks.gpu", __doc__)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["marian-base", "nllb-600m", "nllb-3.3b"]
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--threads", type=positive, default=available_cores(), help="of the CPU")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--pairs", type=positive, default=8192, help="that are scored in bulk")
    parser.add_argument(
        "--batch-tokens",
        nargs="+",
        type=positive,
        default=[2048, 4096, 8192, 16384, 32768, 65536],
        help="of seqloss's batches, both sides together",
    )
    parser.add_argument(
        "--transformers-tokens",
        nargs="+",
        type=positive,
        default=[2048, 8192],
        help="of transformers' batches, the targets alone",
    )
    parser.add_argument("--no-compile", action="store_true", help="transformers only as it is")
    parser.add_argument("--head-tokens", type=positive, default=8192)
    parser.add_argument("--requests", type=positive, default=300, help="of single pairs, by HTTP")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="keeps the models")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="a folder for JSON and page")
    parser.add_argument(
        "--dry-run-cpu", action="store_true", help="a tiny model on the CPU, to try the program out"
    )
    return parser


if __name__ == "__main__":
    main()
