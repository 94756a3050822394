"""One run over the sweeps, from making models to the last round."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from benchmarks import prepare
from benchmarks.gemm import GemmRates, GemmTask
from benchmarks.machine import machine, origin
from benchmarks.models import shape_of
from benchmarks.processes import Worker, WorkerError
from benchmarks.progress import say
from benchmarks.serving.workbench import Bundled
from benchmarks.sweeps.catalogue import SWEEPS, Size, Sweep, model_named
from benchmarks.sweeps.results import PointResult, Results, SweepResult
from benchmarks.sweeps.task import SweepTask
from seqloss.bundle.manifest import Precision
from seqloss.engines.torch_engine import device_named, precisions_by_speed

# Threads of the point before spin a while before they sleep.
_PAUSE_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for: the arguments of the command line.

    Attributes:
        sweeps: names of those to run.
        size: how much is measured.
        precisions: of all sweeps; none for the device's fastest, and float32 where a sweep has it.
        device: of engines.
        threads: for matrix products.
        rounds: in which every point of a sweep is measured once.
        folder: where models are kept.
    """

    sweeps: tuple[str, ...]
    size: Size
    precisions: tuple[Precision, ...]
    device: str
    threads: int
    rounds: int
    folder: Path


def measure(plan: Plan) -> Results:
    """Does all of it, one sweep after the other."""
    started_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    bundles = _Bundles(plan)
    return Results(
        started_at=started_at,
        origin=origin("bench-sweeps"),
        machine=machine(),
        device=plan.device,
        threads=plan.threads,
        rounds=plan.rounds,
        sweeps=[_measured(plan, bundles, SWEEPS[name](plan.size)) for name in plan.sweeps],
    )


class _Bundles:
    """Models as bundles, made when a sweep needs them first."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        fastest = precisions_by_speed(device_named(plan.device))[0]
        self._default = tuple(dict.fromkeys((fastest, "float32")))
        self._folders: dict[str, Path] = {}

    def precisions(self, sweep: Sweep) -> tuple[Precision, ...]:
        """Those that a sweep is measured in."""
        return self._plan.precisions or self._default[: 2 if sweep.with_float32 else 1]

    def bundled(self, name: str, precision: Precision) -> Bundled:
        """A model, and how it is run."""
        if name not in self._folders:
            self._folders[name] = self._exported(name)
        plan = self._plan
        return Bundled(name, self._folders[name], precision, plan.device, plan.threads)

    def _exported(self, name: str) -> Path:
        model = model_named(name)
        scale = model.default_scale()
        folder = self._plan.folder / f"{name}-{scale:.2f}"
        say(f"making the model in {folder}, where it is not there yet")
        checkpoint = prepare.checkpoint_of(model, scale, folder)
        part = folder / "sweeps"
        part.mkdir(exist_ok=True)
        return prepare.export_bundle(checkpoint, self._plan.precisions or self._default, part)


def _measured(plan: Plan, bundles: _Bundles, sweep: Sweep) -> SweepResult:
    """Rounds over all points; what the machine can do is measured in each of them too."""
    entries = [
        PointResult(point, precision)
        for precision in bundles.precisions(sweep)
        for point in sweep.points
    ]
    gemm_rates: list[GemmRates] = []
    with ExitStack() as stack:
        gemm = stack.enter_context(Worker(partial(GemmTask, plan.threads, plan.device)))
        gemm.warm_up()
        workers = _workers(bundles, sweep, stack)
        for entry in entries:
            _warm_up(workers[entry.point.model, entry.precision], entry)
        for number in range(plan.rounds):
            say(f"{sweep.name}: round {number + 1} of {plan.rounds}")
            gemm_rates.append(gemm.run())
            for entry in random.Random(number).sample(entries, len(entries)):
                _run(workers[entry.point.model, entry.precision], entry)
    return SweepResult(sweep, entries, gemm_rates)


def _workers(bundles: _Bundles, sweep: Sweep, stack: ExitStack) -> dict[tuple[str, str], Worker]:
    """One for each model in each precision; the stack ends them."""
    models = dict.fromkeys(point.model for point in sweep.points)
    return {
        (name, precision): stack.enter_context(
            Worker(
                partial(
                    SweepTask,
                    bundles.bundled(name, precision),
                    shape_of(model_named(name).config()),
                )
            )
        )
        for name in models
        for precision in bundles.precisions(sweep)
    }


def _warm_up(worker: Worker, entry: PointResult) -> None:
    try:
        entry.work = worker.warm_up(entry.point)
    except WorkerError as error:
        _fail(entry, error)


def _run(worker: Worker, entry: PointResult) -> None:
    """One point's part of a round."""
    if entry.failure:
        return
    time.sleep(_PAUSE_SECONDS)
    try:
        entry.seconds.append(worker.run(entry.point))
    except WorkerError as error:
        _fail(entry, error)


def _fail(entry: PointResult, error: WorkerError) -> None:
    entry.failure = str(error).partition("\n")[0]
    say(f"{entry.point.value:,} in {entry.precision} is left out: {error.__cause__ or error}")
