"""What a device is asked before anyone is served, and what is made of its answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fakes import VOCABULARY_SIZE, FakeEngine, fake_manifest, padded_tokens
from seqloss.batching.warm_up import warm_up
from seqloss.bundle.manifest import Vocabulary
from seqloss.errors import ConfigurationError, EngineDeadError, OutOfMemoryError
from seqloss.records import Batch, LengthLimits

LIMITS = LengthLimits(12, 10)


def refusing_above(most_tokens: int) -> Callable[[Batch], None]:
    def refuse(batch: Batch) -> None:
        if padded_tokens(batch) > most_tokens:
            raise OutOfMemoryError("too many tokens")

    return refuse


def test_a_budget_that_fits_is_kept_and_the_device_is_measured() -> None:
    engine = FakeEngine()
    tokens, cost = warm_up(engine, fake_manifest(), LIMITS, 200, 64)
    assert tokens == 200
    assert cost.is_measured
    assert engine.memory_releases == 0


def test_batches_go_to_the_corners_of_the_budget_with_all_outputs_and_without() -> None:
    engine = FakeEngine()
    warm_up(engine, fake_manifest(), LIMITS, 480, 64)
    shapes = {
        (
            len(batch.sources),
            int(batch.sources.lengths.max()),
            len(batch.decoder_input_ids),
            int(batch.decoder_input_ids.lengths.max()),
            batch.with_ranks_and_entropies,
        )
        for batch in engine.batches
    }
    corners = {(1, 4, 1, 4), (60, 4, 60, 4), (30, 12, 30, 4), (34, 4, 34, 10), (21, 12, 21, 10)}
    assert shapes == {(*corner, extra) for corner in corners for extra in (False, True)}


def test_kernels_make_nothing_for_a_shape_and_are_timed_at_once() -> None:
    engine = FakeEngine(is_batch_invariant=True)
    _, cost = warm_up(engine, fake_manifest(), LIMITS, 480, 64)
    assert len(engine.batches) == 5
    assert not any(batch.with_ranks_and_entropies for batch in engine.batches)
    assert cost.is_measured


@pytest.mark.parametrize(("tokens", "pairs"), [(1, 1), (7, 100), (200, 3), (5000, 512)])
def test_no_batch_of_more_than_a_pair_is_over_the_caps(tokens: int, pairs: int) -> None:
    engine = FakeEngine()
    warm_up(engine, fake_manifest(), LIMITS, tokens, pairs)
    for batch in engine.batches:
        assert len(batch.decoder_input_ids) <= pairs
        assert len(batch.decoder_input_ids) == 1 or padded_tokens(batch) <= tokens


def test_long_limits_are_not_warmed_up_with_batches_of_one_endless_pair() -> None:
    engine = FakeEngine(device="cuda:0")
    warm_up(engine, fake_manifest(), LengthLimits(10**6, 10**6), 3000, 64)
    assert max(int(batch.sources.lengths.max()) for batch in engine.batches) == 512
    assert max(int(batch.decoder_input_ids.lengths.max()) for batch in engine.batches) == 512


def test_memory_is_proven_where_it_is_the_device_s_own_or_logits_are_made() -> None:
    on_cpu, with_logits = FakeEngine(), FakeEngine(makes_logits=True)
    on_gpu = FakeEngine(device="cuda:0")
    for engine in (on_cpu, with_logits, on_gpu):
        tokens, _ = warm_up(engine, fake_manifest(), LIMITS, 5000, 10**6)
        assert tokens == 5000
    assert max(padded_tokens(batch) for batch in on_cpu.batches) <= 512
    for engine in (with_logits, on_gpu):
        assert max(padded_tokens(batch) for batch in engine.batches) > 4900


def test_ids_are_the_model_s_and_no_label_is_excluded_from_the_softmax() -> None:
    vocabulary = Vocabulary(
        source=30, target=VOCABULARY_SIZE, classes=VOCABULARY_SIZE, excluded_classes=[(0, 20)]
    )
    engine = FakeEngine()
    warm_up(engine, fake_manifest(vocabulary=vocabulary), LIMITS, 400, 64)
    for batch in engine.batches:
        assert 0 <= batch.sources.values.min() <= batch.sources.values.max() < 30
        assert batch.decoder_input_ids.values.max() < VOCABULARY_SIZE
        assert not vocabulary.excluded[batch.labels].any()
        assert batch.sources.values.dtype == batch.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("memory", "expected"), [(10**6, 1600), (1599, 800), (1200, 800), (110, 100), (25, 25)]
)
def test_the_budget_is_halved_until_every_corner_fits(memory: int, expected: int) -> None:
    engine = FakeEngine(refusing_above(memory), device="cuda:0")
    tokens, _ = warm_up(engine, fake_manifest(), LIMITS, 1600, 10**6)
    assert tokens == expected
    num_halvings = (1600 // expected).bit_length() - 1
    assert engine.memory_releases == num_halvings, "what the batch that failed left is given back"


def test_a_device_that_does_not_hold_a_single_short_pair_is_refused() -> None:
    engine = FakeEngine(refusing_above(5))
    with pytest.raises(ConfigurationError, match="not even a single short pair"):
        warm_up(engine, fake_manifest(), LIMITS, 1600, 64)


def test_an_engine_that_dies_is_not_asked_again() -> None:
    def die(_: Batch) -> None:
        raise EngineDeadError("a sticky error")

    engine = FakeEngine(die)
    with pytest.raises(EngineDeadError):
        warm_up(engine, fake_manifest(), LIMITS, 1600, 64)
    assert len(engine.batches) == 1
