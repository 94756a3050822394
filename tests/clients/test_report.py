"""`seqloss-client report`: a page that is right, readable, and asks for nothing else."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from seqloss_client.cli import main
from seqloss_client.report.counting import Density, Distribution, Extremes

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")


def losses(seed: int, size: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.gamma(1.5, 0.8, size)
    values[generator.random(size) < 0.01] = np.nan
    return values


class Page(HTMLParser):
    """What tests ask of a page: its elements, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# ---------------------------------------------------------------- counting


def test_a_distribution_knows_what_passed_by() -> None:
    values = losses(seed=1, size=10_000)
    distribution = Distribution()
    for part in np.array_split(values, 7):
        distribution.add(part)
    scored = sorted(value for value in values.tolist() if not math.isnan(value))
    assert distribution.num_scored == len(scored)
    assert distribution.num_missing == 10_000 - len(scored)
    assert distribution.mean == pytest.approx(mean(scored))
    assert (distribution.smallest, distribution.largest) == (scored[0], scored[-1])
    for share in (0.01, 0.5, 0.99):
        exact = scored[math.ceil(share * len(scored)) - 1]
        assert exact <= distribution.quantile(share) <= exact + 0.001


def test_bars_and_what_is_above_are_all_pairs() -> None:
    values = losses(seed=2, size=5000)
    distribution = Distribution()
    distribution.add(values)
    counts, edges, num_above = distribution.bars(limit=2.0, num_bars=30)
    assert len(counts) <= 30
    expected, _ = np.histogram(values[~np.isnan(values)], bins=edges)
    # A loss may stand on an edge and be put to either side by the rounding of the edges.
    assert np.abs(counts - expected).max() <= 1
    assert counts.sum() + num_above == distribution.num_scored


def test_a_distribution_of_nothing_has_no_numbers() -> None:
    distribution = Distribution()
    distribution.add(np.array([np.nan, np.nan]))
    assert (distribution.num_scored, distribution.num_missing) == (0, 2)
    assert math.isnan(distribution.mean)
    assert math.isnan(distribution.quantile(0.5))


def test_losses_above_all_bins_are_counted() -> None:
    distribution, density = Distribution(), Density()
    distribution.add(np.array([1e9, 0.5]))
    density.add(np.array([1e9, 0.5]), np.array([0.5, np.nan]))
    assert distribution.num_scored == 2
    assert distribution.quantile(1.0) > 99
    assert density.counts.sum() == 1


def test_a_density_counts_pairs_of_losses() -> None:
    first, second = losses(seed=3, size=4000), losses(seed=4, size=4000)
    density = Density()
    for part in range(4):
        density.add(first[part::4], second[part::4])
    counts, limit, num_outside = density.cells(limit=2.0, num_cells=20)
    both = ~(np.isnan(first) | np.isnan(second))
    edges = np.linspace(0, limit, len(counts) + 1)
    expected, _, _ = np.histogram2d(first[both], second[both], bins=(edges, edges))
    assert np.abs(counts - expected).max() <= 1
    assert counts.sum() + num_outside == both.sum()


def test_extremes_are_those_of_a_full_sort_with_ties_by_place() -> None:
    scores = np.round(losses(seed=5, size=3000), 1)
    extremes = Extremes(25)
    for start in range(0, 3000, 700):
        part = scores[start : start + 700]
        extremes.add(start, part, part + 1)
    scored = [
        (score, place) for place, score in enumerate(scores.tolist()) if not math.isnan(score)
    ]
    best = sorted(scored, key=lambda item: (-item[0], item[1]))[:25]
    worst = sorted(scored)[:25]
    assert list(extremes.best.items()) == [(place, (score, score + 1)) for score, place in best]
    assert list(extremes.worst.items()) == [(place, (score, score + 1)) for score, place in worst]


# ---------------------------------------------------------------- the page

HOSTILE = '<script>alert("x")</script> & "quotes" \u202e \u0627\u0644'


