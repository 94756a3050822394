"""A corpus of short pairs through `seqloss-client score`, beside the engine alone.

The engine runs in a process of its own, on batches that were made beforehand: sorted by length,
filled up to the padded tokens that the server's batches have. The command reads the same pairs, in
their given order, from a TSV of token ids and from one of text, and writes a number for each; the
whole of its process is timed, from its start to its end. All run in turn; ratios are of the same
round, and their median counts. CPU is that of the command's process alone, over the time it took;
the service is a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from subprocess import PIPE, CalledProcessError, Popen
from typing import get_args

from tokenizers import Tokenizer

from benchmarks import prepare
from benchmarks.arguments import (
    exits_with_workers,
    plain_parser,
    positive,
    set_environment,
    write,
)
from benchmarks.machine import available_cores, machine, origin
from benchmarks.pairs import SEED, Pairs
from benchmarks.processes import Worker
from benchmarks.progress import say
from benchmarks.report import Table, number, platform_facts
from benchmarks.serving.figures import Figure, Wanted
from benchmarks.serving.overhead import DirectTask
from benchmarks.serving.workbench import Bundled
from seqloss.bundle.manifest import EngineName
from seqloss.demo import CHECKPOINT
from seqloss.demo.phrases import pairs as demo_pairs

_CLIENT = Path(__file__).parents[2] / "clients" / "python"
# The peak can only be read while the process lives.
_PROGRAM = """\
import os, sys
from seqloss_client.cli import main
from benchmarks.resources import peak_resident_bytes
status = main(sys.argv[1:])
print(peak_resident_bytes(os.getpid()))
sys.exit(status)
"""
_WARM_UP_PAIRS = 5000
_ARGUMENTS = {"ids": ["--ids"], "text": []}
# What a run leaves, and the next one would refuse to replace.
_LEFT = ("", ".partial", ".journal", ".errors.jsonl")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the command."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """The same pairs as ids in memory, and as files that the command reads."""

    pairs: Pairs
    files: dict[str, Path]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes what was asked for."""
    options = _parser().parse_args(arguments)
    set_environment(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    bundle = prepare.export_bundle(CHECKPOINT, ["float32"], options.folder, options.engine)
    bundled = Bundled("demo", bundle, "float32", "cpu", options.threads)
    corpus = _corpus(options.pairs, options.folder)
    # The engine's pairs and their batches are not walked over while the command runs.
    gc.collect()
    gc.freeze()
    with exits_with_workers():
        engine, runs = _rounds(bundled, corpus, options)
    print(f"\n{_report(options, engine, runs)}")
    document = {
        "origin": asdict(origin("bench-corpus")),
        "machine": asdict(machine()),
        "pairs": options.pairs,
        "engine": options.engine,
        "threads": options.threads,
        "engine_seconds": engine,
        "runs": {kind: [asdict(run) for run in of_kind] for kind, of_kind in runs.items()},
    }
    write(options.output, document)


def _corpus(num_pairs: int, folder: Path) -> Corpus:
    """Phrases of the demo's recipe, none of which its model was trained on."""
    say(f"making {num_pairs:,} pairs")
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    phrases = list(islice(demo_pairs("held_out", seed=SEED), num_pairs))
    sources = [row.ids for row in tokenizer.encode_batch([one.source for one in phrases])]
    targets = [row.ids for row in tokenizer.encode_batch([one.target for one in phrases])]
    lines = {
        "ids": (
            f"{' '.join(map(str, source))}\t{' '.join(map(str, target))}\n"
            for source, target in zip(sources, targets, strict=True)
        ),
        "text": (f"{one.source}\t{one.target}\n" for one in phrases),
    }
    files = {kind: folder / f"pairs-{num_pairs}-{kind}.tsv" for kind in lines}
    for kind, path in files.items():
        path.write_text("".join(lines[kind]), encoding="utf-8")
    return Corpus(Pairs(sources, targets), files)


def _rounds(
    bundled: Bundled, corpus: Corpus, options: argparse.Namespace
) -> tuple[list[float], dict[str, list[Run]]]:
    """Seconds of the engine alone, and runs of the command, one of each per round."""
    engine: list[float] = []
    runs: dict[str, list[Run]] = {kind: [] for kind in corpus.files}
    with (
        bundled.serve() as served,
        Worker(partial(DirectTask, bundled, corpus.pairs)) as worker,
    ):
        say("warming up")
        worker.warm_up()
        for kind, path in _corpus(_WARM_UP_PAIRS, options.folder).files.items():
            _run(served.address, kind, path, options)
        for number_of_round in range(options.rounds):
            say(f"round {number_of_round + 1} of {options.rounds}")
            engine.append(worker.run())
            for kind, path in corpus.files.items():
                runs[kind].append(_run(served.address, kind, path, options))
    return engine, runs


def _run(address: str, kind: str, path: Path, options: argparse.Namespace) -> Run:
    output = path.with_suffix(".scores")
    for suffix in _LEFT:
        output.with_name(output.name + suffix).unlink(missing_ok=True)
    command = [sys.executable, "-c", _PROGRAM, "score", "--url", address, "--input", str(path)]
    command += ["--output", str(output), "--quiet", *_ARGUMENTS[kind]]
    command += ["--pairs-per-request", str(options.pairs_per_request)]
    folders = [str(_CLIENT), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    started = time.perf_counter()
    with Popen(command, env=environment, stdout=PIPE) as process:
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        printed = process.stdout.read() if process.stdout else b""
    if process.returncode:
        raise CalledProcessError(process.returncode, command)
    num_scores, num_pairs = (one.read_bytes().count(b"\n") for one in (output, path))
    if num_scores != num_pairs:
        raise RuntimeError(f"{num_scores} scores of {num_pairs} pairs. This is a bug.")
    return Run(seconds, usage.ru_utime + usage.ru_stime, int(printed))


def _report(options: argparse.Namespace, engine: list[float], runs: dict[str, list[Run]]) -> str:
    num_pairs = options.pairs
    rows = [["engine", number(median(engine)), f"{num_pairs / median(engine):,.0f}", *[""] * 4]]
    figures: list[Figure] = []
    for kind, of_kind in runs.items():
        seconds = median(run.seconds for run in of_kind)
        ratio = median(alone / run.seconds for alone, run in zip(engine, of_kind, strict=True))
        cpu = median(run.cpu_seconds / run.seconds for run in of_kind)
        cpu_micros = median(run.cpu_seconds for run in of_kind) / num_pairs * 1e6
        peak = max(run.peak_bytes for run in of_kind) / 2**20
        rows.append(
            [
                f"score, {kind}",
                number(seconds),
                f"{num_pairs / seconds:,.0f}",
                f"{ratio:.3f}",
                f"{cpu:.1%}",
                f"{cpu_micros:.1f}",
                f"{peak:.0f}",
            ]
        )
        figures += [
            Figure(f"score over engine, {kind}", ratio, Wanted("at least", 0.85)),
            Figure(f"peak of the command, {kind}, MiB", peak, Wanted("at most", 300.0)),
        ]
    columns = ("", "seconds", "pairs/s", "over engine", "CPU", "CPU µs per pair", "peak MiB")
    verdicts = [[one.name, number(one.value), one.verdict] for one in figures]
    facts = [
        *platform_facts(machine(), origin("bench-corpus")),
        (
            f"{num_pairs:,} pairs of the demo's recipe; engine: {options.engine}, threads: "
            f"{options.threads}, rounds: {options.rounds}, pairs per request: "
            f"{options.pairs_per_request}"
        ),
    ]
    return "\n\n".join(
        [
            "\n".join(facts),
            Table(columns, rows).text(),
            Table(("figure", "value", "verdict"), verdicts).text(),
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = plain_parser("benchmarks.corpus", __doc__)
    parser.add_argument("--pairs", type=positive, default=200_000)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--pairs-per-request", type=positive, default=8000)
    parser.add_argument(
        "--threads", type=positive, default=available_cores(), help="for matrix products"
    )
    parser.add_argument("--engine", choices=get_args(EngineName), default="torch")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="every measurement")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench/corpus"), help="where files are kept"
    )
    return parser


if __name__ == "__main__":
    main()
