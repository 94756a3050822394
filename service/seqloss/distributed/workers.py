"""What a worker of Ray Data does: a model in its own process, and tables of pairs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from seqloss.distributed import json_lines, partitions
from seqloss.distributed.offline import OfflineModel
from seqloss.distributed.partitions import Partition
from seqloss.distributed.storage import Location
from seqloss.distributed.tables import Errors, PairColumns, request_of, scores_of
from seqloss.errors import ConfigurationError, EngineDeadError

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
    ) -> None:
        """Loads the model, and waits until it is ready.

        Args:
            bundle: its folder, on every machine.
            settings: of the engine and its batches, by their names.
            columns: where the pairs are; None for `source_ids` and `target_ids`.
            with_tokens: whether there is a column of each token's nll.

        Raises:
            BundleError, ConfigurationError, EngineDeadError: it cannot be loaded.
        """
        self._model = OfflineModel(Path(bundle), dict(settings or {}))
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

    def scores(self, table: pa.Table, errors: Errors) -> dict[str, pa.Array]:
        """Columns of scores alone; rows that have errors already keep them."""
        request, found = request_of(table, self._columns, self._model.text_encoder)
        try:
            scored = self._model.score(request)
        except EngineDeadError as error:
            # Ray starts this worker again, and gives it what it had.
            _LOG.critical("%s", error)
            os._exit(1)
        return scores_of(scored, found | errors, with_tokens=self._with_tokens)

    @property
    def described(self) -> dict[str, str]:
        """What computes."""
        return self._model.described


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
    """

    source: str
    output: str
    bundle: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    columns: PairColumns = field(default_factory=PairColumns)
    kept: tuple[str, ...] = ()
    with_tokens: bool = False


class PartitionScorer:
    """Reads a partition, scores it, writes it, and says how many pairs there were."""

    def __init__(self, work: Work) -> None:
        """Loads the model; raises as `PairScorer` does."""
        columns = work.columns
        self._work = work
        self._scorer = PairScorer(work.bundle, work.settings, columns, with_tokens=work.with_tokens)
        self._output = Location.of(work.output)
        self._filesystem = Location.of(work.source).filesystem
        names = dict.fromkeys((columns.source, columns.target, *work.kept))
        self._parquet = partitions.ParquetReader(self._filesystem, tuple(names))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """One entry per partition: its pairs, and those that have an error."""
        counts: dict[str, list[int]] = {"pairs": [], "errors": []}
        for content in batch["partition"]:
            partition = Partition(**orjson.loads(content))
            table = self._scored(partition)
            partitions.write_rows(self._output, partition, table)
            counts["pairs"].append(len(table))
            counts["errors"].append(len(table) - table.column("error").null_count)
        return counts

    def _scored(self, partition: Partition) -> pa.Table:
        table, errors = self._read(partition)
        scores = self._scorer.scores(table, errors)
        file = pa.DictionaryArray.from_arrays(
            np.zeros(len(table), np.int32), pa.array([partition.file])
        )
        row = np.arange(partition.first_row, partition.first_row + len(table))
        kept = {name: table.column(name) for name in self._work.kept}
        made = pa.table({"file": file, "row": row} | kept | scores)
        return made.replace_schema_metadata({"seqloss": orjson.dumps(self._scorer.described)})

    def _read(self, partition: Partition) -> tuple[pa.Table, Errors]:
        if partitions.is_parquet(partition.file):
            return self._parquet.read(partition), {}
        lines = partitions.read_lines(self._filesystem, partition)
        return json_lines.table_of(lines, self._work.columns, self._work.kept)
