"""`seqloss-client filter`: the paper's formula, and exactly which pairs are kept."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from seqloss_client.cli import main
from seqloss_client.filtering import adequacy, domain_weight

pytest.importorskip("duckdb", reason="the extra `filter` is not installed")

NAN = math.nan


def paper_score(forward: float, backward: float) -> float:
    """Equation 2 of Junczys-Dowmunt 2018 and its exponential, in plain Python."""
    difference = forward - backward if forward > backward else backward - forward
    return math.e ** -(difference + 0.5 * (forward + backward))


def paper_domain(in_domain: float, general: float) -> float:
    """Equations 5 and 6: exponentiated, then clipped at 1."""
    return min(math.e ** -(in_domain - general), 1.0)


def some_losses(seed: int, size: int, missing: float = 0.02) -> list[float]:
    generator = random.Random(seed)
    return [
        NAN if generator.random() < missing else generator.gammavariate(1.2, 0.7)
        for _ in range(size)
    ]


def write_scores(path: Path, losses: Sequence[float]) -> Path:
    """As `score --format` has them, by the name's end."""
    rows = []
    for place, loss in enumerate(losses):
        num_tokens = 0 if math.isnan(loss) else 1 + place % 7
        rows.append((loss * num_tokens if num_tokens else NAN, num_tokens))
    if path.suffix == ".tsv":
        lines = [f"{nll!r}\t{nll!r}\t0.5\t1.5\t{count}" for nll, count in rows]
    elif path.suffix == ".jsonl":
        lines = [
            json.dumps({"nll": nll if count else None, "num_tokens": count}) for nll, count in rows
        ]
    else:
        lines = [repr(loss) for loss in losses]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


class Corpus:
    """A TSV of so many pairs with scores beside it."""

    def __init__(self, folder: Path, forward: Sequence[float], backward: Sequence[float]) -> None:
        self.folder = folder
        self.lines = [f"source {place}\ttarget ü {place}\n" for place in range(len(forward))]
        self.input = folder / "pairs.tsv"
        self.input.write_text("".join(self.lines))
        self.forward = write_scores(folder / "forward.txt", forward)
        self.backward = write_scores(folder / "backward.txt", backward)
        self.scores = [paper_score(*pair) for pair in zip(forward, backward, strict=True)]

    def filter(self, *arguments: object) -> list[str]:
        """What is kept."""
        status = main(
            [
                *("filter", "--input", str(self.input), "--output", str(self.folder / "kept.tsv")),
                *("--forward-scores", str(self.forward), "--backward-scores", str(self.backward)),
                *map(str, arguments),
            ]
        )
        assert status == 0
        return (self.folder / "kept.tsv").read_text().splitlines(keepends=True)

    def best(self, count: int) -> list[str]:
        """What is to be kept, by a plain sort."""
        scored = [place for place, score in enumerate(self.scores) if not math.isnan(score)]
        chosen = sorted(scored, key=lambda place: (-self.scores[place], place))[:count]
        return [self.lines[place] for place in sorted(chosen)]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path, some_losses(1, 3000), some_losses(2, 3000))


# ---------------------------------------------------------------- the formula


def test_adequacy_is_the_papers() -> None:
    forward, backward = some_losses(3, 1000, missing=0), some_losses(4, 1000, missing=0)
    expected = [paper_score(*pair) for pair in zip(forward, backward, strict=True)]
    np.testing.assert_allclose(
        adequacy(np.array(forward), np.array(backward)), expected, rtol=1e-12, atol=0
    )


def test_the_domains_weight_is_the_papers() -> None:
    in_domain, general = some_losses(5, 1000, missing=0), some_losses(6, 1000, missing=0)
    expected = [paper_domain(*pair) for pair in zip(in_domain, general, strict=True)]
    weights = domain_weight(np.array(in_domain), np.array(general))
    np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=0)
    assert (weights == 1).any()
    assert (weights < 1).any()


