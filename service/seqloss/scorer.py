"""The way of a request through one model: checked, queued, scored, reduced, counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, TypeVarTuple

import numpy as np

from seqloss.batching.jobs import BatchTimes, Outcome
from seqloss.batching.loop import Batcher
from seqloss.bundle.manifest import Manifest
from seqloss.checking.check import Checked, check
from seqloss.errors import (
    Fault,
    InvalidRequestError,
    NonFiniteError,
    PairTooLargeError,
    RequestTooLargeError,
)
from seqloss.loss.reduce import LabelSmoothing, reduce_terms
from seqloss.metrics import ModelMetrics
from seqloss.records import Int64Array, LengthLimits, Priority, RequestArrays, Scores
from seqloss.tenants import Tenant

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")

# Checking and reducing take some 20 ns a token or row: at most a millisecond on the event loop.
_ON_LOOP_SIZE = 50_000


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What a request chooses beside its pairs."""

    smoothing: LabelSmoothing = LabelSmoothing()
    with_ranks_and_entropies: bool = False
    on_error: Literal["fail", "partial"] = "fail"
    priority: Priority = "interactive"
    seconds_left: float | None = None
    stream: str = "other"
    reproducible: bool = False
    tenant: Tenant = Tenant()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost."""

    source_tokens: int
    target_tokens: int
    encoded_sources: int
    batches: int
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True, slots=True)
class Times:
    """When what happened to a request, in seconds of the monotonic clock.

    Attributes:
        admitted: it was checked, and its pairs began to wait.
        batches: each that held pairs of it.
        reduced: its scores were there.
    """

    admitted: float
    batches: list[BatchTimes]
    reduced: float


@dataclass(frozen=True, slots=True)
class ScoredRequest:
    """The answer to a request: scores, and why some targets have none."""

    scores: Scores
    faults: tuple[Fault, ...]
    cut_source_tokens: Int64Array
    cut_target_tokens: Int64Array
    usage: Usage
    times: Times


class Scorer:
    """One model's queue, and what is done with a request before and after it."""

    def __init__(
        self,
        manifest: Manifest,
        limits: LengthLimits,
        max_pairs: int,
        batcher: Batcher,
        metrics: ModelMetrics,
    ) -> None:
        """Takes requests at once.

        Args:
            manifest: of the model's bundle.
            limits: of lengths.
            max_pairs: of a request.
            batcher: where pairs wait.
            metrics: what is reported to.
        """
        self._manifest = manifest
        self._limits = limits
        self._max_pairs = max_pairs
        self._batcher = batcher
        self._metrics = metrics

    async def score(self, request: RequestArrays, options: ScoreOptions) -> ScoredRequest:
        """Checks, queues, scores and reduces.

        Raises:
            RequestTooLargeError, InvalidRequestError, PairTooLargeError: the request's fault.
            NotReadyError, OverloadedError, DeadlineExceededError, NonFiniteError,
            EngineDeadError: the service's.
        """
        self._refuse_too_many(request)
        started = time.monotonic()
        is_large = _size(request) > _ON_LOOP_SIZE
        checked = await _off_loop_if(is_large, check, request, self._manifest, self._limits)
        if checked.faults and options.on_error == "fail":
            self._count(options, checked.faults, 0)
            raise InvalidRequestError(
                f"{len(checked.faults)} of {len(request.target_ids)} pairs cannot be scored; ask "
                'for "on_error": "partial" to have the others',
                checked.faults,
            )
        spent = time.monotonic() - started
        outcome = await self._computed(checked, options, spent)
        scores = await _off_loop_if(
            is_large,
            reduce_terms,
            outcome.terms,
            checked.counted_positions,
            request.target_ids.offsets,
            options.smoothing,
            self._manifest.vocabulary.num_classes,
        )
        reduced = time.monotonic()
        faults = (*checked.faults, *self._device_faults(checked, outcome, scores))
        self._count(options, faults, len(request.target_ids) - len(faults))
        self._metrics.request(options.priority, reduced - started, outcome.compute_seconds)
        if options.on_error == "fail":
            _refuse_device_faults(faults)
        self._metrics.losses(
            options.stream,
            scores.token_nlls.values,
            scores.nlls[scores.num_tokens > 0] / scores.num_tokens[scores.num_tokens > 0],
        )
        return ScoredRequest(
            scores=scores,
            faults=tuple(sorted(faults, key=lambda fault: fault.index or 0)),
            cut_source_tokens=checked.cut_source_tokens,
            cut_target_tokens=checked.cut_target_tokens,
            usage=Usage(
                source_tokens=checked.num_source_tokens,
                target_tokens=checked.num_target_tokens,
                encoded_sources=outcome.num_encoded_sources,
                batches=outcome.num_batches,
                queue_seconds=outcome.queue_seconds,
                compute_seconds=outcome.compute_seconds,
            ),
            times=Times(started + spent, outcome.batch_times, reduced),
        )

    async def _computed(self, checked: Checked, options: ScoreOptions, spent: float) -> Outcome:
        """Terms of the pairs; tokens that went into batches are the tenant's."""
        num_tokens = checked.pairs.num_tokens
        quota = options.tenant.quota
        if quota is not None:
            quota.take(num_tokens)
        left = float("inf") if options.seconds_left is None else options.seconds_left - spent

        def not_computed(num_left_out: int) -> None:
            if quota is not None:
                quota.give_back(num_left_out)
            self._metrics.tenant_tokens(options.tenant.name, num_tokens - num_left_out)

        return await self._batcher.score(
            checked.pairs,
            priority=options.priority,
            with_ranks_and_entropies=options.with_ranks_and_entropies,
            seconds_left=left,
            tenant=options.tenant.name,
            reproducible=options.reproducible,
            not_computed=not_computed,
        )

    def _refuse_too_many(self, request: RequestArrays) -> None:
        limit = self._max_pairs
        for what, rows in (("targets", request.target_ids), ("sources", request.source_ids)):
            if len(rows) > limit:
                raise RequestTooLargeError(
                    f"the request has {len(rows)} {what}, and at most {limit} are taken; split it"
                )

    def _device_faults(self, checked: Checked, outcome: Outcome, scores: Scores) -> list[Fault]:
        """What went wrong on our side: pairs that did not fit, and pairs that are not finite."""
        not_scored = checked.rows[scores.num_tokens[checked.rows] == 0]
        too_large = checked.rows[outcome.out_of_memory]
        non_finite = np.setdiff1d(not_scored, too_large)
        if len(non_finite):
            self._metrics.non_finite(len(non_finite))
        return [
            *(
                Fault("out_of_memory", f"pair {index} alone does not fit the device", int(index))
                for index in too_large
            ),
            *(
                Fault("non_finite", f"the model gave NaN or infinity for pair {index}", int(index))
                for index in non_finite
            ),
        ]

    def _count(self, options: ScoreOptions, faults: tuple[Fault, ...], num_scored: int) -> None:
        self._metrics.pairs(options.priority, "scored", num_scored)
        for code in {fault.code for fault in faults}:
            count = sum(fault.code == code for fault in faults)
            self._metrics.pairs(options.priority, code, count)


def _size(request: RequestArrays) -> int:
    """Tokens and rows: what work on the arrays of a request grows with."""
    sources, targets = request.source_ids, request.target_ids
    return len(sources.values) + len(targets.values) + len(sources) + len(targets)


async def _off_loop_if(
    large: bool, work: Callable[[*_Arguments], _Result], *arguments: *_Arguments
) -> _Result:
    """Does the work here, or on a worker thread where it would hold up other requests."""
    return await asyncio.to_thread(work, *arguments) if large else work(*arguments)


def _refuse_device_faults(faults: tuple[Fault, ...]) -> None:
    for code, error in (("out_of_memory", PairTooLargeError), ("non_finite", NonFiniteError)):
        mine = [fault for fault in faults if fault.code == code]
        if mine:
            raise error(f"{len(mine)} pairs could not be scored: {code}", mine)
