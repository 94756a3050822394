"""Whole datasets on Ray Data: what is there, what is missing, and a pool of workers for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import ray.data
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from seqloss.bundle.reader import open_bundle
from seqloss.distributed.attempts import SharedAttempts
from seqloss.distributed.plan import (
    SCORE_SETTINGS,
    SUMMARY_NAME,
    Plan,
    finish,
    made_with,
    plan_in_output,
)
from seqloss.distributed.pool import Placement, Pool, device_of_workers
from seqloss.distributed.storage import Location, absolute
from seqloss.distributed.workers import Errand, PartitionScorer, Work
from seqloss.errors import ConfigurationError, SeqlossError
from seqloss.settings import load_settings
from seqloss.tokenization.encoder import TextEncoder

# The next one is there when one is done.
_PARTITIONS_AHEAD = 2
# Of a process that cannot import what it needs, say.
_MOST_FAILED_STARTS = 3


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        partitions, pairs: that are scored, those of earlier runs among them.
        of_partitions, of_pairs: of the whole dataset.
        errors: pairs of this run that have no scores.
        seconds: of this run.
    """

    partitions: int
    of_partitions: int
    pairs: int
    of_pairs: int
    errors: int
    seconds: float


def score_dataset(work: Work, pool: Pool | None = None) -> Iterator[Progress]:
    """Scores what is not there yet; to be called where Ray is initialised.

    Yields:
        How far it is: at the beginning, and after each partition.

    Raises:
        ConfigurationError: the dataset cannot be read, or the output is of something else.
        BundleError: there is no bundle, or a broken one.
    """
    pool = pool or Pool()
    work, made = _resolved(work)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    placement = Placement.of(pool, str(work.settings["device"]), machines)
    output = Location.of(work.output)
    plan = plan_in_output(work, made, pool.partition_rows, placement.workers)
    todo = _todo(plan, output.contents)
    total = sum(partition.num_rows for partition in plan.partitions)
    pairs = total - sum(errand.partition.num_rows for errand in todo)
    done, errors, started = len(plan.partitions) - len(todo), 0, time.monotonic()

    def progress() -> Progress:
        seconds = time.monotonic() - started
        return Progress(done, len(plan.partitions), pairs, total, errors, seconds)

    yield progress()
    if todo:
        (output / SUMMARY_NAME).remove()
        for counted in _counts(work, todo, placement):
            done, pairs = done + 1, pairs + counted["pairs"]
            errors += counted["errors"]
            yield progress()
    finish(work, plan)


def _resolved(work: Work) -> tuple[Work, dict[str, object]]:
    """What workers elsewhere understand, and what scores depend on.

    That is whole paths, what this environment sets, and the digest of the bundle that lies here.
    """
    settings = load_settings(**work.settings)
    given = settings.model_dump(mode="json", exclude_unset=True)
    bundle = open_bundle(Path(work.bundle))
    work.columns.require_by(TextEncoder.of(bundle))
    resolved = replace(
        work,
        source=absolute(work.source),
        output=absolute(work.output),
        bundle=absolute(work.bundle),
        # Their own environment decides nothing that scores depend on.
        settings=given
        | {name: getattr(settings, name) for name in SCORE_SETTINGS}
        | {"device": device_of_workers(settings.device)},
        bundle_digest=bundle.digest,
    )
    return resolved, made_with(resolved, bundle)


def _todo(plan: Plan, there: Mapping[str, int]) -> list[Errand]:
    each = zip(plan.partitions, plan.output_names, strict=True)
    return [Errand(partition, name) for partition, name in each if not there.get(name)]


def _counts(
    work: Work, todo: Sequence[Errand], placement: Placement
) -> Iterator[Mapping[str, int]]:
    """Pairs and errors of each partition that is done."""
    if not placement.gpus:  # a GPU's host has little to compute, and takes the engine's default
        work = replace(work, settings={"threads": placement.cpus} | dict(work.settings))
    rows = [{"errand": errand.as_json()} for errand in todo]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        PartitionScorer,
        fn_constructor_args=(work, SharedAttempts.started()),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(
            size=min(placement.workers, len(todo)),
            max_tasks_in_flight_per_actor=_PARTITIONS_AHEAD,
        ),
        num_cpus=placement.cpus,
        num_gpus=placement.gpus,
    )
    context = dataset.context  # of this dataset alone
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = _MOST_FAILED_STARTS
    context.max_errored_blocks = 0
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = -1  # a partition may take as long as it takes
    try:
        yield from dataset.iter_rows()
    except RayError as error:
        raise _of_worker(error) from error


def _of_worker(error: RayError) -> Exception:
    """What went wrong in a worker, if it was a mistake that a person can correct."""
    found: Exception = error
    while isinstance(found, RayTaskError):
        found = found.cause
    if isinstance(found, SeqlossError):
        found.args = (found.detail,)  # Ray Data adds what it has settings for
        return found
    if isinstance(found, OSError):
        return ConfigurationError(f"a worker failed: {_first_line(found)}")
    if isinstance(found, ActorDiedError):  # of what ended its constructor only a text is left
        return ConfigurationError(f"a worker did not start: {str(found).strip().splitlines()[-1]}")
    unknown: Exception = error
    return unknown


def _first_line(error: OSError) -> str:
    return error.strerror or str(error).partition("\n")[0]