def test_a_missing_loss_is_a_missing_score() -> None:
    losses, others = np.array([NAN, 1.0, NAN, 2.0]), np.array([1.0, NAN, NAN, 2.0])
    for scores in (adequacy(losses, others), domain_weight(losses, others)):
        assert np.isnan(scores).tolist() == [True, True, True, False]


# ---------------------------------------------------------------- what is kept


def test_a_threshold_keeps_what_reaches_it(corpus: Corpus) -> None:
    ordered = sorted(score for score in corpus.scores if not math.isnan(score))
    threshold = (ordered[999] + ordered[1000]) / 2
    expected = [
        line for line, score in zip(corpus.lines, corpus.scores, strict=True) if score >= threshold
    ]
    assert corpus.filter("--threshold", repr(threshold)) == expected
    assert len(expected) == len(ordered) - 1000


@pytest.mark.parametrize("count", [1, 7, 1500, 10**9])
def test_the_best_are_kept_in_the_order_of_the_input(corpus: Corpus, count: int) -> None:
    assert corpus.filter("--best", count) == corpus.best(count)


@pytest.mark.parametrize("percent", ["0.1", "12.5", "33", "100"])
def test_a_share_is_of_all_pairs_rounded_down(corpus: Corpus, percent: str) -> None:
    count = math.floor(Fraction(percent) * len(corpus.lines) / 100)
    assert corpus.filter("--best-percent", percent) == corpus.best(count)


def test_equal_scores_are_kept_from_the_first_line_on(tmp_path: Path) -> None:
    losses = [float(place % 3) for place in range(900)]
    corpus = Corpus(tmp_path, losses, losses)
    expected = [line for place, line in enumerate(corpus.lines) if place % 3 == 0]
    expected += [line for place, line in enumerate(corpus.lines) if place % 3 == 1][:50]
    assert sorted(corpus.filter("--best", 350)) == sorted(expected)


def test_pairs_without_a_score_are_rejected_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Corpus(tmp_path, [NAN, 0.0, 1.0, 0.5], [0.0, NAN, 1.0, 0.5])
    kept = corpus.filter("--threshold", "0", "--rejected", tmp_path / "rejected.tsv")
    assert kept == corpus.lines[2:]
    assert (tmp_path / "rejected.tsv").read_text() == "".join(corpus.lines[:2])
    summary = capsys.readouterr().err
    assert "4 pairs: 2 kept, 0 rejected by score, 2 without a score" in summary
    assert f"50%  {paper_score(1, 1):.6f}" in summary


def test_only_pairs_without_a_score_leave_nothing(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, [NAN, NAN], [0.0, 1.0])
    assert corpus.filter("--best", 5) == []


def test_the_domain_multiplies(tmp_path: Path) -> None:
    forward, backward, in_domain, general = (some_losses(seed, 200) for seed in range(11, 15))
    corpus = Corpus(tmp_path, forward, backward)
    corpus.scores = [
        score * paper_domain(*losses)
        for score, *losses in zip(corpus.scores, in_domain, general, strict=True)
    ]
    kept = corpus.filter(
        *("--best", 60, "--scores", tmp_path / "scores.tsv"),
        *("--in-domain-scores", write_scores(tmp_path / "in.tsv", in_domain)),
        *("--general-scores", write_scores(tmp_path / "general.jsonl", general)),
    )
    assert kept == corpus.best(60)
    header, *rows = (tmp_path / "scores.tsv").read_text().splitlines()
    assert header.split("\t") == ["forward", "backward", "in_domain", "general", "score"]
    columns = np.array([[float(cell) for cell in row.split("\t")] for row in rows])
    expected = np.array([forward, backward, in_domain, general, corpus.scores]).T
    np.testing.assert_allclose(columns, expected, rtol=1e-12)


# ---------------------------------------------------------------- formats


