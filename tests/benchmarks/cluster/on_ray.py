"""What is measured on Ray, and how it is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from ray import serve

from benchmarks.pairs import Pairs
from benchmarks.serving.workbench import Bundled
from seqloss.distributed.ray_data import Pool, score_dataset
from seqloss.distributed.ray_serve import Arguments, application
from seqloss.distributed.workers import Work
from seqloss_client import Chunk, LossClient, LossResult

_PORT, _OPERATORS_PORT = 18431, 18440
_REQUESTS_AT_ONCE = 8
# The client begins with two at once, and adds one after as many answers as there are at once.
_FIRST_REQUESTS = sum(range(2, _REQUESTS_AT_ONCE + 1))


@dataclass(frozen=True, slots=True)
class OnRay:
    """A bundle, how it is run, and with how many threads each worker does."""

    bundled: Bundled

    @property
    def _settings(self) -> dict[str, object]:
        return {"device": self.bundled.device, "precision": self.bundled.precision}

    @contextmanager
    def served(self, replicas: int) -> Iterator[str]:
        """On Ray Serve; the URL of its proxy."""
        arguments = Arguments(
            models={"bench": self.bundled.bundle},
            settings=self._settings | {"threads": 1, "admin_port": _OPERATORS_PORT},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": _PORT})
        deployment = application(arguments)._bound_deployment.options(  # type: ignore[attr-defined]
            num_replicas=replicas, ray_actor_options={"num_cpus": 1}
        )
        serve.run(deployment.bind(arguments.models, arguments.settings), name="bench")
        try:
            yield f"http://127.0.0.1:{_PORT}"
        finally:
            serve.shutdown()

    def dataset_rate(self, dataset: Path, output: Path, workers: int, rows: int) -> float:
        """Pairs per second of Ray Data, from when each worker has done its first partition on."""
        pool = Pool(partition_rows=rows, workers=workers, cpus_per_worker=1)
        times = [
            (time.perf_counter(), progress.pairs)
            for progress in score_dataset(self._work(dataset, output), pool)
        ]
        (began, before), (ended, after) = times[workers], times[-1]
        return (after - before) / (ended - began)

    def dataset_nlls(self, dataset: Path, output: Path) -> list[float]:
        """The nll of each pair, in order, by Ray Data with two workers."""
        for _ in score_dataset(self._work(dataset, output), Pool(workers=2, cpus_per_worker=1)):
            pass
        tables = [pq.read_table(path, columns=["nll"]) for path in sorted(output.glob("*.parquet"))]
        nlls: list[float] = pa.concat_tables(tables).column("nll").to_pylist()
        return nlls

    def _work(self, dataset: Path, output: Path) -> Work:
        return Work(str(dataset), str(output), str(self.bundled.bundle), self._settings)


def client_nlls(url: str, pairs: Pairs, pairs_per_request: int) -> list[float]:
    """The nll of each pair, in order, by the client, whose bits depend on nobody else."""
    return [nll for result in _results(url, pairs, pairs_per_request) for nll in result.nlls]


def client_rate(url: str, pairs: Pairs, pairs_per_request: int) -> float:
    """Pairs per second of the client, while as many requests are under way as ever will be."""
    ends = [time.perf_counter() for _ in _results(url, pairs, pairs_per_request)]
    steady = ends[_FIRST_REQUESTS:-_REQUESTS_AT_ONCE]
    return (len(steady) - 1) * pairs_per_request / (steady[-1] - steady[0])


def _results(url: str, pairs: Pairs, pairs_per_request: int) -> Iterator[LossResult]:
    chunks = (
        Chunk(part.source_ids, part.target_ids)
        for at in range(0, len(pairs), pairs_per_request)
        for part in [pairs.part(at, at + pairs_per_request)]
    )
    with LossClient(url, timeout=600) as client:
        yield from client.score_chunks(chunks, max_requests=_REQUESTS_AT_ONCE, reproducible=True)


def write_dataset(pairs: Pairs, path: Path) -> None:
    """The pairs as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"source_ids": pairs.source_ids, "target_ids": pairs.target_ids}), path)
