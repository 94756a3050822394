"""What the programs of this package have in common: arguments, what they write, how they fail."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from benchmarks.machine import available_cores
from benchmarks.models import MODELS

_JSON_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY


def plain_parser(program: str, about: str | None) -> argparse.ArgumentParser:
    """One without arguments."""
    return argparse.ArgumentParser(
        prog=program, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def common_parser(program: str, about: str | None) -> argparse.ArgumentParser:
    """One that knows the model, the threads, and where results and models go."""
    parser = plain_parser(program, about)
    parser.add_argument("--model", choices=MODELS, default="marian-base")
    parser.add_argument(
        "--threads", type=positive, default=available_cores(), help="for matrix products"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="every measurement")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="the tables as a page")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="where models are kept"
    )
    return parser


@contextmanager
def exits_with_workers() -> Iterator[None]:
    """Where a process fails that was started within, this one ends like it."""
    try:
        yield
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(error.returncode)


def write(path: Path | None, document: Mapping[str, Any]) -> None:
    """Every measurement, as JSON, where it was asked for."""
    if path is not None:
        path.write_bytes(orjson.dumps(document, option=_JSON_OPTIONS))


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
