"""One run of the benchmark, from making models to the last round."""

from __future__ import annotations

import random
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from benchmarks import prepare, resources
from benchmarks.gemm import GemmRates, GemmTask
from benchmarks.independence import IndependenceResult, measure_independence
from benchmarks.machine import machine, origin
from benchmarks.memory import MemoryResult, MemorySize, measure_seqloss, measure_transformers
from benchmarks.models import MODELS, shape_of
from benchmarks.operations import useful_operations
from benchmarks.processes import Worker, WorkerError, in_own_process
from benchmarks.progress import say
from benchmarks.results import Outcome, Results, WorkloadSummary
from benchmarks.scoring import ScoringTask, Setup, Variant, catalogue
from benchmarks.workload import Workload
from seqloss.bundle.manifest import EngineName

# Threads of the variant before spin a while before they sleep.
_PAUSE_SECONDS = 0.3
# transformers gets this part of the tokens that seqloss gets in one batch.
_TRANSFORMERS_PART = 8
# Logits, their log-softmax, and some more.
_LOGITS_COPIES = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for: the arguments of the command line."""

    model: str
    scale: float
    num_pairs: int
    sweep_pairs: int
    rounds: int
    threads: int
    precisions: dict[EngineName, tuple[str, ...]]
    variants: tuple[str, ...]
    memory: MemorySize | None
    independence: bool
    folder: Path


def measure(plan: Plan) -> Results:
    """Does all of it."""
    started_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    variants = _chosen(plan)
    # First: where memory does not suffice, nothing else is lost.
    memory = _memory(plan, plan.memory) if plan.memory else []
    setup = _prepared(plan)
    workload = Workload.load(setup.workload)
    outcomes, gemm_rates = _measured(plan, setup, workload, variants)
    return Results(
        started_at=started_at,
        origin=origin("bench"),
        machine=machine(),
        threads=plan.threads,
        rounds=plan.rounds,
        workload=_summary(plan, workload),
        outcomes=outcomes,
        gemm_rates=gemm_rates,
        memory=memory,
        independence=_independence(plan, setup) if plan.independence else [],
    )


def _chosen(plan: Plan) -> list[Variant]:
    variants = catalogue(plan.precisions, MODELS[plan.model].ctranslate2_drops_pad)
    chosen = [
        variant
        for variant in variants
        if any(fnmatch(variant.name, pattern) for pattern in plan.variants)
    ]
    if not chosen:
        names = "; ".join(variant.name for variant in variants)
        sys.exit(f"no variant is named so; these are: {names}")
    return chosen


def _prepared(plan: Plan) -> Setup:
    folder = plan.folder / f"{plan.model}-{plan.scale:.2f}"
    say(f"making the model and its pairs in {folder}, where they are not there yet")
    checkpoint = prepare.checkpoint_of(MODELS[plan.model], plan.scale, folder)
    return Setup(
        checkpoint=checkpoint,
        workload=prepare.workload_of(checkpoint, plan.num_pairs, folder),
        bundles={
            engine: prepare.export_bundle(checkpoint, precisions, folder, engine)
            for engine, precisions in plan.precisions.items()
        },
        ctranslate2=folder / "ctranslate2",
        threads=plan.threads,
        sweep_pairs=plan.sweep_pairs,
    )


def _summary(plan: Plan, workload: Workload) -> WorkloadSummary:
    sources, targets = workload.pairs.source_lengths, workload.pairs.target_lengths
    total = sum(n * nll for n, nll in zip(targets, workload.mean_nlls, strict=True))
    return WorkloadSummary(
        model=plan.model,
        scale=plan.scale,
        num_pairs=len(workload.pairs),
        source_tokens=sum(sources),
        target_tokens=sum(targets),
        lengths_from=workload.lengths_from,
        mean_nll=total / sum(targets),
        operations=useful_operations(shape_of(MODELS[plan.model].config()), sources, targets),
    )


def _measured(
    plan: Plan, setup: Setup, workload: Workload, variants: list[Variant]
) -> tuple[list[Outcome], list[GemmRates]]:
    """All rounds; what the machine can do is measured in each of them too."""
    outcomes = [Outcome.of(variant) for variant in variants]
    gemm_rates: list[GemmRates] = []
    with ExitStack() as stack:
        gemm = stack.enter_context(Worker(partial(GemmTask, plan.threads)))
        gemm.warm_up()
        workers = [
            stack.enter_context(Worker(partial(ScoringTask, variant, setup)))
            for variant in variants
        ]
        for worker, outcome in zip(workers, outcomes, strict=True):
            _warm_up(worker, outcome)
        for number in range(plan.rounds):
            say(f"round {number + 1} of {plan.rounds}")
            gemm_rates.append(gemm.run())
            order = list(range(len(variants)))
            random.Random(number).shuffle(order)
            for index in order:
                expected = workload.expected_nlls(without_pad=variants[index].without_pad)
                _run(workers[index], outcomes[index], expected)
    return outcomes, gemm_rates


def _warm_up(worker: Worker, outcome: Outcome) -> None:
    say(f"warming up {outcome.name}")
    try:
        outcome.choice = worker.warm_up()
    except WorkerError as error:
        _fail(outcome, error)


def _run(worker: Worker, outcome: Outcome, expected_nlls: list[float]) -> None:
    """One variant's part of a round."""
    if outcome.failure:
        return
    time.sleep(_PAUSE_SECONDS)
    try:
        outcome.add(worker.run(), expected_nlls)
    except WorkerError as error:
        _fail(outcome, error)
    else:
        say(f"  {outcome.name}: {outcome.seconds[-1]:.3g} s")


def _fail(outcome: Outcome, error: WorkerError) -> None:
    outcome.failure = str(error).partition("\n")[0]
    say(f"{outcome.name} is left out: {error.__cause__ or error}")


def _memory(plan: Plan, size: MemorySize) -> list[MemoryResult]:
    say(f"one batch of {size.target_tokens:,} tokens over {size.vocabulary:,} classes")
    folder = plan.folder / f"memory-{size.vocabulary}"
    model = size.model()
    checkpoint = prepare.checkpoint_of(model, model.default_scale(), folder)
    results = []
    for engine, asked in plan.precisions.items():
        # In bytes so narrow a model is another one, which export refuses.
        precisions = [precision for precision in asked if precision != "int8"]
        bundle = prepare.export_bundle(checkpoint, precisions, folder, engine)
        results += [
            in_own_process(measure_seqloss, bundle, precision, size, plan.threads)
            for precision in precisions
        ]
    part = size.part(_TRANSFORMERS_PART)
    available = resources.available_bytes()
    if available is None or available > _LOGITS_COPIES * part.logits_bytes:
        results.append(in_own_process(measure_transformers, checkpoint, part, plan.threads))
    return [result for result in results if result is not None]


def _independence(plan: Plan, setup: Setup) -> list[IndependenceResult]:
    say("the same pairs in batches of other compositions")
    return [
        in_own_process(
            measure_independence,
            setup.bundles[engine],
            engine,
            precision,
            kernels,
            setup.workload,
        )
        for engine, precisions in plan.precisions.items()
        for precision in precisions
        for kernels in ((True, False) if engine == "torch" else (False,))
    ]
