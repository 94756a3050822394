"""One run, model by model."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import prepare
from benchmarks.gpu.baseline import TransformersTask
from benchmarks.gpu.latency import latency_of
from benchmarks.gpu.products import ProductsTask
from benchmarks.gpu.results import BulkRun, Latency, ModelResult, ProductRate, Results
from benchmarks.machine import machine, origin
from benchmarks.models import MODELS, shape_of
from benchmarks.pairs import Pairs
from benchmarks.processes import Task, Worker, WorkerError
from benchmarks.progress import say
from benchmarks.serving.workbench import Bundled
from benchmarks.sweeps.catalogue import Point
from benchmarks.sweeps.task import SweepTask

PRECISION = "bfloat16"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for: the arguments of the command line.

    Attributes:
        models: names in `MODELS`.
        device: `cuda:N`, or `cpu` to try out the program.
        threads: of the CPU.
        rounds: in which all ways are measured once.
        num_pairs: that are scored in bulk.
        batch_tokens: of seqloss's batches, both sides together.
        transformers_tokens: of transformers', the target's side; all logits of them are in memory.
        compiles: whether transformers is measured compiled too.
        head_tokens: of the products and heads that are measured alone.
        square: rows and columns of the largest product.
        num_requests: of single pairs.
        folder: where models are kept.
    """

    models: tuple[str, ...]
    device: str
    threads: int
    rounds: int
    num_pairs: int
    batch_tokens: tuple[int, ...]
    transformers_tokens: tuple[int, ...]
    compiles: bool
    head_tokens: int
    square: int
    num_requests: int
    folder: Path


def measure(plan: Plan) -> Results:
    """Does all of it, one model after the other."""
    started_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with _worker(plan, partial(ProductsTask, plan.device)) as worker:
        square: ProductRate = worker.warm_up(plan.square)
    return Results(
        started_at=started_at,
        origin=origin("bench-gpu"),
        machine=machine(),
        gpu="none" if plan.device == "cpu" else torch.cuda.get_device_name(plan.device),
        rounds=plan.rounds,
        square=square,
        models=[_measured(plan, name) for name in plan.models],
    )


class _Here:
    """A task in this process, in the place of a `Worker`: a try does not wait for processes."""

    def __init__(self, make: Callable[[], Task]) -> None:
        self._task = make()
        self.warm_up, self.run, self.close = self._task.warm_up, self._task.run, self._task.close


def _worker(plan: Plan, make: Callable[[], Task]) -> AbstractContextManager[Any]:
    return Worker(make) if plan.device != "cpu" else closing(_Here(make))


def _measured(plan: Plan, name: str) -> ModelResult:
    model = MODELS[name]
    shape = shape_of(model.config())
    say(f"{name}: products and the head alone")
    with _worker(plan, partial(ProductsTask, plan.device)) as worker:
        rates, head = worker.run(shape, plan.head_tokens)
    folder = plan.folder / f"{name}-{model.default_scale():.2f}"
    say(f"{name}: making the model in {folder}, where it is not there yet")
    checkpoint = prepare.checkpoint_of(model, model.default_scale(), folder)
    part = folder / "gpu"
    part.mkdir(exist_ok=True)
    bundle = prepare.export_bundle(checkpoint, [PRECISION], part)
    bundled = Bundled(name, bundle, PRECISION, plan.device, plan.threads)
    points = [
        Point(tokens, name, plan.num_pairs, max_batch_tokens=tokens) for tokens in plan.batch_tokens
    ]
    pairs = points[0].pairs(bundled.limits)
    seqloss = _seqloss(plan, bundled, points)
    return ModelResult(
        name=name,
        num_pairs=len(pairs),
        source_tokens=sum(pairs.source_lengths),
        target_tokens=sum(pairs.target_lengths),
        operations=points[0].operations(shape, pairs),
        rates=rates,
        head=head,
        head_tokens=plan.head_tokens,
        bulk=[*seqloss, *_transformers(plan, checkpoint, pairs)],
        latency=_latency(plan, bundled),
    )


def _seqloss(plan: Plan, bundled: Bundled, points: list[Point]) -> list[BulkRun]:
    """In process, queue and batches included, with batches of several sizes."""
    runs = [BulkRun("seqloss", f"max_batch_tokens {point.value}") for point in points]
    shape = shape_of(MODELS[bundled.name].config())
    with _worker(plan, partial(SweepTask, bundled, shape)) as worker:
        for run, point in zip(runs, points, strict=True):
            say(f"{bundled.name}: {run.name}, {run.setting}")
            with _Noting(run):
                work = worker.warm_up(point)
                run.peak_bytes = work.memory.peak_bytes if plan.device != "cpu" else None
                run.seconds += [worker.run(point) for _ in range(plan.rounds)]
    return runs


def _transformers(plan: Plan, checkpoint: Path, pairs: Pairs) -> list[BulkRun]:
    """Sorted, in batches of several sizes; one process for eager, one for compiled."""
    runs = []
    for compiled in (False, True) if plan.compiles else (False,):
        name = f"transformers, {'compiled' if compiled else 'eager'}"
        of_kind = [BulkRun(name, f"target tokens {most}") for most in plan.transformers_tokens]
        runs += of_kind
        with ExitStack() as stack:
            make = partial(TransformersTask, checkpoint, plan.device, compiled=compiled)
            worker = stack.enter_context(_worker(plan, make))
            for run, most in zip(of_kind, plan.transformers_tokens, strict=True):
                say(f"{run.name}, {run.setting}")
                with _Noting(run):
                    run.peak_bytes = worker.warm_up(pairs, most)
                    run.seconds += [worker.run(pairs, most) for _ in range(plan.rounds)]
    return runs


class _Noting:
    """Notes down why a way is left out, and lets the others go on."""

    def __init__(self, run: BulkRun) -> None:
        self._run = run

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, WorkerError):
            return False
        self._run.failure = str(error).partition("\n")[0]
        self._run.seconds.clear()
        say(f"{self._run.name}, {self._run.setting} is left out: {error.__cause__ or error}")
        return True


def _latency(plan: Plan, bundled: Bundled) -> Latency | None:
    try:
        return latency_of(bundled, plan.num_requests)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"{bundled.name}: latency is left out: {error}")
        return None
