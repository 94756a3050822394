"""Runs of `seqloss-client score`, and corpora for them in every format."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard
from tokenizers import Tokenizer

from seqloss.demo import CHECKPOINT
from seqloss.demo.phrases import pairs as demo_pairs
from seqloss_client.cli import main

CLIENT = Path(__file__).parents[1] / "clients" / "python"


@dataclass(frozen=True)
class Corpus:
    """Pairs of text and of token ids."""

    texts: list[tuple[str, str]]
    ids: list[tuple[list[int], list[int]]]


def demo_corpus(num_pairs: int, seed: int = 1) -> Corpus:
    """What the demo model can score."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    texts = [
        (phrase.source, phrase.target)
        for phrase in islice(demo_pairs("held_out", seed=seed), num_pairs)
    ]
    ids = [(tokenizer.encode(source).ids, tokenizer.encode(target).ids) for source, target in texts]
    return Corpus(texts, ids)


def score(url: str, *arguments: object) -> int:
    """Runs the command in this process; returns its exit status."""
    return main(["score", "--url", url, *map(str, arguments)])


def start_score(url: str, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Runs the command in a process of its own."""
    path = os.pathsep.join([str(CLIENT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "seqloss_client.cli", "score", "--url", url, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )


# ---------------------------------------------------------------- inputs

Rows = list[tuple[str, str]]
Write = Callable[[Path, Rows], list[str]]
"""Writes rows into a folder; returns the arguments that read them."""

_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def parallel(suffix: str) -> Write:
    """Two files with a line each; compressed by the end of their names."""

    def write(folder: Path, rows: Rows) -> list[str]:
        arguments = []
        for side, name in enumerate(("source", "target")):
            path = folder / f"{name}.txt{suffix}"
            text = "".join(f"{row[side]}\n" for row in rows)
            path.write_bytes(_COMPRESS[suffix](text.encode()))
            arguments += [f"--{name}", str(path)]
        return arguments

    return write


def _columns(path: Path, lines: Iterable[str], *arguments: str) -> list[str]:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return ["--input", str(path), *arguments]


def tsv(folder: Path, rows: Rows) -> list[str]:
    """Without a header."""
    return _columns(folder / "pairs.tsv", map("\t".join, rows))


def tsv_with_header(folder: Path, rows: Rows) -> list[str]:
    """Columns in another order, beside others."""
    lines = ["number\ttranslation\toriginal"]
    lines += [f"{number}\t{target}\t{source}" for number, (source, target) in enumerate(rows)]
    names = ("--header", "--source-column", "original", "--target-column", "translation")
    return _columns(folder / "named.tsv", lines, *names)


def quoted_csv(folder: Path, rows: Rows) -> list[str]:
    """Every field in quotes."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return _columns(folder / "pairs.csv", text.getvalue().split("\n")[:-1])


def jsonl(folder: Path, rows: Rows) -> list[str]:
    """Strings."""
    lines = [json.dumps({"source": source, "target": target}) for source, target in rows]
    return _columns(folder / "pairs.jsonl", lines)


def parquet(folder: Path, rows: Rows) -> list[str]:
    """In small row groups."""
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.parquet as pq  # noqa: PLC0415

    sources, targets = zip(*rows, strict=True)
    path = folder / "pairs.parquet"
    table = pa.table({"source": list(sources), "target": list(targets)})
    pq.write_table(table, path, row_group_size=7)
    return ["--input", str(path)]


WRITERS: dict[str, Write] = {
    **{f"parallel{suffix}": parallel(suffix) for suffix in _COMPRESS},
    "tsv": tsv,
    "tsv_with_header": tsv_with_header,
    "csv": quoted_csv,
    "jsonl": jsonl,
    "parquet": parquet,
}
