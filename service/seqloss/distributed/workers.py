"""What a worker of Ray Data does: a model in its own process, and tables of pairs."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from seqloss.distributed.attempts import Attempts, SharedAttempts, this_worker
from seqloss.distributed.offline import OfflineModel
from seqloss.distributed.partitions import Partition
from seqloss.distributed.reading import PartitionReader
from seqloss.distributed.storage import Location
from seqloss.distributed.tables import Errors, PairColumns, request_of, scores_of
from seqloss.errors import BundleError, ConfigurationError, EngineDeadError, SelfTestError

# A process that ends may have had bad luck; what ends so many is to blame itself.
_MOST_ATTEMPTS = 5
_MOST_LOADS = 3
_LOGS = "the logs of Ray on their machines say why, or its kernel's where memory ran out"

_LOG = logging.getLogger(__name__)


class PairScorer:
    """Adds columns of losses to Arrow tables; for `Dataset.map_batches`.

    >>> dataset.map_batches(
    ...     PairScorer,
    ...     fn_constructor_kwargs={"bundle": "/models/nllb"},
    ...     batch_format="pyarrow",
    ...     batch_size=20_000,
    ...     num_gpus=1,
    ...     compute=ray.data.ActorPoolStrategy(size=8),
    ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: str,
        settings: Mapping[str, Any] | None = None,
        columns: PairColumns | None = None,
        *,
        with_tokens: bool = False,
        digest: str | None = None,
    ) -> None:
        """Loads the model, and waits until it is ready.

        Args:
            bundle: its folder, on every machine.
            settings: of the engine and its batches, by their names.
            columns: where the pairs are; None for `source_ids` and `target_ids`.
            with_tokens: whether there is a column of each token's nll.
            digest: of the bundle that must lie there; None for whatever does.

        Raises:
            BundleError, ConfigurationError, EngineDeadError: it cannot be loaded.
        """
        self._model = OfflineModel(Path(bundle), dict(settings or {}), digest)
        self._columns = columns or PairColumns()
        self._with_tokens = with_tokens

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with the columns of `seqloss.distributed.tables.scores_of` behind its own.

        Raises:
            ConfigurationError: it has not the columns, or one of those already.
        """
        self._columns.require_in(table.schema)
        scores = self.scores(table, {})
        if taken := sorted(scores.keys() & set(table.column_names)):
            raise ConfigurationError(f"there are columns {', '.join(taken)} already; rename them")
        for name, column in scores.items():
            table = table.append_column(name, column)
        return table

    def scores(self, table: pa.Table, errors: Errors, first_row: int = 0) -> dict[str, pa.Array]:
        """Columns of scores alone; rows that have errors already keep them.

        Args:
            table: the pairs.
            errors: of rows that hold none.
            first_row: the number of the first one, for what is said of others.
        """
        request, found = request_of(table, self._columns, self._model.text_encoder)
        try:
            scored = self._model.score(request)
        except EngineDeadError as error:
            _end(error)
        return scores_of(scored, found | errors, with_tokens=self._with_tokens, first_row=first_row)

    @property
    def described(self) -> dict[str, str]:
        """What computes."""
        return self._model.described

    def close(self) -> None:
        """Frees the device's memory, in a process that goes on; no call follows."""
        self._model.close()


@dataclass(frozen=True, slots=True)
class Work:
    """What all workers of a run are told.

    Attributes:
        source: the dataset: a file, a folder, or a URI of either.
        output: the folder of scores.
        bundle: the model's folder, on every machine.
        settings: of the engine and its batches, by their names.
        columns: where the pairs are.
        kept: columns of the dataset that the output has too.
        with_tokens: whether it has each token's nll.
        bundle_digest: what must lie in the model's folder; None for whatever does.
    """

    source: str
    output: str
    bundle: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    columns: PairColumns = field(default_factory=PairColumns)
    kept: tuple[str, ...] = ()
    with_tokens: bool = False
    bundle_digest: str | None = None


