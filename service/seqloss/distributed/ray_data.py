"""Whole datasets on Ray Data: what is there, what is missing, and a pool of workers for it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError

from seqloss.bundle.reader import open_bundle
from seqloss.distributed import partitions
from seqloss.distributed.partitions import PLAN_NAME, SUMMARY_NAME, Partition, Plan
from seqloss.distributed.storage import Location, absolute
from seqloss.distributed.tables import SCORE_COLUMNS
from seqloss.distributed.workers import PartitionScorer, Work
from seqloss.errors import ConfigurationError, SeqlossError
from seqloss.settings import load_settings
from seqloss.tokenization.encoder import TextEncoder

# Large enough that what is done once for each is little, small enough to lose little.
_MOST_ROWS = 20_000
_FEWEST_ROWS = 500
# So that none waits long for the last one.
_PARTITIONS_PER_WORKER = 4
# The next one is there when one is done.
_PARTITIONS_AHEAD = 2
# A partition that ends whoever computes it ends the run after so many, and so does a machine on
# which workers do not start.
_MOST_DEATHS = 5
_MOST_FAILED_STARTS = 3


@dataclass(frozen=True, slots=True)
class Pool:
    """How a dataset is cut, and for whom.

    Attributes:
        partition_rows: most rows of an output file; None chooses.
        workers: how many; None for one per GPU of the cluster, or per machine where it has none.
        cpus_per_worker: threads of each; None for one beside a GPU, and else for all processors of
            the smallest machine.
    """

    partition_rows: int | None = None
    workers: int | None = None
    cpus_per_worker: int | None = None


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


@dataclass(frozen=True, slots=True)
class _Resources:
    workers: int
    cpus: int
    gpus: int


def score_dataset(work: Work, pool: Pool | None = None) -> Iterator[Progress]:
    """Scores what is not there yet; to be called where Ray is initialised.

    Yields:
        How far it is: at the beginning, and after each partition.

    Raises:
        ConfigurationError: the dataset cannot be read, or the output is of something else.
        BundleError: there is no bundle, or a broken one.
    """
    pool = pool or Pool()
    work = _resolved(work)
    resources = _resources(pool, str(work.settings.get("device", "auto")))
    output = Location.of(work.output)
    plan = _plan(work, pool, resources.workers)
    there = output.contents
    todo = [one for one in plan.partitions if not there.get(one.output_name)]
    total = sum(partition.num_rows for partition in plan.partitions)
    pairs = total - sum(partition.num_rows for partition in todo)
    done, errors, started = len(plan.partitions) - len(todo), 0, time.monotonic()

    def progress() -> Progress:
        seconds = time.monotonic() - started
        return Progress(done, len(plan.partitions), pairs, total, errors, seconds)

    yield progress()
    if todo:
        for counted in _counts(work, todo, resources):
            done, pairs = done + 1, pairs + counted["pairs"]
            errors += counted["errors"]
            yield progress()
    if (output / PLAN_NAME).read() != plan.as_json():
        raise ConfigurationError(
            f"another run has begun in {work.output} meanwhile, with another plan; remove the "
            "folder, and score one at a time"
        )
    (output / SUMMARY_NAME).write(
        orjson.dumps({"pairs": total, "partitions": len(plan.partitions)})
    )


def _resolved(work: Work) -> Work:
    """What workers elsewhere understand: whole paths, and what this environment sets."""
    settings = load_settings(**work.settings).model_dump(mode="json", exclude_unset=True)
    return replace(
        work,
        source=absolute(work.source),
        output=absolute(work.output),
        bundle=absolute(work.bundle),
        settings=settings,
    )


def _resources(pool: Pool, device: str) -> _Resources:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device.startswith("cuda") or (device == "auto" and gpus):
        return _Resources(pool.workers or max(1, gpus), pool.cpus_per_worker or 1, 1)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    workers = pool.workers or len(cpus)
    share = max(1, min(*cpus, sum(cpus) // workers))
    return _Resources(workers, pool.cpus_per_worker or share, 0)


def _counts(
    work: Work, todo: list[Partition], resources: _Resources
) -> Iterator[Mapping[str, int]]:
    """Pairs and errors of each partition that is done."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = _MOST_FAILED_STARTS
    if not resources.gpus:  # a GPU's host has little to compute, and takes the engine's default
        work = replace(work, settings={"threads": resources.cpus} | dict(work.settings))
    rows = [{"partition": orjson.dumps(asdict(partition))} for partition in todo]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        PartitionScorer,
        fn_constructor_args=(work,),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(
            size=min(resources.workers, len(todo)),
            max_tasks_in_flight_per_actor=_PARTITIONS_AHEAD,
        ),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        max_task_retries=_MOST_DEATHS,
    )
    try:
        yield from dataset.iter_rows()
    except RayError as error:
        raise _of_worker(error) from error


