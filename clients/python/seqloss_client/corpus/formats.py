"""What is written of a pair: one line, whatever the format.

Numbers are the shortest decimals that give the same float64 again, but for `marian`, whose numbers
have the digits that marian-scorer's have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import orjson

from seqloss_client.corpus.scores import RECORD, Scores

OutputFormat = Literal["plain", "marian", "tsv", "jsonl", "parquet"]
ScoreName = Literal["mean_loss", "loss", "nll", "perplexity"]
Encode = Callable[[Scores], bytes]


@dataclass(frozen=True, slots=True)
class Encoder:
    """A format.

    Attributes:
        header: comes first; may be empty.
        block: the lines of a block.
        nothing: what a file without a line consists of.
    """

    header: bytes
    block: Encode
    nothing: bytes


_NAMES = RECORD.names or ()
_NO_WORDS = np.empty(0, np.float32)
TSV_HEADER = ("\t".join(_NAMES) + "\n").encode()
"""Written where the input has a header too: line i of one belongs to line i of the other."""


def plain(score: ScoreName) -> Encode:
    """A number a line; `nan` for a bad pair."""
    return lambda scores: _lines(map(repr, scores.records[score].tolist()))


def marian(*, normalize: bool, word_scores: bool) -> Encode:
    """What marian-scorer writes: log-probabilities, with six digits; `nan` for a bad pair.

    Args:
        normalize: divide by the number of tokens, the end of the sentence included.
        word_scores: behind each, those of its tokens, with five digits.
    """

    def encode(scores: Scores) -> bytes:
        logprobs = -scores.records["nll"]
        if normalize:
            logprobs = logprobs / np.maximum(scores.records["num_tokens"], 1)
        lines = [f"{logprob:f}" for logprob in logprobs.tolist()]
        if word_scores:
            rows = scores.token_nlls or [_NO_WORDS] * len(lines)
            lines = [
                " ".join([line, "||| WordScores=", *(f"{-nll:.5f}" for nll in row)])
                for line, row in zip(lines, rows, strict=True)
            ]
        return _lines(lines)

    return encode


def tsv(scores: Scores) -> bytes:
    """The fields of `RECORD`; `nan` for a bad pair."""
    columns = [scores.records[name].tolist() for name in _NAMES]
    return _lines("\t".join(map(repr, row)) for row in zip(*columns, strict=True))


def jsonl(scores: Scores) -> bytes:
    """Objects with the fields of `RECORD`; null for a bad pair."""
    columns = [scores.records[name].tolist() for name in _NAMES]
    rows = zip(*columns, strict=True)
    return b"".join(
        orjson.dumps(dict(zip(_NAMES, row, strict=True)), option=orjson.OPT_APPEND_NEWLINE)
        for row in rows
    )


def records(scores: Scores) -> bytes:
    """`RECORD` as it is in memory: what Parquet is made of at the end."""
    return scores.records.tobytes()


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
