"""What a run is to do, noted in its output.

So one that is started again, with more workers or fewer, goes on with what is not there yet, and
scores of two runs are never taken for one's.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import orjson
import pyarrow as pa

from seqloss import __version__
from seqloss.bundle.reader import Bundle
from seqloss.distributed.partitions import (
    FileState,
    Partition,
    cut,
    input_files,
    states_of,
    survey,
)
from seqloss.distributed.storage import Location
from seqloss.distributed.tables import SCORE_COLUMNS
from seqloss.distributed.workers import Work
from seqloss.errors import ConfigurationError
from seqloss.settings import load_settings

PLAN_NAME = "_plan.json"
SUMMARY_NAME = "_summary.json"

# How batches are formed and on how many threads changes the last bits of a loss at most, and with
# kernels none; a run may go on with other ones, on other machines.
SCORE_SETTINGS = (
    "device",
    "engine",
    "precision",
    "kernels",
    "deterministic",
    "max_source_tokens",
    "max_target_tokens",
)

# Large enough that what is done once for each is little, small enough to lose little.
_MOST_ROWS = 20_000
_FEWEST_ROWS = 500
# So that none waits long for the last one.
_PARTITIONS_PER_WORKER = 4

_DISTRIBUTIONS = {"torch": ("torch",), "onnx": ("onnxruntime", "onnxruntime-gpu")}

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a dataset was cut, and what its scores depend on.

    Attributes:
        files: of the dataset.
        made_with: everything else; what is not the same makes other scores.
        rows_each: of a partition, at most.
        partitions: of all files, in their order.
    """

    files: tuple[FileState, ...]
    made_with: dict[str, Any]
    rows_each: int
    partitions: tuple[Partition, ...]

    def as_json(self) -> bytes:
        """To be read by `from_json`."""
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, content: bytes) -> Plan:
        """What `as_json` wrote.

        Raises:
            ConfigurationError: it wrote something else.
        """
        try:
            read = orjson.loads(content)
            return cls(
                tuple(FileState(**file) for file in read["files"]),
                dict(read["made_with"]),
                int(read["rows_each"]),
                tuple(Partition.of(partition) for partition in read["partitions"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"it is no plan that this version reads: {error!r}") from error

    @property
    def output_names(self) -> tuple[str, ...]:
        """Of the files of scores, one per partition; another plan has others."""
        digest = hashlib.sha256(self.as_json()).hexdigest()[:8]
        return tuple(f"part-{one.index:06d}-{digest}.parquet" for one in self.partitions)


def made_with(work: Work, bundle: Bundle) -> dict[str, Any]:
    """What scores depend on beside the dataset, by names that a person knows."""
    settings = load_settings(**work.settings)
    return {
        "bundle": bundle.digest,
        "seqloss": __version__,
        **{names[0]: _version(names) for names in _libraries(bundle)},
        **{name: getattr(settings, name) for name in SCORE_SETTINGS},
        **{f"columns.{name}": value for name, value in asdict(work.columns).items()},
        "kept": list(work.kept),
        "with_tokens": work.with_tokens,
    }


def _libraries(bundle: Bundle) -> list[tuple[str, ...]]:
    """What its graphs may run on, and by which names that is installed."""
    return [_DISTRIBUTIONS[name] for name in sorted({one.engine for one in bundle.manifest.graphs})]


def _version(distributions: tuple[str, ...]) -> str | None:
    """Of what is installed, without what tells a build for CPUs from one for GPUs."""
    for name in distributions:
        try:
            return metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return None


def plan_in_output(
    work: Work, made: dict[str, Any], partition_rows: int | None, workers: int
) -> Plan:
    """The plan of an earlier run into the same output, or a new one.

    Args:
        work: what is to be scored.
        made: of `made_with`.
        partition_rows: at most; None chooses.
        workers: that are to have some.

    Raises:
        ConfigurationError: the dataset cannot be read, or the output is of something else.
    """
    source, output = Location.of(work.source), Location.of(work.output)
    files = input_files(source)
    _require_apart(source, files, output)
    surveyed = survey(source, files, work.columns.names(work.kept))
    _check_columns(work, surveyed[0].schema)
    output.make_folder()
    noted = output / PLAN_NAME
    states = tuple(file.state for file in surveyed)
    if not noted.info.is_file:
        _require_empty(output)
        rows = partition_rows or _rows_each(sum(file.num_rows for file in surveyed), workers)
        noted.write_first(Plan(states, made, rows, cut(surveyed, rows)).as_json())
    plan = _read(noted)  # another run may have been quicker
    _require_same(plan, states, made, partition_rows, work.output)
    _require_no_others(output, plan)
    _sweep(output, plan)
    return plan


def finish(work: Work, plan: Plan) -> None:
    """Notes that all is done, where the output has the scores of the dataset and of nothing else.

    Raises:
        ConfigurationError: the dataset was changed, or another run was at work.
    """
    source, output = Location.of(work.source), Location.of(work.output)
    now = states_of(source.filesystem, input_files(source))
    if now != plan.files:
        raise ConfigurationError(
            f"{_first_other(plan.files, now)} was changed, added or removed while the dataset was "
            "scored; score it as it is now into another output"
        )
    if (output / PLAN_NAME).read() != plan.as_json():
        raise ConfigurationError(
            f"another run has begun in {work.output} meanwhile, with another plan; remove the "
            "folder, and score one at a time"
        )
    _require_no_others(output, plan)
    there = output.contents
    if missing := [name for name in plan.output_names if not there.get(name)]:
        raise ConfigurationError(
            f"of {work.output} {missing[0]} and maybe others were removed meanwhile; run the same "
            "command again"
        )
    total = sum(partition.num_rows for partition in plan.partitions)
    summary = {"pairs": total, "partitions": len(plan.partitions)}
    (output / SUMMARY_NAME).write(orjson.dumps(summary))
    try:
        _sweep(output, plan)
    except (OSError, ConfigurationError) as error:
        _LOG.warning("all is scored, and %s still has unfinished files: %s", output.path, error)


def _sweep(output: Location, plan: Plan) -> None:
    output.sweep((*plan.output_names, PLAN_NAME, SUMMARY_NAME))


def _read(noted: Location) -> Plan:
    try:
        return Plan.from_json(noted.read())
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{noted.path}: {error.detail}; take another output, or remove it"
        ) from error


def _require_apart(source: Location, files: list[str], output: Location) -> None:
    """Scores would become a part of the dataset."""
    if source.contains(output):
        raise ConfigurationError(
            f"{output.path} lies in the dataset {source.path}; take another output"
        )
    for path in (source.path, *files):
        if output.contains(Location(source.filesystem, path)):
            raise ConfigurationError(
                f"{path}, of the dataset, lies in {output.path}; take another output"
            )


def _require_empty(output: Location) -> None:
    if any(name.endswith(".parquet") for name in output.contents):
        raise ConfigurationError(
            f"{output.path} holds Parquet files, and no plan says how they were made; take another "
            "output"
        )


def _require_no_others(output: Location, plan: Plan) -> None:
    ours = frozenset(plan.output_names)
    if others := sorted(
        name for name in output.contents if name.startswith("part-") and name not in ours
    ):
        raise ConfigurationError(
            f"{output.path} holds {others[0]}, which another run has written; remove the folder, "
            "and score one at a time"
        )


def _require_same(
    plan: Plan,
    files: tuple[FileState, ...],
    made: dict[str, Any],
    partition_rows: int | None,
    output: str,
) -> None:
    was, now = dict(plan.made_with), dict(made)
    if partition_rows is not None:
        was["partition_rows"], now["partition_rows"] = plan.rows_each, partition_rows
    other = [
        f"{name} was {was.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if plan.files != files:
        other.append(f"{_first_other(plan.files, files)} was changed, added or removed")
    if other:
        raise ConfigurationError(
            f"{output} holds scores of another run: {'; '.join(other)}; take another output, or "
            "remove it"
        )


def _first_other(before: tuple[FileState, ...], now: tuple[FileState, ...]) -> str:
    return min(file.path for file in {*before} ^ {*now})


def _check_columns(work: Work, schema: pa.Schema | None) -> None:
    """Before anything is scored: what a Parquet dataset lacks, and names that would be there twice.

    Raises:
        ConfigurationError: there are such.
    """
    if schema is not None:
        work.columns.require_in(schema)
        if missing := [name for name in work.kept if name not in schema.names]:
            raise ConfigurationError(f"there is no column {', '.join(missing)} to keep")
        if twice := [name for name in work.kept if schema.names.count(name) > 1]:
            raise ConfigurationError(f"there are several columns {twice[0]!r} to keep; rename them")
    if twice := [name for name in work.kept if work.kept.count(name) > 1]:
        raise ConfigurationError(f"column {twice[0]!r} is to be kept twice; name it once")
    if taken := sorted({"file", "row", *SCORE_COLUMNS} & set(work.kept)):
        raise ConfigurationError(f"the output has its own column {', '.join(taken)}; rename yours")


def _rows_each(num_rows: int, workers: int) -> int:
    """So many that all workers have some, and end at about the same time."""
    fair = math.ceil(num_rows / (workers * _PARTITIONS_PER_WORKER))
    return min(_MOST_ROWS, max(_FEWEST_ROWS, fair))