def _of_worker(error: RayError) -> Exception:
    """What went wrong in a worker, if it was a mistake that a person can correct."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, SeqlossError):
            return found
        found = getattr(found, "cause", None) or found.__cause__
    # Of what a constructor raised only the text is left, ours in its last line.
    ours = [line for line in str(error).splitlines() if line.startswith("seqloss.errors.")]
    if ours:
        return ConfigurationError(f"a worker did not start: {ours[-1].partition(': ')[2]}")
    unknown: Exception = error
    return unknown


# ---------------------------------------------------------------- the plan


def _plan(work: Work, pool: Pool, workers: int) -> Plan:
    """That of an earlier run into the same output, or a new one.

    Raises:
        ConfigurationError: the dataset cannot be read, or the output is of something else.
    """
    source, output = Location.of(work.source), Location.of(work.output)
    if source.contains(output):
        raise ConfigurationError(f"{work.output} lies in the dataset {work.source}; take another")
    surveyed = partitions.survey(source, partitions.input_files(source))
    _check_columns(work, surveyed[0].schema)
    bundle = open_bundle(Path(work.bundle))
    work.columns.require_by(TextEncoder.of(bundle))
    files = tuple((one.path, one.num_bytes, one.num_rows, one.changed) for one in surveyed)
    made_with = {
        "bundle": bundle.digest,
        "settings": dict(work.settings),
        "columns": asdict(work.columns),
        "kept": list(work.kept),
        "with_tokens": work.with_tokens,
    }
    output.filesystem.create_dir(output.path, recursive=True)
    output.sweep()
    noted = output / PLAN_NAME
    if noted.info.is_file:
        plan = Plan.from_json(noted.read())
        _require_same(plan, files, made_with, work, pool)
        return plan
    if any(name.endswith(".parquet") for name in output.contents):
        raise ConfigurationError(
            f"{work.output} holds Parquet files, and no plan says how they were made; take another "
            "output"
        )
    rows = pool.partition_rows or _rows_each(sum(one.num_rows for one in surveyed), workers)
    plan = Plan(files, made_with, rows, partitions.cut(surveyed, rows))
    noted.write(plan.as_json())
    return plan


def _require_same(
    plan: Plan,
    files: tuple[tuple[str, int, int, int], ...],
    made_with: dict[str, Any],
    work: Work,
    pool: Pool,
) -> None:
    other = [name for name, value in made_with.items() if plan.made_with.get(name) != value]
    if plan.files != files:
        other.append("files of the dataset")
    if pool.partition_rows not in (None, plan.rows_each):
        other.append("rows of a partition")
    if other:
        raise ConfigurationError(
            f"{work.output} holds scores of another run, with other {', '.join(other)}; take "
            "another output, or remove it"
        )


def _check_columns(work: Work, schema: pa.Schema | None) -> None:
    """Before anything is scored: what a Parquet dataset lacks, and names that would be there twice.

    Raises:
        ConfigurationError: there are such.
    """
    if schema is not None:
        work.columns.require_in(schema)
        if missing := [name for name in work.kept if name not in schema.names]:
            raise ConfigurationError(f"there is no column {', '.join(missing)} to keep")
    if taken := sorted({"file", "row", *SCORE_COLUMNS} & set(work.kept)):
        raise ConfigurationError(f"the output has its own column {', '.join(taken)}; rename yours")


def _rows_each(num_rows: int, workers: int) -> int:
    """So many that all workers have some, and end at about the same time."""
    fair = math.ceil(num_rows / (workers * _PARTITIONS_PER_WORKER))
    return min(_MOST_ROWS, max(_FEWEST_ROWS, fair))
