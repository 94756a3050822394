"""The command line of `seqloss-client filter`, and one run of it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from seqloss_client.corpus.arguments import add_input_arguments, positive
from seqloss_client.corpus.blocks import Block
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus_input import CorpusInput
from seqloss_client.filtering.copying import Copier
from seqloss_client.filtering.formula import adequacy, domain_weight
from seqloss_client.filtering.losses import DEFAULT_URL, Direction, Losses, ServiceLosses
from seqloss_client.plain_lines import LineWriter
from seqloss_client.score_files import aligned, mean_nlls

if TYPE_CHECKING:
    from seqloss_client.filtering.ranking import Cutoff, Ranking

_BLOCK_PAIRS = 2**16
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


# ---------------------------------------------------------------- the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that `run` reads."""
    parser.description = (
        "Keeps the pairs that a model from source to target and a model from target to source both "
        "find likely, and alike: score = exp(-(|forward - backward| + (forward + backward) / 2)), "
        "with losses in nats per token. With losses of a domain and of general text the score is "
        "multiplied with min(exp(general - in-domain), 1)."
    )
    add_input_arguments(parser.add_argument_group("input"))
    _add_losses(parser.add_argument_group("losses"))
    _add_choice(parser.add_argument_group("what is kept"))
    _add_output(parser.add_argument_group("output"))


def _add_losses(group: argparse._ArgumentGroup) -> None:
    for name, what in (("forward", "target given source"), ("backward", "source given target")):
        group.add_argument(
            f"--{name}-scores", metavar="FILE", help=f"{what}, as `seqloss-client score` wrote them"
        )
        group.add_argument(f"--{name}-url", metavar="URL", help="or the service that computes them")
        group.add_argument(f"--{name}-model", metavar="NAME", help="of the service")
        group.add_argument(
            f"--{name}-source-language",
            metavar="NAME",
            help="of what this model reads, where it is told",
        )
        group.add_argument(
            f"--{name}-target-language", metavar="NAME", help="of what it scores, likewise"
        )
    group.add_argument(
        "--in-domain-scores", metavar="FILE", help="losses by a model of the wanted domain"
    )
    group.add_argument("--general-scores", metavar="FILE", help="losses by a model of general text")
    group.add_argument("--pairs-per-request", type=positive, default=8000, metavar="N")
    group.add_argument("--max-requests", type=positive, default=4, metavar="N")
    group.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS")
    group.add_argument("--retry-for", type=float, default=300.0, metavar="SECONDS")


def _add_choice(parent: argparse._ArgumentGroup) -> None:
    group = parent.add_mutually_exclusive_group(required=True)
    group.add_argument("--threshold", type=float, metavar="SCORE", help="this score or more")
    group.add_argument("--best", type=positive, metavar="N", help="so many; of equals the first")
    group.add_argument("--best-percent", type=_percent, metavar="P", help="of all pairs")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        nargs="+",
        required=True,
        metavar="FILE",
        help="what is kept, as it stands in the input and in its order; two files for two",
    )
    group.add_argument("--rejected", nargs="+", metavar="FILE", help="the other pairs, likewise")
    group.add_argument("--scores", metavar="FILE", help="losses and score of every pair, as TSV")
    group.add_argument(
        "--memory-limit", default="1GB", metavar="SIZE", help="for sorting (default: %(default)s)"
    )


def _percent(text: str) -> Fraction:
    try:
        percent = Fraction(text)
    except (ValueError, ZeroDivisionError):
        percent = Fraction(-1)
    if not 0 < percent <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and up to 100")
    return percent


# ---------------------------------------------------------------- the run


def run(arguments: argparse.Namespace) -> int:
    """Filters a corpus; the exit status is 0.

    Raises:
        SeqlossError: it could not be done.
    """
    corpus = CorpusInput.of(arguments)
    _check_outputs(corpus, {"--output": arguments.output, "--rejected": arguments.rejected})
    with ExitStack() as stack:
        losses = LossStreams.of(arguments, corpus, stack)
        folder = stack.enter_context(_folder_beside(arguments.output[0]))
        ranking = stack.enter_context(_new_ranking(Path(folder), arguments.memory_limit))
        _rank(losses, ranking, arguments.scores)
        cutoff = _cutoff(ranking, arguments)
        num_kept = _copy(corpus, arguments, ranking, cutoff)
        _summarize(ranking, num_kept, losses, corpus)
    return 0


def _check_outputs(corpus: CorpusInput, outputs: Mapping[str, Sequence[str] | None]) -> None:
    used = set(map(Path, corpus.paths))
    for name, paths in outputs.items():
        if paths is None:
            continue
        if len(paths) != len(corpus.paths):
            raise CorpusError(
                f"{name} has {len(paths)} files, and the input has {len(corpus.paths)}: pairs are "
                "written as they stand in the input"
            )
        for path in map(Path, paths):
            if path in used:
                raise CorpusError(f"{name}: {path} is read or written already; name another file")
            used.add(path)


def _folder_beside(output: str) -> tempfile.TemporaryDirectory[str]:
    """For what DuckDB keeps on disk: where the output fits, that fits as well."""
    folder = None if output == "-" else Path(output).parent
    if folder is not None and not folder.is_dir():
        raise CorpusError(f"{folder} is no folder; make it first")
    return tempfile.TemporaryDirectory(dir=folder, prefix="seqloss-filter-")


def _new_ranking(folder: Path, memory_limit: str) -> Ranking:
    try:
        from seqloss_client.filtering.ranking import Ranking  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise CorpusError("filter needs DuckDB: pip install 'seqloss-client[filter]'") from error
    return Ranking(folder, memory_limit)


# ---------------------------------------------------------------- losses and scores


