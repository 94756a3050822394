"""`seqloss-client score`: a number for every pair of a corpus, however large it is.

Exit status: 0 every pair is scored or reported as bad, 1 it could not be done, 2 a wrong command
line, 3 with --strict some pair is bad, 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson

from seqloss_client import ConnectionFailed, LossClient
from seqloss_client.corpus import formats
from seqloss_client.corpus.arguments import (
    add_arguments,
    open_reader,
    output_format_of,
    parameters_of,
    report_path,
    request_options,
)
from seqloss_client.corpus.asking import Asker
from seqloss_client.corpus.blocks import RawBlock, Reader
from seqloss_client.corpus.compression import compression_of, compressor
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus.formats import Encoder
from seqloss_client.corpus.journal import Journal, Progress
from seqloss_client.corpus.output import Committer, FileOutput, Output, PipeOutput, is_pipe
from seqloss_client.corpus.progress import ProgressDisplay
from seqloss_client.corpus.scores import RECORD, Scores
from seqloss_client.corpus.service import ServedModel

__all__ = ["add_arguments", "run"]

_STRICT_STATUS = 3
_INTERRUPTED_STATUS = 130


def run(arguments: argparse.Namespace) -> int:
    """Scores a corpus.

    Returns:
        The exit status.

    Raises:
        SeqlossError: it could not be done.
    """
    with (
        closing(open_reader(arguments)) as reader,
        LossClient(arguments.url, model=arguments.model, timeout=arguments.timeout) as client,
    ):
        encoder = _encoder(arguments, reader)
        asker = Asker(client, request_options(arguments))
        display = ProgressDisplay(reader.size, is_quiet=arguments.quiet)
        try:
            model = ServedModel(client, arguments.model, arguments.retry_for)
            parameters = {**model.identity, **parameters_of(arguments)}
            with closing(_open_output(arguments, parameters)) as output:
                committer = Committer(output, model.check, arguments.commit_seconds)
                try:
                    if not output.progress.is_whole:
                        _score(reader, asker, encoder, committer, display)
                    output.finish()
                except KeyboardInterrupt:
                    display.close()
                    print(_how_to_go_on(output), file=sys.stderr)
                    return _INTERRUPTED_STATUS
        except ConnectionFailed as error:
            raise CorpusError(
                f"no service answers at {arguments.url}: {error}\nonce it does, the same command "
                "goes on from where it was"
            ) from error
        except OSError as error:
            raise CorpusError(f"the scores cannot be written: {error}") from error
        finally:
            display.close()
    if not arguments.quiet:
        _say_what_was_done(arguments, output.progress, display)
    return _STRICT_STATUS if arguments.strict and output.progress.num_bad_pairs else 0


def _score(
    reader: Reader,
    asker: Asker,
    encoder: Encoder,
    committer: Committer,
    display: ProgressDisplay,
) -> None:
    """Everything from where an earlier run ended."""
    output = committer.output
    progress = output.progress
    blocks = reader.blocks()
    display.start(_skip(blocks, progress))
    if not progress.output_bytes:
        output.write(encoder.header, b"")
    for scores in asker.scores(map(reader.parse, blocks)):
        raw = scores.block.raw
        first_line = reader.first_line + raw.num_pairs_read - raw.num_pairs
        output.write(encoder.block(scores), _report(scores, first_line))
        progress.num_pairs = raw.num_pairs_read
        progress.num_bad_pairs += len(scores.bad)
        progress.num_cut_pairs += len(scores.cut)
        progress.input_digest = raw.digest
        display.add(raw.num_pairs, scores.num_tokens_sent, raw.position, raw.num_pairs_read)
        committer.written()
    if not progress.output_bytes:
        output.write(encoder.nothing, b"")
    committer.now()


def _skip(blocks: Iterator[RawBlock], progress: Progress) -> int:
    """Reads what an earlier run has scored, and makes sure that it is the same.

    Returns:
        The position behind it.
    """
    if not progress.num_pairs:
        return 0
    for raw in blocks:
        if raw.num_pairs_read >= progress.num_pairs:
            if (raw.num_pairs_read, raw.digest) == (progress.num_pairs, progress.input_digest):
                return raw.position
            break
    raise CorpusError(
        f"the input has changed: its first {progress.num_pairs} pairs are not those that the "
        "unfinished run has scored. Go on with what it had, or delete the journal beside the "
        "output to begin anew"
    )


def _report(scores: Scores, first_line: int) -> bytes:
    """A line for every bad pair, and for every one that was cut."""
    return b"".join(
        orjson.dumps(
            {"line": first_line + place, "code": why.code, "detail": why.detail},
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for place, why in sorted({**scores.cut, **scores.bad}.items())
    )


# ---------------------------------------------------------------- where to


def _encoder(arguments: argparse.Namespace, reader: Reader) -> Encoder:
    """A format, compressed."""
    chosen = output_format_of(arguments)
    header = b""
    if chosen == "plain":
        block = formats.plain(arguments.score or "mean_loss")
    elif chosen == "marian":
        block = formats.marian(normalize=arguments.normalize, word_scores=arguments.word_scores)
    elif chosen == "tsv":
        block = formats.tsv
        header = formats.TSV_HEADER if reader.has_header else b""
    else:
        block = formats.jsonl if chosen == "jsonl" else formats.records
    compress = compressor(compression_of(arguments.output))
    return Encoder(
        header=header and compress(header),
        block=lambda scores: compress(block(scores)),
        nothing=compress(b""),
    )


def _open_output(arguments: argparse.Namespace, parameters: dict[str, Any]) -> Output:
    report = report_path(arguments)
    if is_pipe(arguments.output):
        return PipeOutput(None if arguments.output == "-" else Path(arguments.output), report)
    path = Path(arguments.output)
    assemble = None
    if output_format_of(arguments) == "parquet":
        from seqloss_client.corpus.parquet import write_parquet  # noqa: PLC0415 - an extra

        assemble = functools.partial(write_parquet, record=RECORD)
    return FileOutput(
        path=path,
        report=report or Path(arguments.output + ".errors.jsonl"),
        journal=Journal(path.with_name(path.name + ".journal"), parameters),
        assemble=assemble,
        replace=arguments.force,
    )


# ---------------------------------------------------------------- what people are told


def _how_to_go_on(output: Output) -> str:
    how = ", and the same command goes on from there" if isinstance(output, FileOutput) else ""
    return f"interrupted; {output.progress.num_pairs:,} pairs are done{how}"


def _say_what_was_done(
    arguments: argparse.Namespace, progress: Progress, display: ProgressDisplay
) -> None:
    parts = [f"{progress.num_pairs:,} pairs"]
    if progress.num_bad_pairs:
        parts.append(f"{progress.num_bad_pairs:,} of them bad")
    if progress.num_cut_pairs:
        parts.append(f"{progress.num_cut_pairs:,} cut")
    if progress.report_bytes:
        parts.append(f"see {report_path(arguments)}")
    parts.append(f"{display.pairs_per_second():,.0f} pairs/s")
    print(f"{arguments.output}: {', '.join(parts)}", file=sys.stderr)