@dataclass(frozen=True, slots=True)
class Errand:
    """What one worker is told of a partition.

    Attributes:
        partition: which rows.
        output_name: of the file of their scores.
    """

    partition: Partition
    output_name: str

    def as_json(self) -> bytes:
        """To be read by `from_json`."""
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, content: bytes) -> Errand:
        """What `as_json` wrote."""
        read = orjson.loads(content)
        return cls(Partition.of(read["partition"]), read["output_name"])


class PartitionScorer:
    """Reads a partition, scores it, writes it, and says how many pairs there were."""

    def __init__(self, work: Work, attempts: Attempts | SharedAttempts) -> None:
        """Loads nothing yet: who ends in here is started again by Ray, as often as it takes.

        Args:
            work: what, and where.
            attempts: of all workers.
        """
        self._work = work
        self._attempts = attempts
        self._output = Location.of(work.output)
        filesystem = Location.of(work.source).filesystem
        self._reader = PartitionReader(filesystem, work.columns, work.kept)
        self._scorer: PairScorer | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """One entry per partition: its pairs, and those that have an error.

        Raises:
            BundleError, ConfigurationError, SelfTestError: the model cannot be loaded here.
            ConfigurationError: a partition cannot be read or written, or ends who scores it.
        """
        if self._scorer is None:
            self._scorer = self._loaded()
        counts: dict[str, list[int]] = {"pairs": [], "errors": []}
        for content in batch["errand"]:
            table = self._done(Errand.from_json(content), self._scorer)
            counts["pairs"].append(len(table))
            counts["errors"].append(len(table) - table.column("error").null_count)
        return counts

    def _loaded(self) -> PairScorer:
        work, me = self._work, f"worker {this_worker()}"
        num_tries = self._attempts.begin(me)
        if num_tries > _MOST_LOADS:
            raise ConfigurationError(
                f"a worker on {platform.node()} ended {_MOST_LOADS} times while it loaded the "
                f"model; {_LOGS}"
            )
        try:
            scorer = PairScorer(
                work.bundle,
                work.settings,
                work.columns,
                with_tokens=work.with_tokens,
                digest=work.bundle_digest,
            )
        except (BundleError, ConfigurationError, SelfTestError):
            raise
        except Exception as error:  # of the device, which may have another opinion in a new process
            if num_tries < _MOST_LOADS:
                _end(error)
            raise ConfigurationError(
                f"the model cannot be loaded on {platform.node()}: {error}"
            ) from error
        self._attempts.done(me)
        return scorer

    def _done(self, errand: Errand, scorer: PairScorer) -> pa.Table:
        partition = errand.partition
        if self._attempts.begin(errand.output_name) > _MOST_ATTEMPTS:
            raise ConfigurationError(
                f"{partition}: {_MOST_ATTEMPTS} workers ended, one after the other, while they "
                f"scored them; {_LOGS}"
            )
        table = self._scored(partition, scorer)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        place = self._output / errand.output_name
        try:
            place.write(sink.getvalue().to_pybytes())
        except OSError as error:
            raise ConfigurationError(f"{place.path} cannot be written: {error}") from error
        self._attempts.done(errand.output_name)
        return table

    def _scored(self, partition: Partition, scorer: PairScorer) -> pa.Table:
        table, errors = self._reader.read(partition)
        scores = scorer.scores(table, errors, partition.first_row)
        file = pa.DictionaryArray.from_arrays(
            np.zeros(len(table), np.int32), pa.array([partition.file.path])
        )
        row = np.arange(partition.first_row, partition.first_row + len(table))
        kept = {name: table.column(name) for name in self._work.kept}
        made = pa.table({"file": file, "row": row} | kept | scores)
        return made.replace_schema_metadata({"seqloss": orjson.dumps(scorer.described)})


def _end(error: Exception) -> NoReturn:
    """Ray starts this worker again, and gives it what it had."""
    _LOG.critical("%s", error)
    os._exit(1)
