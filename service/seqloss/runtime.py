"""One served model: its bundle, its engine, its queue, and the way of a request through them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, TypeVarTuple

import numpy as np

from seqloss import __version__
from seqloss.batching.cost import CostModel
from seqloss.batching.jobs import Outcome
from seqloss.batching.loop import Batcher, Threads
from seqloss.batching.queues import BatchingLimits
from seqloss.batching.warm_up import warm_up
from seqloss.bundle.manifest import EngineName, Precision
from seqloss.bundle.reader import Bundle
from seqloss.checking.check import Checked, check
from seqloss.engines.base import Engine, EngineInfo
from seqloss.engines.loader import load_engine
from seqloss.errors import (
    EngineDeadError,
    Fault,
    InvalidRequestError,
    NonFiniteError,
    NotReadyError,
    PairTooLargeError,
    RequestTooLargeError,
)
from seqloss.loss.reduce import LabelSmoothing, reduce_terms
from seqloss.metrics import ModelMetrics
from seqloss.records import Int64Array, LengthLimits, Priority, RequestArrays, Scores
from seqloss.settings import Settings

_LOG = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed"]
_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")

# Checking and reducing take some 20 ns a token or row: at most a millisecond on the event loop.
_ON_LOOP_SIZE = 50_000

# What exists at once of a batch's logits: see `seqloss.export.onnx_merge`.
_LOGITS_COPIES = 4
_LOGIT_BYTES = 4

LoadEngine = Callable[
    [Bundle, str, Precision | Literal["auto"], int | None, EngineName | Literal["auto"]], Engine
]


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
class ScoredRequest:
    """The answer to a request: scores, and why some targets have none."""

    scores: Scores
    faults: tuple[Fault, ...]
    cut_source_tokens: Int64Array
    cut_target_tokens: Int64Array
    usage: Usage


class LossRuntime:
    """One model, from loading to draining."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        settings: Settings,
        metrics: ModelMetrics,
        load: LoadEngine = load_engine,
        on_fatal: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.bundle = bundle
        self.limits = length_limits(bundle, settings)
        self.max_batch_tokens = settings.max_batch_tokens
        self._settings = settings
        self._metrics = metrics
        self._load = load
        self._on_fatal = on_fatal
        self._state: State = "loading"
        self._reason = "the model is being loaded"
        self._engine: Engine | None = None
        self._batcher: Batcher | None = None
        self._threads: Threads | None = None
        self._is_drained = False
        metrics.ready(False)

    @property
    def engine(self) -> Engine | None:
        """The loaded engine, or None while there is none."""
        return self._engine

    @property
    def state(self) -> State:
        """Where in its life the model is."""
        return self._state

    @property
    def reason(self) -> str:
        """Why it is not ready, in words."""
        return self._reason

    async def start(self, threads: Threads) -> None:
        """Loads the engine, which passes the bundle's self-test, warms it up and opens the queue.

        What goes wrong is told to `on_fatal`: there is no caller to raise it to.
        """
        loop = asyncio.get_running_loop()
        settings = self._settings
        self._threads = threads
        try:
            self._engine = await loop.run_in_executor(
                threads.device,
                self._load,
                self.bundle,
                settings.device,
                settings.precision,
                settings.threads,
                settings.engine,
            )
            if self._state == "loading":
                self._reason = "the model is being warmed up"
            self.max_batch_tokens, cost = await loop.run_in_executor(
                threads.device, self._warm_up, self._engine
            )
        except Exception as error:
            self._state, self._reason = "failed", f"the model did not load: {error}"
            self._on_fatal(error)
            return
        if self._state == "draining":  # a signal came while it was loading
            return
        limits = BatchingLimits(
            self.max_batch_tokens,
            settings.max_batch_pairs,
            settings.max_queue_tokens,
            settings.max_block_ms / 1000,
            settings.max_forward_seconds,
        )
        self._batcher = Batcher(
            self._engine,
            limits,
            self._metrics,
            threads,
            cost=cost,
            on_death=self._died,
        )
        info = self._engine.info
        self._metrics.built(
            __version__, info.engine, info.device, info.precision, self.bundle.digest
        )
        self._state, self._reason = "ready", "ready"
        self._metrics.ready(True)

    def _warm_up(self, engine: Engine) -> tuple[int, CostModel]:
        settings = self._settings
        tokens = token_budget(engine.info, self.bundle, settings)
        if not settings.warm_up:
            return tokens, CostModel()
        return warm_up(
            engine,
            self.bundle.manifest,
            self.limits,
            tokens,
            settings.max_batch_pairs,
        )

    def _died(self, error: EngineDeadError) -> None:
        self._state, self._reason = "failed", f"the engine is dead: {error.detail}"
        self._metrics.ready(False)
        self._on_fatal(error)

    async def drain(self) -> None:
        """Answers the admitted requests, and after `drain_delay_seconds` refuses new ones."""
        if self._state != "failed":
            self._state, self._reason = "draining", "the service is shutting down"
        self._metrics.ready(False)
        if self._batcher is not None and not self._is_drained:
            self._is_drained = True
            if self._state == "draining":
                await asyncio.sleep(self._settings.drain_delay_seconds)
            await self._batcher.drain(self._settings.drain_timeout_seconds)

    async def close(self) -> None:
        """Drains what is not drained yet, and frees the device."""
        await self.drain()
        if self._engine is not None and self._threads is not None and not self.is_stuck:
            # On its own thread: a batch that outlived the drain may still be running there.
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads.device, self._engine.close)

    @property
    def is_stuck(self) -> bool:
        """Whether the device's thread is in a batch that will never end."""
        return self._batcher is not None and self._batcher.is_stuck

    async def score(self, request: RequestArrays, options: ScoreOptions) -> ScoredRequest:
        """Checks, queues, scores and reduces.

        Raises:
            RequestTooLargeError, InvalidRequestError, PairTooLargeError: the request's fault.
            NotReadyError, OverloadedError, DeadlineExceededError, NonFiniteError,
            EngineDeadError: the service's.
        """
        if self._batcher is None:
            raise NotReadyError(
                f"model {self.name!r} is not ready: {self.reason}", retry_after_seconds=1
            )
        self._refuse_too_many(request)
        started = time.monotonic()
        is_large = _size(request) > _ON_LOOP_SIZE
        checked = await _off_loop_if(is_large, check, request, self.bundle.manifest, self.limits)
        if checked.faults and options.on_error == "fail":
            self._count(options, checked.faults, 0)
            raise InvalidRequestError(
                f"{len(checked.faults)} of {len(request.target_ids)} pairs cannot be scored; ask "
                'for "on_error": "partial" to have the others',
                checked.faults,
            )
        spent = time.monotonic() - started
        outcome = await self._batcher.score(
            checked.pairs,
            priority=options.priority,
            with_ranks_and_entropies=options.with_ranks_and_entropies,
            seconds_left=(
                float("inf") if options.seconds_left is None else options.seconds_left - spent
            ),
            reproducible=options.reproducible,
        )
        scores = await _off_loop_if(
            is_large,
            reduce_terms,
            outcome.terms,
            checked.counted_positions,
            request.target_ids.offsets,
            options.smoothing,
            self.bundle.manifest.vocabulary.num_classes,
        )
        faults = (*checked.faults, *self._device_faults(checked, outcome, scores))
        self._count(options, faults, len(request.target_ids) - len(faults))
        self._metrics.request(options.priority, time.monotonic() - started, outcome.compute_seconds)
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
        )

    def _refuse_too_many(self, request: RequestArrays) -> None:
        limit = self._settings.max_pairs_per_request
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


def length_limits(bundle: Bundle, settings: Settings) -> LengthLimits:
    """What the model bounds and what the service bounds, the smaller of each."""
    manifest = bundle.manifest
    return LengthLimits(
        min(settings.max_source_tokens, manifest.max_source_tokens or settings.max_source_tokens),
        min(settings.max_target_tokens, manifest.max_target_tokens or settings.max_target_tokens),
    )


def token_budget(info: EngineInfo, bundle: Bundle, settings: Settings) -> int:
    """`max_batch_tokens`, or fewer where the logits of so many would be over `max_logits_bytes`."""
    asked, classes = settings.max_batch_tokens, bundle.manifest.vocabulary.classes
    # However short its sources are, a batch has no more target tokens than tokens.
    fitting = max(1, settings.max_logits_bytes // (_LOGITS_COPIES * _LOGIT_BYTES * classes))
    if not info.makes_logits or fitting >= asked:
        return asked
    _LOG.info(
        "max_batch_tokens is %d for this model, and not %d: its graph makes logits of %d classes, "
        "and max_logits_bytes is %d",
        fitting,
        asked,
        classes,
        settings.max_logits_bytes,
    )
    return fitting


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
