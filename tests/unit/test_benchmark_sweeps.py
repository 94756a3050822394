"""What sweeps measure, and what is computed and drawn from that."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

# What makes the models needs all of them, and the pictures one more.
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks.models import MODELS
from benchmarks.operations import Shape
from benchmarks.pairs import Pairs
from benchmarks.plots import BLUE, GREY, write_limits
from benchmarks.results import Summary as VariantSummary
from benchmarks.serving.clients import IdLimits
from benchmarks.sweeps import report
from benchmarks.sweeps.catalogue import SWEEPS, Point, Size, Sweep, model_named, parts
from benchmarks.sweeps.plots import write_sweep
from benchmarks.sweeps.results import PointResult, SweepResult
from benchmarks.sweeps.task import Memory, Work

SIZE = Size("tiny", tokens=2048, most_pairs=10_000)
LIMITS = IdLimits(vocabulary=997, max_tokens=512)


def tokens(rows: list[list[int]]) -> int:
    return sum(map(len, rows))


def entry(value: int, precision: str, work: Work | None, seconds: list[float]) -> PointResult:
    return PointResult(Point(value, "tiny", num_targets=1), precision, work, seconds)


def work(held: int | None = 700_000_000, peak: int | None = 725_000_000) -> Work:
    return Work(1000, 500, operations=6_000_000_000, memory=Memory(held, peak))


def result(*entries: PointResult, counts_sources: bool = False) -> SweepResult:
    """Three rounds in which the machine's best rate was 2, 4 and 8 GFLOP/s."""
    sweep = Sweep(
        name="batch-tokens",
        axis="max_batch_tokens",
        about="about",
        points=tuple(one.point for one in entries),
        counts_sources=counts_sources,
    )
    rates = [{"float32": 1e9, "bfloat16": rate} for rate in (2e9, 4e9, 8e9)]
    return SweepResult(sweep, list(entries), rates)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("pairs", [100, 1000, 10_000]),
        ("lengths", [8, 16, 32, 64, 128, 256, 512]),
        ("vocabulary", [32_768, 65_536, 131_072, 262_144]),
        ("candidates", [1, 2, 4, 8, 16, 32, 64]),
        ("batch-tokens", [128, 256, 512, 1024, 2048, 4096, 8192]),
    ],
)
def test_sweeps_have_these_points_and_say_what_they_are(name: str, values: list[int]) -> None:
    sweep = SWEEPS[name](SIZE)
    assert sweep.name == name
    assert [point.value for point in sweep.points] == values
    assert len(sweep.about) > 80


def test_all_lengths_have_the_same_number_of_tokens() -> None:
    for point in SWEEPS["lengths"](SIZE).points:
        pairs = point.pairs(LIMITS)
        assert set(pairs.source_lengths) == set(pairs.target_lengths) == {point.value}
        assert tokens(pairs.source_ids) == tokens(pairs.target_ids) == 2048


def test_candidates_share_sources_and_stay_the_same_in_number() -> None:
    for point in SWEEPS["candidates"](SIZE).points:
        pairs = point.pairs(LIMITS)
        assert len(pairs.target_ids) == 64
        assert len(pairs.source_ids) * point.value == 64


def test_batch_sizes_are_tried_on_the_same_pairs_of_some_four_times_the_tokens() -> None:
    points = SWEEPS["batch-tokens"](SIZE).points
    assert {point.value for point in points} == {point.max_batch_tokens for point in points}
    first, *others = (point.pairs(LIMITS) for point in points)
    assert all(pairs == first for pairs in others)
    assert first.num_tokens == pytest.approx(4 * 2 * 2048, rel=0.05)


def test_vocabularies_belong_to_models_that_differ_in_nothing_else() -> None:
    shapes = set()
    for point in SWEEPS["vocabulary"](SIZE).points:
        settings = model_named(point.model).settings
        assert settings["vocab_size"] == point.value
        shapes.add((settings["d_model"], settings["encoder_layers"], settings["encoder_ffn_dim"]))
    assert len(shapes) == 1


def test_lengths_beyond_the_model_are_left_out() -> None:
    assert "max_position_embeddings" not in MODELS["t5-base"].settings
    t5 = SWEEPS["lengths"](Size("t5-base", tokens=2048, most_pairs=100))
    assert t5.points[-1].value == 512


def test_requests_keep_a_source_and_its_targets_together() -> None:
    pairs = Pairs([[0], [1], [2]], [[0], [0], [1], [1], [2], [2]])
    assert [part.target_ids for part in parts(pairs, num_candidates=2, most_targets=5)] == [
        [[0], [0], [1], [1]],
        [[2], [2]],
    ]
    # More targets than a request may have are not taken apart.
    assert [part.source_ids for part in parts(pairs, 2, most_targets=1)] == [[[0]], [[1]], [[2]]]


