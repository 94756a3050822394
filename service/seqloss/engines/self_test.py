"""Does this device compute the numbers that the bundle states?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seqloss.bundle.manifest import Graph, Manifest
from seqloss.engines.base import Engine
from seqloss.errors import OutOfMemoryError, SelfTestError
from seqloss.records import Batch, Float64Array, Ragged, shift_right

# Beyond this a pair costs more memory than a test may.
_MAX_PROBE_TOKENS = 1024


def self_test_errors(engine: Engine, manifest: Manifest) -> Float64Array:
    """Absolute differences of token nlls, in nats: all pairs in one batch, then each one alone.

    All are scored without and with ranks and entropies, and every other one alone is with them.
    Shape: (tokens of all these,), float64; NaN where a nll is not finite.
    """
    test = manifest.self_test
    start = manifest.special_ids.decoder_start
    sources = [test.source_ids[index] for index in test.source_index]
    whole = slice(None)
    alone = [(slice(index, index + 1), index % 2 == 1) for index in range(len(sources))]
    return np.concatenate(
        [
            np.abs(nlls - np.concatenate(test.token_nlls[group]))
            for group, all_terms in ((whole, False), (whole, True), *alone)
            for nlls in [
                token_nlls(
                    engine, sources[group], test.target_ids[group], start, all_terms=all_terms
                )
            ]
        ]
    )


def token_nlls(
    engine: Engine,
    sources: Sequence[list[int]],
    targets: Sequence[list[int]],
    decoder_start: int,
    *,
    all_terms: bool = False,
) -> Float64Array:
    """Nlls of pairs that are scored in one batch, equal sources encoded once.

    Args:
        engine: what scores them.
        sources: of each pair.
        targets: of each pair; all of their tokens count.
        decoder_start: what the decoder is fed first.
        all_terms: whether the graph with ranks and entropies computes them.

    Returns:
        Of all targets' tokens, in order. Shape: (tokens,), float64.
    """
    row_of = {tuple(source): row for row, source in enumerate(dict.fromkeys(map(tuple, sources)))}
    flat = Ragged.from_rows(targets, np.int32)
    batch = Batch(
        sources=Ragged.from_rows(list(row_of), np.int32),
        source_row=np.array([row_of[tuple(source)] for source in sources], np.int32),
        decoder_input_ids=shift_right(flat, np.full(len(flat), decoder_start)),
        labels=flat.values,
        counted=np.ones(len(flat.values), np.bool_),
        with_ranks_and_entropies=all_terms,
    )
    return -engine.score(batch).target_logprob.astype(np.float64)


def require_self_test(engine: Engine, manifest: Manifest, graph: Graph) -> float:
    """Has the engine compute the bundle's own pairs, and the last id of each vocabulary.

    Raises:
        SelfTestError: the largest error is beyond the graph's tolerance, the graph cannot be
            computed, or the model has fewer ids than the manifest says.

    Returns:
        The largest error, in nats.
    """
    require_limits(engine, manifest)
    try:
        errors = self_test_errors(engine, manifest)
    except OutOfMemoryError:
        raise
    # Whatever an engine says to a graph that it cannot compute.
    except Exception as error:
        raise SelfTestError(f"the bundle's self-test cannot be computed: {error}") from error
    largest, mean = float(errors.max()), float(errors.mean())
    # NaN is no number that can be trusted either
    if not (largest <= graph.tolerance and mean <= graph.mean_tolerance):
        raise SelfTestError(
            f"{engine.info.engine} on {engine.info.device} in {engine.info.precision} is off by "
            f"{largest:.3g} nats per token on the bundle's self-test, {mean:.3g} on average, and "
            f"{graph.tolerance:.3g} and {graph.mean_tolerance:.3g} are allowed: its losses would "
            "be wrong, so it does not serve"
        )
    return largest


def require_limits(engine: Engine, manifest: Manifest) -> None:
    """Has the engine compute the last id of each vocabulary, and a pair as long as may be.

    An id that the manifest promises and an embedding has not would fail a request later, and so
    would a position.  On a GPU it would take the whole process with it; so it does it here, before
    anyone is served.

    Raises:
        SelfTestError: the model has fewer ids or positions than the manifest says.
    """
    vocabulary = manifest.vocabulary
    longest_source = min(manifest.max_source_tokens or 1, _MAX_PROBE_TOKENS)
    longest_target = min(manifest.max_target_tokens or 1, _MAX_PROBE_TOKENS)
    predicted = np.flatnonzero(~vocabulary.excluded)[-1]
    try:
        engine.score(
            Batch(
                sources=Ragged.from_rows([[vocabulary.source - 1] * longest_source], np.int32),
                source_row=np.zeros(1, np.int32),
                decoder_input_ids=Ragged.from_rows(
                    [[vocabulary.target - 1] * longest_target], np.int32
                ),
                labels=np.full(longest_target, predicted, np.int32),
                # One is enough: the output projection has no positions, and costs most.
                counted=np.arange(longest_target) == longest_target - 1,
            )
        )
    except OutOfMemoryError:
        raise
    # Whatever an engine says to an id or a position that its model does not have.
    except Exception as error:
        raise SelfTestError(
            f"the model has not all ids or positions that the manifest promises (ids: "
            f"{vocabulary.source} for sources, {vocabulary.target} for targets; positions: "
            f"{longest_source} and {longest_target}): {error}"
        ) from error
