"""What the programs of this package have in common on the command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.machine import available_cores
from benchmarks.models import MODELS


def add_common(parser: argparse.ArgumentParser) -> None:
    """The model, the threads, and where results and models go."""
    parser.add_argument("--model", choices=MODELS, default="marian-base")
    parser.add_argument(
        "--threads", type=positive, default=available_cores(), help="for matrix products"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="every measurement")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="the tables as a page")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="where models are kept"
    )


def positive(text: str) -> int:
    """A number of things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def set_environment(threads: int) -> None:
    """What workers and servers inherit; Torch, MKL and CTranslate2 look at it when they load."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # As `seqloss serve` has it: threads that spin for long take cores from the others' processes.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
