"""What a batch costs, learned from batches; expectations come from the formula, written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloss.batching.cost import CostModel
from seqloss.batching.shapes import PaddedShape

# Seconds as on a small GPU, on two cores, and on a device on which only tokens of targets count.
DEVICES = {
    "gpu": (4e-3, 2e-7, 6e-7, 1e-10),
    "cpu": (1e-3, 5e-5, 9e-5, 1e-8),
    "head": (0.0, 0.0, 1e-5, 0.0),
}
shapes = st.builds(
    PaddedShape, st.integers(1, 500), st.integers(1, 500), st.integers(1, 500), st.integers(1, 500)
)


def seconds_of(device: tuple[float, ...], shape: PaddedShape) -> float:
    fixed, encoder, decoder, attention = device
    sources, targets = shape.num_sources, shape.num_targets
    s, t = shape.source_length, shape.target_length
    attended = sources * s * s + targets * t * (s + t)
    return fixed + encoder * sources * s + decoder * targets * t + attention * attended


def random_shapes(count: int, seed: int = 7) -> list[PaddedShape]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        targets = int(random.integers(1, 200))
        found.append(
            PaddedShape(
                int(random.integers(1, targets + 1)),
                int(random.integers(4, 300)),
                targets,
                int(random.integers(4, 300)),
            )
        )
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_noisy_batches_tell_what_the_device_costs(device: str) -> None:
    cost, random = CostModel(), np.random.default_rng(1)
    for shape in random_shapes(400):
        cost.observe(shape, seconds_of(DEVICES[device], shape) * random.normal(1, 0.05))
    for shape in random_shapes(50, seed=8):
        assert cost.seconds(shape) == pytest.approx(seconds_of(DEVICES[device], shape), rel=0.1)


def test_exact_batches_give_the_exact_coefficients() -> None:
    cost = CostModel()
    for shape in random_shapes(100):
        cost.observe(shape, seconds_of(DEVICES["cpu"], shape))
    np.testing.assert_allclose(cost.numbers, DEVICES["cpu"], rtol=1e-2)


@given(st.lists(st.tuples(shapes, st.floats(1e-6, 100)), min_size=1, max_size=30))
def test_no_coefficient_is_ever_negative(batches: list[tuple[PaddedShape, float]]) -> None:
    cost = CostModel()
    for shape, seconds in batches:
        cost.observe(shape, seconds)
        assert all(0 <= number < float("inf") for number in cost.numbers)
        assert any(cost.numbers)
        assert 0.1 <= cost.target_weight <= 100


def test_a_device_that_became_slower_is_learned_and_the_past_forgotten() -> None:
    cost, slow = CostModel(), tuple(3 * number for number in DEVICES["cpu"])
    for shape in random_shapes(500):
        cost.observe(shape, seconds_of(DEVICES["cpu"], shape))
    for shape in random_shapes(300, seed=9):
        cost.observe(shape, seconds_of(slow, shape))
    for shape in random_shapes(20, seed=10):
        assert cost.seconds(shape) == pytest.approx(seconds_of(slow, shape), rel=0.05)


def test_one_batch_is_enough_to_know_what_such_batches_take() -> None:
    cost, shape = CostModel(), PaddedShape(8, 20, 16, 30)
    assert not cost.is_measured
    cost.observe(shape, 0.25)
    assert cost.is_measured
    assert cost.seconds(shape) == pytest.approx(0.25, rel=0.01)


def test_before_a_measurement_targets_are_dearer_than_sources_and_more_is_never_cheaper() -> None:
    cost = CostModel()
    assert cost.target_weight == pytest.approx(2)
    assert cost.seconds(PaddedShape(1, 100, 1, 10)) < cost.seconds(PaddedShape(1, 10, 1, 100))
    assert cost.seconds(PaddedShape(1, 10, 2, 10)) < 2 * cost.seconds(PaddedShape(1, 10, 1, 10))


@given(shapes, shapes)
def test_many_shapes_are_priced_at_once(first: PaddedShape, second: PaddedShape) -> None:
    cost = CostModel()
    cost.observe(first, 0.5)
    both = PaddedShape(
        *(
            np.array([getattr(first, name), getattr(second, name)])
            for name in ("num_sources", "source_length", "num_targets", "target_length")
        )
    )
    np.testing.assert_allclose(cost.seconds(both), [cost.seconds(first), cost.seconds(second)])
    assert both.tokens.tolist() == [first.tokens, second.tokens]
    assert (both.at(0), both.at(1)) == (first, second)