@dataclass(frozen=True, slots=True)
class LossStreams:
    """The losses that scores are made of, in the order of the input.

    Attributes:
        streams: pieces of any size, by what an error calls them: forward, backward, and perhaps
            those of the domain and of general text.
        services: those of them that services compute.
        block_pairs: how many pairs are taken from all of them before more.
    """

    streams: dict[str, Iterable[Losses]]
    services: tuple[ServiceLosses, ...]
    block_pairs: int

    @classmethod
    def of(
        cls, arguments: argparse.Namespace, corpus: CorpusInput, stack: ExitStack
    ) -> LossStreams:
        """Opens files, and has the stack close them; services are asked as blocks are taken.

        Raises:
            CorpusError: the arguments contradict each other, or a file cannot be read.
        """
        if bool(arguments.in_domain_scores) != bool(arguments.general_scores):
            raise CorpusError("--in-domain-scores and --general-scores come together")
        files = {
            "forward": arguments.forward_scores,
            "backward": arguments.backward_scores,
            "in-domain": arguments.in_domain_scores,
            "general": arguments.general_scores,
        }
        services = {
            name: ServiceLosses(_direction(name, arguments))
            for name in ("forward", "backward")
            if not files[name]
        }
        copies: Iterator[Iterator[Block]] = iter(())
        if services:
            reader = stack.enter_context(closing(corpus.reader()))
            copies = iter(tee(map(reader.parse, reader.blocks()), len(services)))
        streams: dict[str, Iterable[Losses]] = {}
        for name, path in files.items():
            if path:
                streams[f"--{name}-scores {path}"] = mean_nlls(path)
            elif name in services:
                streams[f"the {name} service"] = services[name].of(next(copies))
        block_pairs = arguments.pairs_per_request if services else _BLOCK_PAIRS
        return cls(streams, tuple(services.values()), block_pairs)

    def blocks(self) -> Iterator[list[Losses]]:
        """For each block the losses of every stream, and behind them the scores."""
        for losses in aligned(self.streams, self.block_pairs):
            forward, backward, *domain = losses
            scores = adequacy(forward, backward)
            if domain:
                scores = scores * domain_weight(*domain)
            yield [*losses, scores]


def _direction(name: str, arguments: argparse.Namespace) -> Direction:
    """The service of `forward` or `backward`.

    Raises:
        CorpusError: nothing names it.
    """
    given = {
        what: getattr(arguments, f"{name}_{what}")
        for what in ("url", "model", "source_language", "target_language")
    }
    if given["url"] is None and given["model"] is None:
        raise CorpusError(
            f"where do the {name} losses come from? Give --{name}-scores, or --{name}-url and "
            f"--{name}-model"
        )
    return Direction(
        **given | {"url": given["url"] or DEFAULT_URL},
        is_backward=name == "backward",
        timeout=arguments.timeout,
        max_requests=arguments.max_requests,
        retry_for=arguments.retry_for,
    )


def _rank(losses: LossStreams, ranking: Ranking, scores_path: str | None) -> None:
    with ExitStack() as stack:
        scores_file = stack.enter_context(LineWriter(scores_path)) if scores_path else None
        for block in losses.blocks():
            ranking.add(block[-1])
            if scores_file is not None:
                if not scores_file.has_lines:
                    scores_file.write([_header(len(block))])
                scores_file.write(_rows(block))
    ranking.sort()


_COLUMNS = ("forward", "backward", "in_domain", "general")


def _header(num_columns: int) -> bytes:
    return "\t".join([*_COLUMNS[: num_columns - 1], "score"]).encode() + b"\n"


def _rows(block: Sequence[Losses]) -> list[bytes]:
    columns = [column.tolist() for column in block]
    return [("\t".join(map(repr, row)) + "\n").encode() for row in zip(*columns, strict=True)]


# ---------------------------------------------------------------- what is kept


def _cutoff(ranking: Ranking, arguments: argparse.Namespace) -> Cutoff:
    if arguments.threshold is not None:
        return ranking.at_least(arguments.threshold)
    if arguments.best is not None:
        return ranking.best(arguments.best)
    return ranking.best_percent(arguments.best_percent)


def _copy(
    corpus: CorpusInput, arguments: argparse.Namespace, ranking: Ranking, cutoff: Cutoff
) -> int:
    """Writes the outputs; returns how many pairs are kept."""

    def keeps(start: int, stop: int) -> NDArray[np.bool_]:
        return cutoff.keeps(start, ranking.scores(start, stop))

    copier = Copier(keeps, ranking.num_pairs, has_header=corpus.has_header)
    copy = copier.copy_rows if corpus.is_parquet else copier.copy_lines
    rejected = arguments.rejected or [None] * len(corpus.paths)
    counts = [
        copy(path, output, others)
        for path, output, others in zip(corpus.paths, arguments.output, rejected, strict=True)
    ]
    return counts[0]


def _summarize(ranking: Ranking, num_kept: int, losses: LossStreams, corpus: CorpusInput) -> None:
    num_bad = ranking.num_pairs - ranking.num_scored
    num_rejected = ranking.num_scored - num_kept
    counts = f"{num_kept:,} kept, {num_rejected:,} rejected by score, {num_bad:,} without a score"
    lines = [f"{ranking.num_pairs:,} pairs: {counts}"]
    if ranking.num_scored:
        lines.append("score (quantiles of the pairs that have one):")
        lines += [f"  {share:>4.0%}  {ranking.quantile(share):.6f}" for share in _QUANTILES]
    for service in losses.services:
        side = "backward" if service.direction.is_backward else "forward"
        for place, bad in service.first_bad.items():
            lines.append(f"line {corpus.first_line + place}, {side}: {bad.detail}")
    print("\n".join(lines), file=sys.stderr)
