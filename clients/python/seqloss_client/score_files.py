"""Reads back what `seqloss-client score` wrote: the mean nll of every pair, in order."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest

import numpy as np
import orjson
from numpy.typing import NDArray

from seqloss_client.corpus.compression import without_compression
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus.formats import TSV_HEADER
from seqloss_client.plain_lines import read_lines

Losses = NDArray[np.float64]

_PIECE_PAIRS = 2**16

# A sum of float32 log-probabilities near 0 may lie this far on the wrong side.
_ROUNDING = 1e-6
_TSV_COLUMNS = TSV_HEADER.decode().rstrip("\n").split("\t")
_NLL, _NUM_TOKENS = _TSV_COLUMNS.index("nll"), _TSV_COLUMNS.index("num_tokens")


def mean_nlls(path: str) -> Iterator[Losses]:
    """Nats per token of every pair, NaN of bad ones, in pieces of some size.

    Args:
        path: a file of the format that its name says: `.tsv`, `.jsonl`, `.parquet`, or else a
            number a line, which is taken as it is.

    Raises:
        CorpusError: the file cannot be read, or has something else than losses.
    """
    suffix = without_compression(path)
    if suffix == ".parquet":
        return _of_parquet(path)
    lines = enumerate(read_lines(path), 1)
    if suffix == ".tsv":
        return _of_lines(path, _without_header(lines), _of_tsv)
    return _of_lines(path, lines, _of_json if suffix == ".jsonl" else float)


def aligned(streams: Mapping[str, Iterable[Losses]], block_pairs: int) -> Iterator[list[Losses]]:
    """The same pairs' losses from several streams, a block at a time.

    Args:
        streams: losses in pieces of any size; by what an error calls them.
        block_pairs: how many pairs a block has, unless it is the last.

    Raises:
        CorpusError: they have different numbers of pairs.
    """
    names = list(streams)
    num_before = 0
    blocks_of = [_in_blocks(pieces, block_pairs) for pieces in streams.values()]
    for blocks in zip_longest(*blocks_of, fillvalue=np.empty(0)):
        counts = [len(block) for block in blocks]
        shortest, longest = min(counts), max(counts)
        if shortest != longest:
            raise CorpusError(
                f"{names[counts.index(shortest)]} has losses of {num_before + shortest:,} pairs, "
                f"{names[counts.index(longest)]} of more: they are not of the same input"
            )
        num_before += shortest
        yield list(blocks)


def _in_blocks(pieces: Iterable[Losses], block_pairs: int) -> Iterator[Losses]:
    waiting = np.empty(0)
    for piece in pieces:
        waiting = np.concatenate([waiting, piece])
        while len(waiting) >= block_pairs:
            yield waiting[:block_pairs]
            waiting = waiting[block_pairs:]
    if len(waiting):
        yield waiting


def _without_header(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    first = next(lines, None)
    if first is None or first[1] + b"\n" == TSV_HEADER:
        return lines
    return chain([first], lines)


def _of_lines(
    path: str, lines: Iterator[tuple[int, bytes]], parse: Callable[[bytes], float]
) -> Iterator[Losses]:
    while rows := list(islice(lines, _PIECE_PAIRS)):
        yield _parsed(path, rows, parse)


def _parsed(
    path: str, rows: Sequence[tuple[int, bytes]], parse: Callable[[bytes], float]
) -> Losses:
    losses = np.empty(len(rows))
    for place, (number, line) in enumerate(rows):
        try:
            losses[place] = parse(line)
        except (ValueError, IndexError, KeyError, TypeError):
            raise CorpusError(
                f"{path}, line {number}: {line[:60].decode(errors='replace')!r} is no score; the "
                "name's end says the format: .tsv, .jsonl, .parquet, or else a number a line"
            ) from None
    _check_sign(path, losses, rows[0][0])
    return losses


def _check_sign(path: str, losses: Losses, first_number: int) -> None:
    negative = np.flatnonzero(losses < -_ROUNDING)
    if len(negative):
        place = int(negative[0])
        raise CorpusError(
            f"{path}, line {first_number + place}: {losses[place]} is negative, and no loss; files "
            "of log-probabilities, such as marian-scorer's, are not read"
        )


def _of_tsv(line: bytes) -> float:
    fields = line.split(b"\t")
    if len(fields) != len(_TSV_COLUMNS):
        raise ValueError(f"{len(fields)} columns")
    return _mean(float(fields[_NLL]), int(fields[_NUM_TOKENS]))


def _of_json(line: bytes) -> float:
    row = orjson.loads(line)
    return float("nan") if row["nll"] is None else _mean(row["nll"], row["num_tokens"])


def _mean(nll: float, num_tokens: int) -> float:
    return nll / num_tokens if num_tokens else float("nan")


def _of_parquet(path: str) -> Iterator[Losses]:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise CorpusError("Parquet needs pyarrow: pip install 'seqloss-client[parquet]'") from error
    num_read = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PIECE_PAIRS, columns=["nll", "num_tokens"]):
                nll = batch.column("nll").to_numpy(zero_copy_only=False).astype(np.float64)
                num_tokens = batch.column("num_tokens").to_numpy(zero_copy_only=False)
                means = np.where(num_tokens > 0, nll / np.maximum(num_tokens, 1), np.nan)
                _check_sign(path, means, num_read + 1)
                num_read += len(means)
                yield means
    except (OSError, KeyError, arrow.ArrowException) as error:
        raise CorpusError(f"{path} cannot be read as a file of scores: {error}") from error
