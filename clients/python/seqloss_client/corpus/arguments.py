"""The command line of `seqloss-client score`, and what of it fits together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from seqloss_client import __version__
from seqloss_client.corpus.blocks import Columns, Reader
from seqloss_client.corpus.compression import compression_of, without_compression
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus.formats import OutputFormat, ScoreName
from seqloss_client.corpus.output import is_pipe
from seqloss_client.corpus.readers import InputFormat, ParallelReader, open_columns
from seqloss_client.models import Smoothing

_OUTPUT_FORMATS: dict[str, OutputFormat] = {
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `seqloss-client score`."""
    add_input_arguments(parser.add_argument_group("input", "any FILE may be -, a pipe"))
    _add_output(parser.add_argument_group("output"))
    _add_scoring(parser.add_argument_group("scoring"))
    _add_service(parser.add_argument_group("service"))


def add_input_arguments(group: argparse._ArgumentGroup) -> None:
    """Those that say what the corpus is."""
    group.add_argument("--source", metavar="FILE", help="sources, one a line")
    group.add_argument("--target", metavar="FILE", help="targets, one a line, as many")
    group.add_argument(
        "--input",
        metavar="FILE",
        help="in place of both: a file with columns. Files that end with .gz, .bz2, .xz or .zst "
        "are decompressed",
    )
    group.add_argument(
        "--input-format",
        choices=get_args(InputFormat),
        help="of --input (default: as its name ends). A row of a CSV is one line",
    )
    group.add_argument(
        "--source-column",
        metavar="NAME",
        help="its name, or in TSV and CSV its number from 1 (default: source, or 1 without header)",
    )
    group.add_argument("--target-column", metavar="NAME", help="(default: target, or 2)")
    group.add_argument(
        "--header", action="store_true", help="the first line of a TSV or CSV names its columns"
    )
    group.add_argument(
        "--ids",
        action="store_true",
        help="token ids and no text: integers with blanks between them, JSON lists, or lists in "
        "JSONL and Parquet",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="compressed as its name ends (default: -, the standard output). An unfinished run "
        "leaves FILE.partial and FILE.journal, and the same command goes on from there",
    )
    group.add_argument(
        "--format",
        choices=get_args(OutputFormat),
        help="plain: a number a line; marian: as marian-scorer writes; tsv, jsonl and parquet: "
        "nll, loss, mean_loss, perplexity and num_tokens (default: as FILE ends, or plain). A bad "
        "pair is nan or null",
    )
    group.add_argument(
        "--score",
        choices=get_args(ScoreName),
        help="the number of plain: mean_loss, the loss per token (default), loss or nll, the sums "
        "over tokens, or perplexity",
    )
    group.add_argument(
        "--normalize", action="store_true", help="marian: divide by the number of tokens"
    )
    group.add_argument(
        "--word-scores", action="store_true", help="marian: a log-probability for every token too"
    )
    group.add_argument(
        "--report",
        metavar="FILE",
        help="says of every bad pair where it is and why, as JSONL (default: OUTPUT.errors.jsonl, "
        "only there if there are any; the standard error for -)",
    )
    group.add_argument("--force", action="store_true", help="replace a finished output")
    group.add_argument(
        "--strict", action="store_true", help="exit with status 3 where any pair is bad"
    )
    group.add_argument("--quiet", action="store_true", help="no progress and no summary")