def test_parallel_files_are_filtered_alike(tmp_path: Path, corpus: Corpus) -> None:
    sides = [[line.rstrip("\n").split("\t")[side] for line in corpus.lines] for side in (0, 1)]
    paths = [tmp_path / "pairs.en.gz", tmp_path / "pairs.de"]
    paths[0].write_bytes(gzip.compress("\n".join(sides[0]).encode()))  # the last line has no end
    paths[1].write_text("".join(f"{line}\n" for line in sides[1]))
    kept = [tmp_path / "kept.en", tmp_path / "kept.de.gz"]
    status = main(
        [
            *("filter", "--source", str(paths[0]), "--target", str(paths[1]), "--best", "900"),
            *("--forward-scores", str(corpus.forward), "--backward-scores", str(corpus.backward)),
            *("--output", *map(str, kept)),
        ]
    )
    assert status == 0
    expected = [line.rstrip("\n").split("\t") for line in corpus.best(900)]
    assert kept[0].read_text().splitlines() == [source for source, _ in expected]
    assert gzip.decompress(kept[1].read_bytes()).decode().splitlines() == [
        target for _, target in expected
    ]


def test_a_header_goes_along_and_lines_stay_the_same_bytes(tmp_path: Path) -> None:
    header, crlf, not_utf8 = b"id\tsource\ttarget\n", b"1\ta\tb\r\n", b"2\t\xff\tb\n"
    long_and_last = b'3\t"a\t' + b"b" * 2_000_000
    lines = [header, crlf, not_utf8, long_and_last]
    (tmp_path / "pairs.tsv").write_bytes(b"".join(lines))
    losses = write_scores(tmp_path / "losses.tsv", [0.5, NAN, 0.25])
    losses.write_text("nll\tloss\tmean_loss\tperplexity\tnum_tokens\n" + losses.read_text())
    status = main(
        [
            *("filter", "--input", str(tmp_path / "pairs.tsv"), "--header", "--threshold", "0.1"),
            *("--forward-scores", str(losses), "--backward-scores", str(losses)),
            *("--output", str(tmp_path / "kept.tsv"), "--rejected", str(tmp_path / "rejected.tsv")),
        ]
    )
    assert status == 0
    assert (tmp_path / "kept.tsv").read_bytes() == header + crlf + long_and_last + b"\n"
    assert (tmp_path / "rejected.tsv").read_bytes() == header + not_utf8


def test_parquet_keeps_columns_types_and_order(tmp_path: Path, corpus: Corpus) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table(
        {
            "source": [line.split("\t")[0] for line in corpus.lines],
            "number": arrow.array(range(3000), arrow.int16()),
            "target": arrow.array([None, *corpus.lines[1:]]).dictionary_encode(),
        }
    ).replace_schema_metadata({"origin": "here"})
    parquet.write_table(table, tmp_path / "pairs.parquet", row_group_size=700)
    scores = arrow.table({"nll": [0.5 * k for k in range(3000)], "num_tokens": [2] * 3000})
    parquet.write_table(scores, tmp_path / "scores.parquet", row_group_size=999)
    status = main(
        [
            *("filter", "--input", str(tmp_path / "pairs.parquet"), "--best", "1000"),
            *("--forward-scores", str(tmp_path / "scores.parquet")),
            *("--backward-scores", str(tmp_path / "scores.parquet")),
            *("--output", str(tmp_path / "kept.parquet")),
            *("--rejected", str(tmp_path / "rejected.parquet")),
        ]
    )
    assert status == 0
    kept = parquet.read_table(tmp_path / "kept.parquet")
    assert kept.equals(parquet.read_table(tmp_path / "pairs.parquet").slice(0, 1000), True)
    assert parquet.read_table(tmp_path / "rejected.parquet")["number"].to_pylist() == list(
        range(1000, 3000)
    )


# ---------------------------------------------------------------- errors


