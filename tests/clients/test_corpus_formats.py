"""Whatever holds the pairs and whatever takes the scores, the numbers are the same to the bit."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from score_runs import WRITERS, Corpus, demo_corpus, score
from seqloss.bundle.reader import Bundle
from seqloss_client.corpus.blocks import Block, Columns
from seqloss_client.corpus.compression import compressor, decompressed
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.corpus.readers import ParallelReader, open_columns
from seqloss_client.models import Ragged
from server import Server

_NUM_PAIRS = 60
_REQUEST_PAIRS = 25
_NAMES = ("nll", "loss", "mean_loss", "perplexity", "num_tokens")
_CORPORA = Path(__file__).parents[3] / "shared" / "corpora"

Row = dict[str, float]


@pytest.fixture(scope="module")
def url(bundle_of: Callable[[str], Bundle]) -> Iterator[str]:
    """The demo model behind a service."""
    server = Server(f"demo={bundle_of('demo').folder}")
    yield server.address
    server.process.kill()
    server.process.communicate()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """A little of what the demo model knows."""
    return demo_corpus(_NUM_PAIRS)


@pytest.fixture(scope="module")
def expected(url: str, corpus: Corpus) -> list[Row]:
    """The numbers of the wire, asked for by hand."""
    rows: list[Row] = []
    for first in range(0, _NUM_PAIRS, _REQUEST_PAIRS):
        part = corpus.ids[first : first + _REQUEST_PAIRS]
        body = {
            "source_ids": [source for source, _ in part],
            "target_ids": [target for _, target in part],
            "label_smoothing": 0.1,
            "reproducible": True,
        }
        reply = httpx.post(f"{url}/loss", json=body).json()
        columns = ("nlls", "losses", "mean_losses", "perplexities", "num_tokens")
        values = zip(*(reply[name] for name in columns), strict=True)
        rows += [dict(zip(_NAMES, row, strict=True)) for row in values]
    return rows


def _bits(values: list[float]) -> list[bytes]:
    return [struct.pack("<d", value) for value in values]


def _read_plain(path: Path) -> list[Row]:
    return [{"nll": float(line)} for line in path.read_text().split("\n")[:-1]]


def _read_tsv(path: Path) -> list[Row]:
    rows = [line.split("\t") for line in path.read_text().split("\n")[:-1]]
    if rows[0] == list(_NAMES):
        del rows[0]
    return [dict(zip(_NAMES, map(float, row), strict=True)) for row in rows]


def _read_jsonl(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _read_parquet(path: Path) -> list[Row]:
    pq = pytest.importorskip("pyarrow.parquet")
    rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    "plain": _read_plain,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def _skip_without_pyarrow(*formats: str) -> None:
    if "parquet" in formats:
        pytest.importorskip("pyarrow")


@pytest.mark.parametrize("formats", list(itertools.product(WRITERS, _READERS)), ids="-".join)
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_numbers_are_those_of_the_wire(
    url: str,
    corpus: Corpus,
    expected: list[Row],
    tmp_path: Path,
    kind: str,
    formats: tuple[str, str],
) -> None:
    input_format, output_format = formats
    _skip_without_pyarrow(input_format, output_format)
    rows = corpus.texts
    if kind == "ids":
        rows = [(_as_text(source), _as_text(target)) for source, target in corpus.ids]
    output = tmp_path / "scores"
    arguments = WRITERS[input_format](tmp_path, rows)
    if output_format == "plain":
        arguments += ["--score", "nll"]
    if kind == "ids":
        arguments.append("--ids")
    arguments += ["--format", output_format, "--output", str(output)]
    status = score(
        url, *arguments, "--pairs-per-request", _REQUEST_PAIRS, "--label-smoothing", "0.1"
    )
    assert status == 0
    scored = _READERS[output_format](output)
    assert len(scored) == _NUM_PAIRS
    for name in scored[0]:
        given = [float(row[name]) for row in scored]
        assert _bits(given) == _bits([float(row[name]) for row in expected]), name


def _as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


@pytest.mark.parametrize("column", ["json", "lists", "parquet lists"])
def test_ids_may_be_lists(
    url: str, corpus: Corpus, expected: list[Row], tmp_path: Path, column: str
) -> None:
    if column == "json":
        path = tmp_path / "pairs.tsv"
        lines = [f"{json.dumps(source)}\t{json.dumps(target)}" for source, target in corpus.ids]
        path.write_text("".join(f"{line}\n" for line in lines))
    elif column == "lists":
        path = tmp_path / "pairs.jsonl"
        objects = [{"source": source, "target": target} for source, target in corpus.ids]
        path.write_text("".join(f"{json.dumps(one)}\n" for one in objects))
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "pairs.parquet"
        sources, targets = map(list, zip(*corpus.ids, strict=True))
        pq.write_table(pa.table({"source": sources, "target": targets}), path, row_group_size=7)
    output = tmp_path / "scores"
    arguments = ["--input", path, "--ids", "--output", output, "--score", "nll"]
    assert score(url, *arguments, "--pairs-per-request", _REQUEST_PAIRS) == 0
    assert _bits([row["nll"] for row in _read_plain(output)]) == _bits(
        [row["nll"] for row in expected]
    )


def test_marian_has_log_probabilities_with_its_digits(
    url: str, corpus: Corpus, expected: list[Row], tmp_path: Path
) -> None:
    arguments = WRITERS["tsv"](tmp_path, corpus.texts)
    arguments += ["--format", "marian", "--pairs-per-request", str(_REQUEST_PAIRS)]
    sums, means = tmp_path / "sums", tmp_path / "means"
    assert score(url, *arguments, "--output", sums) == 0
    assert sums.read_text().split("\n")[:-1] == ["%.6f" % -row["nll"] for row in expected]
    assert score(url, *arguments, "--normalize", "--output", means) == 0
    assert means.read_text().split("\n")[:-1] == [
        "%.6f" % -(row["nll"] / row["num_tokens"]) for row in expected
    ]


def test_marian_word_scores_are_one_per_token(
    url: str, corpus: Corpus, expected: list[Row], tmp_path: Path
) -> None:
    output = tmp_path / "scores"
    arguments = [*WRITERS["tsv"](tmp_path, corpus.texts), "--format", "marian", "--word-scores"]
    assert score(url, *arguments, "--output", output) == 0
    lines = output.read_text().split("\n")[:-1]
    for line, row in zip(lines, expected, strict=True):
        total, _, words = line.partition(" ||| WordScores= ")
        scores = words.split(" ")
        assert len(scores) == row["num_tokens"]
        assert all(len(word.partition(".")[2]) == 5 for word in scores)
        assert math.isclose(sum(map(float, scores)), float(total), abs_tol=1e-4)


_OPENERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": lambda data: (
        zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    ),
}


@pytest.mark.parametrize("suffix", _OPENERS)
def test_outputs_are_compressed_as_their_names_end(
    url: str, corpus: Corpus, tmp_path: Path, suffix: str
) -> None:
    arguments = [*WRITERS["tsv"](tmp_path, corpus.texts), "--pairs-per-request", _REQUEST_PAIRS]
    plain, packed = tmp_path / "scores.jsonl", tmp_path / f"scores.jsonl{suffix}"
    for output in (plain, packed):
        assert score(url, *arguments, "--output", output) == 0
    assert _OPENERS[suffix](packed.read_bytes()) == plain.read_bytes()


def test_a_header_of_the_input_has_a_header_in_the_output(
    url: str, corpus: Corpus, tmp_path: Path
) -> None:
    with_header, without = tmp_path / "with.tsv", tmp_path / "without.tsv"
    assert (
        score(url, *WRITERS["tsv_with_header"](tmp_path, corpus.texts), "--output", with_header)
        == 0
    )
    assert score(url, *WRITERS["tsv"](tmp_path, corpus.texts), "--output", without) == 0
    header, _, rest = with_header.read_text().partition("\n")
    assert header.split("\t") == list(_NAMES)
    assert rest == without.read_text()


# ---------------------------------------------------------------- readers alone


def _rows(blocks: list[Block]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for block in blocks:
        assert not block.bad
        assert not isinstance(block.sources, Ragged)
        assert not isinstance(block.targets, Ragged)
        rows += zip(block.sources, block.targets, strict=True)
    return rows


def _read(arguments: list[str], *, of_ids: bool = False) -> list[Block]:
    """All blocks, as the arguments of the command say."""
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    if "--input" not in given:
        reader: Any = ParallelReader(given["--source"], given["--target"], 100, of_ids)
    else:
        suffix = Path(given["--input"]).suffix.removeprefix(".")
        is_named = suffix in ("jsonl", "parquet")
        names = ("source", "target") if is_named else ("1", "2")
        columns = Columns(*names, has_header=False, of_ids=of_ids)
        reader = open_columns(given["--input"], suffix, columns, 100)  # type: ignore[arg-type]
    with closing(reader):
        return [reader.parse(raw) for raw in reader.blocks()]


@pytest.mark.parametrize("input_format", [name for name in WRITERS if name != "tsv_with_header"])
def test_real_text_comes_back_line_for_line(tmp_path: Path, input_format: str) -> None:
    if not _CORPORA.is_dir():
        pytest.skip(f"{_CORPORA} is absent: it does not belong to the project")
    _skip_without_pyarrow(input_format)
    folder = _CORPORA / "flores-dev"
    sides = [
        (folder / name).read_bytes().decode().split("\n")[:-1] for name in ("en.txt", "de.txt")
    ]
    rows = list(zip(*sides, strict=True))
    assert len(rows) > 900
    assert _rows(_read(WRITERS[input_format](tmp_path, rows))) == rows


def test_ids_are_parsed_as_python_does(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    rows = [
        tuple(" ".join(map(str, generator.integers(-100, 60_000, count))) for count in counts)
        for counts in generator.integers(0, 40, (500, 2))
    ]
    for name in ("tsv", "parallel"):
        blocks = _read(WRITERS[name](tmp_path, rows), of_ids=True)  # type: ignore[arg-type]
        for side, given in (
            (0, [block.sources for block in blocks]),
            (1, [block.targets for block in blocks]),
        ):
            parsed = [row.tolist() for part in given for row in part.rows()]  # type: ignore[union-attr]
            assert parsed == [[int(word) for word in row[side].split()] for row in rows]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    rows = [(f"source {number}", f"target {number * 7919}") for number in range(5000)]
    arguments = WRITERS[f"parallel{suffix}"](tmp_path, rows)
    path = tmp_path / f"target.txt{suffix}"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorpusError, match="is damaged, or cut off"):
        _read(arguments)


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz", "zstd"])
def test_members_that_follow_each_other_are_one_file(tmp_path: Path, compression: str) -> None:
    compress = compressor(compression)
    path = tmp_path / "members"
    path.write_bytes(b"".join(compress(part) for part in (b"one\n", b"", b"two\n" * 9999, b"3")))
    with path.open("rb") as raw:
        assert decompressed(raw, compression).read() == b"one\n" + b"two\n" * 9999 + b"3"