def _add_scoring(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--source-language", metavar="NAME", help="where the model is told it")
    group.add_argument("--target-language", metavar="NAME", help="where the model is told it")
    group.add_argument("--label-smoothing", type=float, default=0.0, metavar="SHARE")
    group.add_argument("--smoothing", choices=get_args(Smoothing), default="uniform")
    group.add_argument(
        "--truncation",
        action="store_true",
        help="cut pairs that are too long, and report them, in place of calling them bad",
    )


def _add_service(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default="http://localhost:8000", help="(default: %(default)s)")
    group.add_argument("--model", help="needed only where several are served")
    group.add_argument(
        "--pairs-per-request",
        type=positive,
        default=8000,
        metavar="N",
        help="or fewer, of which one side has 2 MiB; more is faster up to a point. It changes the "
        "last bits of the numbers (default: %(default)s)",
    )
    group.add_argument(
        "--max-requests",
        type=positive,
        default=4,
        metavar="N",
        help="under way at once, as far as the service takes them (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="for each reply (default: %(default)s)",
    )
    group.add_argument(
        "--retry-for",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="that the service may be away (default: %(default)s)",
    )
    group.add_argument(
        "--commit-seconds",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between writes to disk that a later run can go on from (default: %(default)s)",
    )


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


# ---------------------------------------------------------------- what they mean


def output_format_of(arguments: argparse.Namespace) -> OutputFormat:
    """As asked for, or as the output's name ends; options of other formats are refused."""
    output: str = arguments.output
    by_name = _OUTPUT_FORMATS.get(without_compression(output), "plain")
    chosen = cast("OutputFormat", arguments.format or by_name)
    if arguments.score and chosen != "plain":
        raise CorpusError(f"--score chooses the number of --format plain; {chosen} has its own")
    for name, is_given in (
        ("--normalize", arguments.normalize),
        ("--word-scores", arguments.word_scores),
    ):
        if is_given and chosen != "marian":
            raise CorpusError(f"{name} goes with --format marian, and the format is {chosen}")
    if chosen == "parquet" and is_pipe(output):
        raise CorpusError("Parquet cannot be written to a pipe; name a file with --output")
    if chosen == "parquet" and compression_of(output):
        raise CorpusError(f"Parquet is compressed inside; drop the end of {output}")
    return chosen


def open_reader(arguments: argparse.Namespace) -> Reader:
    """Opens the input, once it is clear which."""
    paths = [path for path in (arguments.source, arguments.target, arguments.input) if path]
    _check_output(arguments.output, paths)
    if arguments.input is not None:
        if len(paths) > 1:
            raise CorpusError("give --source and --target, or --input, and not both")
        return _open_columns(arguments)
    if len(paths) != 2:
        raise CorpusError("give --source and --target, or --input")
    if arguments.source == arguments.target == "-":
        raise CorpusError("there is only one standard input: name a file for one side")
    for name in ("input_format", "source_column", "target_column", "header"):
        if getattr(arguments, name):
            raise CorpusError(f"--{name.replace('_', '-')} goes with --input")
    return ParallelReader(
        arguments.source, arguments.target, arguments.pairs_per_request, arguments.ids
    )


def _open_columns(arguments: argparse.Namespace) -> Reader:
    path: str = arguments.input
    chosen: Any = arguments.input_format or without_compression(path).removeprefix(".")
    if chosen not in get_args(InputFormat):
        raise CorpusError(
            f"the name {path} does not say what format it has: give --input-format, one of "
            f"{', '.join(get_args(InputFormat))}"
        )
    if chosen == "parquet" and compression_of(path):
        raise CorpusError(f"{path}: Parquet is compressed inside; decompress the file first")
    if arguments.header and chosen in ("jsonl", "parquet"):
        raise CorpusError(f"--header goes with TSV and CSV, and the format is {chosen}")
    is_named = arguments.header or chosen in ("jsonl", "parquet")
    columns = Columns(
        source=arguments.source_column or ("source" if is_named else "1"),
        target=arguments.target_column or ("target" if is_named else "2"),
        has_header=arguments.header,
        of_ids=arguments.ids,
    )
    return open_columns(path, chosen, columns, arguments.pairs_per_request)


def request_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `LossClient.score_chunks`."""
    languages = {
        "source_language": arguments.source_language,
        "target_language": arguments.target_language,
    }
    if arguments.ids and any(languages.values()):
        raise CorpusError("languages are for text; with --ids they are in the ids")
    if not 0.0 <= arguments.label_smoothing <= 1.0:
        raise CorpusError(f"--label-smoothing is {arguments.label_smoothing}, not from 0 to 1")
    return {
        **languages,
        "label_smoothing": arguments.label_smoothing,
        "smoothing": arguments.smoothing,
        "truncation": arguments.truncation,
        "per_token": ("token_nlls",) if arguments.word_scores else (),
        "on_error": "partial",
        "priority": "bulk",
        "reproducible": True,
        "max_requests": arguments.max_requests,
        "retry_for": arguments.retry_for,
    }


def report_path(arguments: argparse.Namespace) -> Path | None:
    """Where bad pairs are reported; None for the standard error."""
    if arguments.report is not None:
        report = Path(arguments.report)
        if report == Path(arguments.output):
            raise CorpusError(f"{report} cannot be the output and the report")
        if is_pipe(arguments.report) and not is_pipe(arguments.output):
            raise CorpusError(f"--report {report} is no file: a run goes on only with files")
        return report
    if is_pipe(arguments.output):
        return None
    return Path(arguments.output + ".errors.jsonl")


def _check_output(output: str, inputs: Sequence[str]) -> None:
    """The output must not take the input's place, not even with --force."""
    path = Path(output)
    for one in inputs:
        if path.is_file() and Path(one).is_file() and path.samefile(one):
            raise CorpusError(f"{output} is the input")


# What says how numbers come about, and how they are written.
_PARAMETERS = (
    *("input_format", "source_column", "target_column", "header", "ids"),
    *("score", "normalize", "word_scores", "source_language", "target_language"),
    *("label_smoothing", "smoothing", "truncation", "pairs_per_request"),
)


def parameters_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of the command that changes a bit of the output, by the options' names."""
    given = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in _PARAMETERS}
    return {
        **given,
        "--format": output_format_of(arguments),
        "compression": compression_of(arguments.output),
        "seqloss-client": __version__,
    }
