"""Does this device compute the numbers that the bundle states?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seqloss.bundle.manifest import Graph, Manifest, SelfTest
from seqloss.engines.base import Engine
from seqloss.errors import EngineDeadError, SelfTestError
from seqloss.records import Batch, Float64Array, Ragged, shift_right


def self_test_errors(engine: Engine, manifest: Manifest) -> Float64Array:
    """Absolute differences of token nlls, in nats: all pairs in one batch, then each one alone.

    Both graphs are run. Shape: (tokens of all these,), float64; NaN where a nll is not finite.
    """
    test = manifest.self_test
    everything = range(len(test.target_ids))
    groups = [everything, *([index] for index in everything)]
    return np.concatenate(
        [
            np.abs(_nlls(engine, test, group, manifest.special_ids.decoder_start, both) - expected)
            for group in groups
            for both in (False, True)
            for expected in [np.concatenate([test.token_nlls[index] for index in group])]
        ]
    )


def require_self_test(engine: Engine, manifest: Manifest, graph: Graph) -> float:
    """Has the engine compute the bundle's own pairs, and the last id of each vocabulary.

    Raises:
        SelfTestError: the largest error is beyond the graph's tolerance, or the model has fewer ids
            than the manifest says.

    Returns:
        The largest error, in nats.
    """
    _require_all_ids(engine, manifest)
    largest = float(self_test_errors(engine, manifest).max())
    if not largest <= graph.tolerance:  # NaN is no number that can be trusted either
        raise SelfTestError(
            f"{engine.info.engine} on {engine.info.device} in {engine.info.precision} is off by "
            f"{largest:.3g} nats on the bundle's self-test, and {graph.tolerance:.3g} is allowed: "
            "its losses would be wrong, so it does not serve"
        )
    return largest


def _nlls(
    engine: Engine, test: SelfTest, group: Sequence[int], start: int, all_terms: bool
) -> Float64Array:
    targets = Ragged.from_rows([test.target_ids[index] for index in group], np.int32)
    sources, source_row = np.unique(
        np.array([test.source_index[index] for index in group]), return_inverse=True
    )
    batch = Batch(
        sources=Ragged.from_rows([test.source_ids[index] for index in sources], np.int32),
        source_row=source_row.astype(np.int32),
        decoder_input_ids=shift_right(targets, np.full(len(targets), start)),
        labels=targets.values,
        counted=np.ones(len(targets.values), np.bool_),
        with_ranks_and_entropies=all_terms,
    )
    return -engine.score(batch).target_logprob.astype(np.float64)


def _require_all_ids(engine: Engine, manifest: Manifest) -> None:
    """An id that the manifest promises and an embedding has not would fail a request later.

    On a GPU it would take the whole process with it; so it does it here, before anyone is served.
    """
    vocabulary = manifest.vocabulary
    last = Ragged.from_rows([[vocabulary.target - 1]], np.int32)
    predicted = np.flatnonzero(~vocabulary.excluded)[-1:].astype(np.int32)
    try:
        engine.score(
            Batch(
                sources=Ragged.from_rows([[vocabulary.source - 1]], np.int32),
                source_row=np.zeros(1, np.int32),
                decoder_input_ids=last,
                labels=predicted,
                counted=np.ones(1, np.bool_),
            )
        )
    except (IndexError, RuntimeError, EngineDeadError) as error:
        raise SelfTestError(
            f"the model has not all ids that the manifest promises ({vocabulary.source} for "
            f"sources, {vocabulary.target} for targets): {error}"
        ) from error