@pytest.fixture
def html(tmp_path: Path) -> str:
    """A page about pairs of which the worst is hostile."""
    forward, backward = losses(seed=6, size=2000), losses(seed=7, size=2000)
    forward[123], backward[123] = 40.0, 0.1
    rows = [f"source {place}\ttarget {place}\n" for place in range(2000)]
    rows[123] = f"{HOSTILE}\t{'x' * 3000}\n"
    (tmp_path / "pairs.tsv").write_text("".join(rows))
    for name, column in (("forward", forward), ("backward", backward)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{loss}\n" for loss in column.tolist()))
    status = main(
        [
            *("report", "--input", str(tmp_path / "pairs.tsv"), "--examples", "15"),
            *("--forward-scores", str(tmp_path / "forward.txt")),
            *("--backward-scores", str(tmp_path / "backward.txt")),
            *("--title", "Pairs & losses", "--output", str(tmp_path / "report.html")),
        ]
    )
    assert status == 0
    return (tmp_path / "report.html").read_text()


def test_the_page_asks_for_nothing_and_runs_nothing(html: str) -> None:
    page = Page(html)
    assert page.open == [], "every element is closed"
    policy = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_text_of_the_corpus_is_shown_as_it_is(html: str) -> None:
    text = Page(html).text
    assert HOSTILE in text
    assert "x" * 3000 in text
    assert "Pairs & losses" in text


def test_pictures_have_words_and_headings_have_an_order(html: str) -> None:
    page = Page(html)
    pictures = page.all("img")
    assert len(pictures) == 3
    assert all(len(picture["alt"] or "") > 50 for picture in pictures)
    for picture in pictures:
        assert base64.b64decode((picture["src"] or "").split(",")[1]).startswith(b"\x89PNG")
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings == ["h1", *["h2"] * 6]
    assert [attributes["lang"] for attributes in page.all("html")] == ["en"]
    assert all("scope" in heading for heading in page.all("th"))


def test_the_worst_pair_comes_first_with_its_line_and_losses(html: str) -> None:
    table = html.partition("<h2>Worst pairs</h2>")[2].partition("</table>")[0]
    first = Page(table.partition("<tbody>")[2].partition("</tr>")[0]).text.strip()
    score = math.exp(-(40.0 - 0.1) - (40.0 + 0.1) / 2)
    assert first.startswith(f"124{score:.3g}40.0000.100{HOSTILE}")
    assert table.count('<tr><th scope="row"') == 15


def test_one_direction_needs_no_second(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": 1}\n')
    (tmp_path / "scores.jsonl").write_text(
        '{"nll": 6.0, "num_tokens": 3}\n{"nll": null, "num_tokens": 0}\n'
    )
    files = ("--input", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "report.html"))
    assert main(["report", *files, "--forward-scores", str(tmp_path / "scores.jsonl")]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.all("img")) == 1
    assert "Backward" not in page.text


def test_scores_of_another_input_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.tsv").write_text("a\tb\nc\td\n")
    (tmp_path / "scores.txt").write_text("1.0\n" * 3)
    files = ("--input", str(tmp_path / "pairs.tsv"), "--output", str(tmp_path / "report.html"))
    assert main(["report", *files, "--forward-scores", str(tmp_path / "scores.txt")]) == 1
    assert "the input has 2 pairs, and there are losses for 3" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_page_never_takes_the_corpus_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.tsv").write_text("a\tb\n")
    (tmp_path / "scores.txt").write_text("1.0\n")
    files = ("--input", str(tmp_path / "pairs.tsv"), "--output", str(tmp_path / "pairs.tsv"))
    assert main(["report", *files, "--forward-scores", str(tmp_path / "scores.txt")]) == 1
    assert "pairs.tsv is the input" in capsys.readouterr().err
    assert (tmp_path / "pairs.tsv").read_text() == "a\tb\n"