def run_and_read_error(capsys: pytest.CaptureFixture[str], corpus: Corpus, *more: object) -> str:
    status = main(
        [
            *("filter", "--input", str(corpus.input), "--output", str(corpus.folder / "kept.tsv")),
            *map(str, more),
        ]
    )
    assert status == 1
    left = [path.name for path in corpus.folder.iterdir() if "kept" in path.name]
    assert left == [], "an unfinished output must not look like one"
    assert not list(corpus.folder.glob("seqloss-filter-*"))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        ("1.0\n" * 2999, "backward.txt has losses of 2,999 pairs"),
        ("1.0\n" * 3001, "forward.txt has losses of 3,000 pairs"),
        ("1.0\n" * 10 + "x\n", "backward.txt, line 11: 'x' is no score"),
        ("1.0\n" * 10 + "-1.5\n", "backward.txt, line 11: -1.5 is negative, and no loss"),
    ],
)
def test_wrong_scores_are_refused(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], backward: str, message: str
) -> None:
    corpus.backward.write_text(backward)
    arguments = ("--forward-scores", corpus.forward, "--backward-scores", corpus.backward)
    assert message in run_and_read_error(capsys, corpus, *arguments, "--best", 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [(-1, "has 2,999 pairs, and there are scores for 3,000"), (1, "more than")],
)
def test_scores_of_another_input_are_refused(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], change: int, message: str
) -> None:
    lines = corpus.lines[:-1] if change < 0 else [*corpus.lines, "one\tmore\n"]
    corpus.input.write_text("".join(lines))
    arguments = ("--forward-scores", corpus.forward, "--backward-scores", corpus.backward)
    assert message in run_and_read_error(capsys, corpus, *arguments, "--best", 10)


def test_losses_must_come_from_somewhere(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    message = run_and_read_error(
        capsys, corpus, "--forward-scores", corpus.forward, "--threshold", "0.5"
    )
    assert "where do the backward losses come from?" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rejected", "{folder}/kept.tsv"), "kept.tsv is read or written already"),
        (("--rejected", "{folder}/pairs.tsv"), "pairs.tsv is read or written already"),
        (("--rejected", "{folder}/a", "{folder}/b"), "--rejected has 2 files, and the input has 1"),
        (("--memory-limit", "plenty"), "DuckDB does not start"),
        (("--general-scores", "{folder}/forward.txt"), "come together"),
    ],
)
def test_contradicting_arguments_are_refused(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    arguments = ("--forward-scores", corpus.forward, "--backward-scores", corpus.backward)
    more = tuple(argument.format(folder=corpus.folder) for argument in more)
    assert message in run_and_read_error(capsys, corpus, *arguments, "--best", 10, *more)
    assert corpus.input.read_text() == "".join(corpus.lines)


# ---------------------------------------------------------------- size

_LARGE = 2_000_000
_CLIENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "clients" / "python")}
_RUN_AND_SAY_PEAK = """
import sys
from pathlib import Path
from seqloss_client.cli import main
assert main(sys.argv[1:]) == 0
print(Path("/proc/self/status").read_text())
"""


def test_memory_stays_bounded_while_a_large_file_is_filtered(tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    # Few enough different values for many ties.
    losses = np.round(generator.gamma(1.2, 0.7, _LARGE), 2)
    (tmp_path / "scores.txt").write_text("\n".join(map(str, losses.tolist())) + "\n")
    with (tmp_path / "pairs.tsv").open("w") as file:
        file.writelines(f"{place}\t{'x' * 40}\n" for place in range(_LARGE))
    scores = str(tmp_path / "scores.txt")
    command = [
        *(sys.executable, "-c", _RUN_AND_SAY_PEAK, "filter", "--best", "1234567"),
        *("--input", "pairs.tsv", "--output", "kept.tsv", "--memory-limit", "200MB"),
        *("--forward-scores", scores, "--backward-scores", scores),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True, env=_CLIENT
    )
    peak_bytes = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout).group(1)) * 1024
    with (tmp_path / "kept.tsv").open() as file:
        kept = np.fromiter((int(line.split("\t", 1)[0]) for line in file), np.int64)
    # The score falls with the loss where both directions have the same.
    expected = np.sort(np.lexsort((np.arange(_LARGE), losses))[:1_234_567])
    np.testing.assert_array_equal(kept, expected)
    print(f"\n{_LARGE:,} pairs, at most {peak_bytes / 1e6:.0f} MB")
    assert peak_bytes < 450e6
