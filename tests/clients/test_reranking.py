"""`seqloss-client rerank`: n-best lists in the order of their losses, byte for byte."""

from __future__ import annotations

import gzip
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer

from conftest import SHARED
from seqloss.demo import CHECKPOINT
from seqloss_client import Chunk, LossClient, LossResult, PairError
from seqloss_client.cli import main
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.models import Aggregate, Usage
from seqloss_client.nbest import nbest_lists, read_hypotheses
from seqloss_client.reranking import Reranker
from server import Server

LISTS = [
    b"0 ||| ein Haus ||| LM0= -7.5 TM0= -1 -2.0 ||| -3.5",
    b"0 ||| das  Haus ||| LM0= -6.5 TM0= -1 -2.0 ||| -3.75 ||| 0-0 1-1",
    b"0 |||  ||| LM0= -9 ||| -12",
    b"1 ||| \xc3\xa4 ||| ||| -1e-3",
    b"1 ||| Wasser\t! ||| LM0= 0 ||| -0.5",
]
SOURCES = ["a house", "water !"]


class LengthModel:
    """A client whose losses are the lengths of the targets; a target with `?` has an error."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def score_chunks(self, chunks: Iterator[Chunk], **options: Any) -> Iterator[LossResult]:
        for chunk in chunks:
            self.chunks.append(chunk)
            losses = [math.nan if "?" in text else float(len(text)) for text in chunk.targets]
            errors = [
                PairError(place, "odd", f"{text} is odd")
                for place, text in enumerate(chunk.targets)
                if "?" in text
            ]
            num_tokens = [len(text.split()) for text in chunk.targets]
            yield LossResult(
                model="lengths",
                losses=np.array(losses),
                nlls=np.array(losses),
                num_tokens=np.array(num_tokens, np.int32),
                errors=tuple(errors),
                aggregate=Aggregate(0, 0, 0, 0, None, None, None),
                usage=Usage(0, 0, 0, 0, 0, 0),
            )


def rerank(lines: list[bytes], sources: list[str], **options: Any) -> list[bytes]:
    return list(Reranker(LengthModel(), **options).reranked(sources, lines))


def test_likelier_hypotheses_come_first_and_lines_are_else_as_they_were() -> None:
    assert rerank(LISTS, SOURCES) == [
        b"0 |||  ||| LM0= -9 seqloss= -0.0 ||| -12",
        b"0 ||| ein Haus ||| LM0= -7.5 TM0= -1 -2.0 seqloss= -8.0 ||| -3.5",
        b"0 ||| das  Haus ||| LM0= -6.5 TM0= -1 -2.0 seqloss= -9.0 ||| -3.75 ||| 0-0 1-1",
        b"1 ||| \xc3\xa4 ||| seqloss= -1.0 ||| -1e-3",
        b"1 ||| Wasser\t! ||| LM0= 0 seqloss= -8.0 ||| -0.5",
    ]


def test_best_keeps_a_line_of_each_list() -> None:
    best = rerank(LISTS, SOURCES, is_best_only=True)
    assert [line.split(b" ||| ")[0] for line in best] == [b"0", b"1"]


def test_equal_losses_stay_in_their_order() -> None:
    lines = [b"0 ||| %s ||| ||| 0" % text for text in (b"dd", b"cc", b"b", b"aa")]
    texts = [line.split(b" ||| ")[1] for line in rerank(lines, ["x"])]
    assert texts == [b"b", b"dd", b"cc", b"aa"]


def test_normalized_losses_are_per_token() -> None:
    lines = [b"0 ||| abcdef ||| ||| 0", b"0 ||| a bcd ef gh ||| ||| 0"]
    assert rerank(lines, ["x"], is_normalized=True) == [
        b"0 ||| a bcd ef gh ||| seqloss= -2.75 ||| 0",
        b"0 ||| abcdef ||| seqloss= -6.0 ||| 0",
    ]


def test_what_cannot_be_scored_comes_last_and_is_listed() -> None:
    lines = [b"0 ||| ? ||| ||| 0", b"0 ||| long ||| ||| 0", b"0 ||| ab? ||| ||| 0"]
    reranker = Reranker(LengthModel())
    assert list(reranker.reranked(["x"], lines)) == [
        b"0 ||| long ||| seqloss= -4.0 ||| 0",
        b"0 ||| ? ||| seqloss= nan ||| 0",
        b"0 ||| ab? ||| seqloss= nan ||| 0",
    ]
    assert reranker.faults == [(1, "? is odd"), (3, "ab? is odd")]


def test_a_source_is_sent_once_and_lists_stay_whole() -> None:
    model = LengthModel()
    lines = [b"%d ||| h ||| ||| 0" % source for source in (0, 0, 0, 1, 2, 2)]
    list(Reranker(model, hypotheses_per_request=3).reranked(["a", "b", "c"], lines))
    assert [(chunk.sources, chunk.source_index) for chunk in model.chunks] == [
        (["a"], [0, 0, 0]),
        (["b", "c"], [0, 1, 1]),
    ]


def test_ids_are_sent_as_numbers() -> None:
    sent = []

    class Seen(LengthModel):
        def score_chunks(self, chunks: Iterator[Chunk], **options: Any) -> Iterator[LossResult]:
            sent.extend(chunks)
            return iter(())

    list(Reranker(Seen(), is_ids=True).reranked(["5 6 1"], [b"0 ||| 7 8 1 ||| ||| 0"]))
    assert (sent[0].sources, sent[0].targets) == ([[5, 6, 1]], [[7, 8, 1]])


@pytest.mark.parametrize(
    ("lines", "sources", "message"),
    [
        ([b"0 ||| a ||| b"], ["x"], "line 1: there are 3 fields"),
        ([b"0 ||| a ||| b ||| 1 ||| 2", b""], ["x"], "line 2: there are 1 fields"),
        ([b"zero ||| a ||| ||| 1"], ["x"], "line 1: 'zero' is no id"),
        ([b"-1 ||| a ||| ||| 1"], ["x"], "line 1: '-1' is no id"),
        ([b"0 ||| a ||| b ||| c ||| 1"], ["x"], "line 1: 'c' is no score"),
        ([b"0 ||| \xff ||| ||| 1"], ["x"], "line 1: the hypothesis is no UTF-8: byte 0xff"),
        ([b"0 ||| a ||| seqloss= 1 ||| 1"], ["x"], "line 1: there is a feature seqloss= already"),
        ([b"1 ||| a ||| ||| 1"], ["x", "y"], "line 1: the id is 1 where 0 comes next"),
        (
            [b"0 ||| a ||| ||| 1", b"2 ||| a ||| ||| 1"],
            ["x", "y", "z"],
            "line 2: the id is 2 where 1 comes next: source 1 has no hypotheses",
        ),
        (
            [b"0 ||| a ||| ||| 1", b"1 ||| a ||| ||| 1", b"0 ||| a ||| ||| 1"],
            ["x", "y"],
            "line 3: the id 0 comes a second time",
        ),
        (
            [b"0 ||| a ||| ||| 1", b"1 ||| a ||| ||| 1"],
            ["x"],
            "line 2: the id 1 has no source: the source file has 1 lines",
        ),
        ([b"0 ||| a ||| ||| 1"], ["x", "y"], "the source file goes on: line 2 has no hypotheses"),
    ],
)
def test_wrong_lists_are_refused_with_their_line(
    lines: list[bytes], sources: list[str], message: str
) -> None:
    with pytest.raises(CorpusError, match=re.escape(message)):
        list(nbest_lists(sources, read_hypotheses(lines, "seqloss")))


@pytest.mark.parametrize("word", ["1_0", "-3", "٣", "1.0"])
def test_ids_are_decimal_digits(word: str) -> None:
    lines = [f"0 ||| {word} ||| ||| 0".encode()]
    with pytest.raises(CorpusError, match="line 1: with --ids there are token ids only"):
        rerank(lines, ["1"], is_ids=True)


# ---------------------------------------------------------------- against a service


@pytest.fixture(scope="module")
def url(bundle_of: Callable[[str], Any]) -> Iterator[str]:
    """The demo model behind a service."""
    server = Server(f"demo={bundle_of('demo').folder}")
    yield server.address
    server.process.kill()
    server.process.communicate()


def rerank_files(url: str, folder: Path, *more: str) -> list[str]:
    """Runs the command; returns the lines that it wrote."""
    output = folder / "reranked"
    status = main(
        [
            *("rerank", "--url", url, "--sources", str(folder / "sources")),
            *("--nbest", str(folder / "nbest"), "--output", str(output), *more),
        ]
    )
    assert status == 0
    return output.read_text().split("\n")[:-1]


def real_lists(most_sources: int) -> tuple[list[str], list[list[str]]]:
    """Sources of people, and what many systems made of each."""
    path = SHARED / "corpora" / "wmt-mqm-ted-ende" / "candidates.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent: it does not belong to the project")
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    lists = {row["source"]: [one["target"] for one in row["candidates"]] for row in rows}
    # The demo model takes 128 tokens, which are little more than characters to it here.
    fitting = [
        (source, texts)
        for source, texts in lists.items()
        if max(len(text.encode()) for text in (source, *texts)) < 120
    ][:most_sources]
    return [source for source, _ in fitting], [texts for _, texts in fitting]


def write_lists(folder: Path, sources: list[str], lists: list[list[str]]) -> None:
    (folder / "sources").write_text("".join(f"{source}\n" for source in sources))
    lines = [
        f"{place} ||| {text} ||| F0= {-rank} ||| {-rank / 2}\n"
        for place, texts in enumerate(lists)
        for rank, text in enumerate(texts)
    ]
    (folder / "nbest").write_text("".join(lines))


def test_real_lists_are_ordered_by_what_the_service_says(tmp_path: Path, url: str) -> None:
    sources, lists = real_lists(12)
    write_lists(tmp_path, sources, lists)
    lines = rerank_files(url, tmp_path, "--hypotheses-per-request", "50")
    assert len(lines) == sum(map(len, lists))
    with httpx.Client(base_url=url, timeout=60) as client:
        for place, (source, texts) in enumerate(zip(sources, lists, strict=True)):
            body = {"sources": [source] * len(texts), "targets": texts, "tokens": False}
            losses = client.post("/loss/text", json=body).json()["losses"]
            found = [line.split(" ||| ") for line in lines if line.startswith(f"{place} ||| ")]
            assert sorted(fields[1] for fields in found) == sorted(texts)
            values = [float(fields[2].split()[-1]) for fields in found]
            assert values == pytest.approx(
                sorted((-loss for loss in losses), reverse=True), rel=1e-4
            )
            assert values == sorted(values, reverse=True)


def test_a_source_is_encoded_once_for_all_its_hypotheses(tmp_path: Path, url: str) -> None:
    sources, lists = real_lists(60)
    write_lists(tmp_path, sources, lists)
    rerank_files(url, tmp_path)  # the first run warms the service up
    reused, seconds = _encoder_reuse(url), time.perf_counter()
    rerank_files(url, tmp_path)
    seconds = time.perf_counter() - seconds
    possible = sum(len(texts) - 1 for texts in lists)
    # A source whose hypotheses are in two batches is encoded for each.
    assert 0.9 * possible <= _encoder_reuse(url) - reused <= possible

    pairs = [(source, text) for source, texts in zip(sources, lists, strict=True) for text in texts]
    with LossClient(url) as client:
        alone = time.perf_counter()
        assert len(list(client.score_iterable(pairs, reproducible=True))) == len(pairs)
        alone = time.perf_counter() - alone
    counts = f"{len(pairs)} hypotheses of {len(sources)} sources"
    print(f"\n{counts}: {seconds:.2f} s; each with its source: {alone / seconds:.2f} times as long")


def _encoder_reuse(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(
        re.search(r"^seqloss_encoder_reuse_total\{.*\} (\S+)$", text, re.MULTILINE).group(1)
    )


def test_ids_and_texts_give_the_same_order(tmp_path: Path, url: str) -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    sources = [">>de<< Jun 12", ">>fr<< 5:04 PM"]
    lists = [["12. Mai", "12. Juni", "13. Juni"], ["05:04", "17:04", "17:05", "5:04"]]
    write_lists(tmp_path, sources, lists)
    texts = rerank_files(url, tmp_path, "--best", "--normalize")
    assert [line.split(" ||| ")[1] for line in texts] == ["12. Juni", "17:04"]

    def ids(text: str) -> str:
        return " ".join(map(str, tokenizer.encode(text).ids))

    write_lists(tmp_path, [*map(ids, sources)], [[*map(ids, texts)] for texts in lists])
    found = rerank_files(url, tmp_path, "--best", "--normalize", "--ids")
    assert [line.split(" ||| ")[1] for line in found] == [ids("12. Juni"), ids("17:04")]


def test_a_refused_list_leaves_no_output(
    tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lists(tmp_path, ["a", "b"], [["x"]])
    paths = [str(tmp_path / name) for name in ("sources", "nbest", "reranked")]
    command = ["rerank", "--url", url, "--sources", paths[0], "--nbest", paths[1]]
    assert main([*command, "--output", paths[2]]) == 1
    assert "line 2 has no hypotheses" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"sources", "nbest"}
