"""Before anyone is served: does the budget fit the device, and what do batches cost there?"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np

from seqloss.batching.cost import CostModel
from seqloss.batching.shapes import PaddedShape, shapes_of
from seqloss.bundle.manifest import Manifest
from seqloss.engines.base import Engine
from seqloss.errors import ConfigurationError, OutOfMemoryError
from seqloss.records import Batch, LengthLimits, Ragged, offsets_of

_LOG = logging.getLogger(__name__)

_SHORT, _LONG = 4, 512
# Enough to time a CPU by.
_TIMED_TOKENS = 512


def warm_up(
    engine: Engine,
    manifest: Manifest,
    limits: LengthLimits,
    max_batch_tokens: int,
    max_batch_pairs: int,
) -> tuple[int, CostModel]:
    """Computes batches at the corners of the budget, with all outputs and without.

    Memory, kernels and caches are there afterwards, and the cost model knows the device.  A CPU has
    no memory of its own that could be proven, so there smaller batches do, in a fraction of the
    time; not so where logits are made, which may need gigabytes.

    Args:
        engine: what computes.
        manifest: the model's ids.
        limits: the longest source and target that may come.
        max_batch_tokens: the budget to try; where it does not fit the device, half of it.
        max_batch_pairs: the most targets.

    Returns:
        The padded tokens that fit the device in every shape, and the measured cost.

    Raises:
        ConfigurationError: not even a single short pair fits.
    """
    cost = CostModel(shapes_of(is_packed=engine.info.is_packed))
    tokens = max_batch_tokens
    proves_memory = engine.info.device != "cpu" or engine.info.makes_logits
    while True:
        tried = tokens if proves_memory else min(tokens, _TIMED_TOKENS)
        try:
            for shape in _corners(limits, tried, max_batch_pairs):
                if not engine.info.is_batch_invariant:
                    # The first of a shape pays for what is made once; kernels make nothing.
                    engine.score(_batch_of(shape, manifest, all_terms=True))
                cost.observe(shape, _seconds(engine, _batch_of(shape, manifest, all_terms=False)))
            return tokens, cost
        except OutOfMemoryError:
            pass
        engine.release_memory()
        if tried <= 2 * _SHORT:
            raise ConfigurationError("not even a single short pair fits the device")
        tokens = tried // 2
        _LOG.warning("max_batch_tokens does not fit the device; trying %d", tokens)


def _corners(limits: LengthLimits, tokens: int, max_pairs: int) -> Iterator[PaddedShape]:
    """A short pair alone, many short ones, few long ones, and long sides beside short ones."""
    longest_source = min(limits.max_source_tokens, _LONG, max(1, tokens // 2))
    longest_target = min(limits.max_target_tokens, _LONG, max(1, tokens // 2))
    short_source, short_target = min(_SHORT, longest_source), min(_SHORT, longest_target)
    yield PaddedShape(1, short_source, 1, short_target)
    for source, target in (
        (short_source, short_target),
        (longest_source, short_target),
        (short_source, longest_target),
        (longest_source, longest_target),
    ):
        pairs = max(1, min(max_pairs, tokens // (source + target)))
        yield PaddedShape(pairs, source, pairs, target)


def _batch_of(shape: PaddedShape, manifest: Manifest, *, all_terms: bool) -> Batch:
    vocabulary = manifest.vocabulary
    source_tokens = shape.num_sources * shape.source_length
    target_tokens = shape.num_targets * shape.target_length
    predicted = np.flatnonzero(~vocabulary.excluded)
    return Batch(
        sources=Ragged(
            np.arange(source_tokens, dtype=np.int32) % vocabulary.source,
            offsets_of([shape.source_length] * shape.num_sources),
        ),
        source_row=np.arange(shape.num_targets, dtype=np.int32),
        decoder_input_ids=Ragged(
            np.arange(target_tokens, dtype=np.int32) % vocabulary.target,
            offsets_of([shape.target_length] * shape.num_targets),
        ),
        labels=predicted[np.arange(target_tokens) % len(predicted)].astype(np.int32),
        counted=np.ones(target_tokens, np.bool_),
        with_ranks_and_entropies=all_terms,
    )


def _seconds(engine: Engine, batch: Batch) -> float:
    started = time.perf_counter()
    engine.score(batch)
    return time.perf_counter() - started