def test_operations_count_a_source_once_for_all_its_targets() -> None:
    """With all sizes 1 and no feed-forward layer, as multiply-adds.

    Encoder, S = 2: 2 * 4 + 2 * 4 = 16.  A target of T = 3: 46, and the head 3.
    """
    shape = Shape(vocabulary=1, width=1, encoder_layers=1, decoder_layers=1, ffn_width=0)
    pairs = Pairs([[1, 1]] * 2, [[1, 1, 1]] * 6)
    point = Point(3, "tiny", num_targets=6, num_candidates=3)
    assert point.operations(shape, pairs) == 2 * (2 * 16 + 6 * (46 + 3))


def test_gates_and_narrow_heads_are_counted() -> None:
    """D = 5, A = 3, F = 7 with three matrices: 1 token takes 4 DA + 3 DF = 60 + 105, and 2 A."""
    shape = Shape(
        vocabulary=0,
        width=5,
        encoder_layers=1,
        decoder_layers=0,
        ffn_width=7,
        heads_width=3,
        ffn_matrices=3,
    )
    assert Point(1, "tiny", 0).operations(shape, Pairs([[1]], [])) == 2 * (165 + 6)


def test_cost_limit_and_memory_are_those_of_the_median_round() -> None:
    """500 target tokens in 1, 2 and 6 s: 2,000, 4,000 and 12,000 µs each.

    6 Gop at 2, 4 and 8 GFLOP/s would take 3, 1.5 and 0.75 s: shares of 3, 0.75 and 0.125.
    """
    (summary,) = result(entry(128, "bfloat16", work(), [1.0, 2.0, 6.0])).summaries()
    assert summary.cost_micros == pytest.approx(4000)
    assert summary.least_cost_micros == pytest.approx(2000)
    assert summary.largest_cost_micros == pytest.approx(12_000)
    assert summary.limit_share == pytest.approx(0.75)
    assert (summary.peak_bytes, summary.growth_bytes) == (725_000_000, 25_000_000)


def test_the_cost_is_of_tokens_on_both_sides_where_both_change() -> None:
    measured = result(entry(8, "bfloat16", work(), [3.0, 3.0, 3.0]), counts_sources=True)
    (summary,) = measured.summaries()
    assert summary.cost_micros == pytest.approx(3e6 / 1500)
    assert measured.unit == "µs per source or target token"


def test_points_that_failed_are_left_out_with_their_reason() -> None:
    failed = entry(256, "float32", None, [])
    failed.failure = "OutOfMemoryError: too large"
    measured = result(entry(128, "float32", work(None, None), [1.0] * 3), failed)
    assert [summary.value for summary in measured.summaries()] == [128]
    assert measured.summaries()[0].growth_bytes is None
    assert report.notes(measured)[-1] == ("Left out: 256 in float32, OutOfMemoryError: too large")


def test_a_picture_of_a_sweep_has_a_panel_for_each_quantity_and_a_line_for_each_precision(
    tmp_path: Path,
) -> None:
    measured = result(
        *(
            entry(value, precision, work(), [value / 100] * 3)
            for precision in ("bfloat16", "float32")
            for value in (128, 4096)
        )
    )
    path = tmp_path / "sweep.svg"
    write_sweep(path, measured)
    first = path.read_text()
    assert first.count('id="axes_') == 3
    # Each line has a marker on both of its points, and one in the legend of the first panel.
    assert [first.count(f"fill: {colour}; stroke: {colour}") for colour in (BLUE, GREY)] == [7, 7]
    assert "<dc:date>" not in first
    write_sweep(path, measured)
    assert path.read_text() == first


def test_a_picture_can_lack_memory(tmp_path: Path) -> None:
    """As where the system does not count it."""
    path = tmp_path / "sweep.svg"
    write_sweep(path, result(entry(128, "float32", work(None, None), [1.0] * 3)))
    assert path.read_text().count('id="axes_') == 3


def test_a_picture_of_the_limits_has_a_bar_for_each_variant(tmp_path: Path) -> None:
    def summary(name: str, share: float) -> VariantSummary:
        return VariantSummary(name, 1, 1, 1, 1, 1, share, None, None, None)

    names = {"seqloss bfloat16": 0.5, "CTranslate2 int8": 0.4, "seqloss float32": math.pi / 10}
    path = tmp_path / "limits.svg"
    write_limits(path, [summary(name, share) for name, share in names.items()])
    text = path.read_text()
    # Ours in another colour than theirs, one of each for the bars.
    assert (text.count(f"fill: {BLUE}"), text.count(f"fill: {GREY}")) == (2, 1)
