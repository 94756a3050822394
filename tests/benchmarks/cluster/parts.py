"""The parts of the benchmark: each measures one thing, in rounds."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx
import numpy as np

from benchmarks.cluster.on_ray import OnRay, client_nlls, client_rate, write_dataset
from benchmarks.models import MODELS, shape_of
from benchmarks.operations import useful_operations
from benchmarks.pairs import Pairs, sentence_lengths
from benchmarks.progress import say
from benchmarks.served import loss_body
from benchmarks.serving.clients import PairStream
from benchmarks.serving.figures import Figure, PartResult, Row, Wanted
from benchmarks.serving.workbench import Workbench

_PARTITIONS = 16
_PAIRS_PER_REQUEST = 16
# Enough requests to leave out the first and the last ones.
LEAST_PAIRS = 64 * _PAIRS_PER_REQUEST
_SAME_PAIRS = 50_000
_SAME_PAIRS_PER_REQUEST = 2_000
_SINGLE_REQUESTS = 300
# What Ray looks for in the environment.
_HAPROXY_MODE = "RAY_SERVE_ENABLE_HA_PROXY"

# Dense products in bfloat16, by NVIDIA's data sheet of the H200 (half of what it states with
# sparsity).
_H200_OPERATIONS = 989e12
# Of it; what is aimed at for bulk, and no measurement.
_AIMED_SHARES = {"marian-base": 0.35, "nllb-600m": 0.55, "nllb-3.3b": 0.65}
_FLEET_LENGTHS = 10_000
_BILLION = 1e9
_SECONDS_PER_HOUR = 3600
# A number in JSON with its comma, and one of the reply with it.
_JSON_BYTES_PER_TOKEN, _JSON_BYTES_PER_SCORE = 6, 40


def data(bench: Workbench) -> PartResult:
    """Pairs per second of `seqloss ray-score`, with one worker of one thread and with two.

    Counted from when every worker has done its first partition, so that loading is not. Rounds
    take turns; ratios are of the same round.
    """
    pairs = PairStream(bench.model.limits).take(bench.plan.pairs)
    on_ray = OnRay(bench.model)
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(pairs, Path(folder) / "in" / "pairs.parquet")
        for number in range(bench.plan.rounds):
            for workers, found in rates.items():
                say(f"data: {workers} workers, round {number + 1} of {bench.plan.rounds}")
                output = Path(folder) / "out"
                rows = len(pairs) // _PARTITIONS
                found.append(on_ray.dataset_rate(Path(folder) / "in", output, workers, rows))
                shutil.rmtree(output)
    return _scaling("data", data.__doc__, "workers", rates)


def requests(bench: Workbench) -> PartResult:
    """Pairs per second through Ray Serve, with one replica of one thread and with two.

    The client sends requests of 16 pairs, and has two processors with all others. Counted is the
    time in which eight of them are under way: not how the client gets there, nor the end of a
    round, when a replica has nothing left. Rounds take turns; ratios are of the same round.
    """
    pairs = PairStream(bench.model.limits).take(bench.plan.pairs)
    on_ray = OnRay(bench.model)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(bench.plan.rounds):
        for replicas, found in rates.items():
            say(f"requests: {replicas} replicas, round {number + 1} of {bench.plan.rounds}")
            with on_ray.served(replicas) as url:
                found.append(client_rate(url, pairs, _PAIRS_PER_REQUEST))
    return _scaling("requests", requests.__doc__, "replicas", rates)


def _scaling(name: str, about: str | None, unit: str, rates: dict[int, list[float]]) -> PartResult:
    ratio = median(two / one for one, two in zip(rates[1], rates[2], strict=True))
    return PartResult(
        name=name,
        about=about or "",
        columns=(unit, "pairs/s", "least", "largest"),
        rows=[
            Row(str(number), (median(found), min(found), max(found)))
            for number, found in rates.items()
        ],
        figures=[Figure(f"two {unit} over one", ratio, Wanted("at least", 1.7))],
        samples={f"{number} {unit}, pairs/s": found for number, found in rates.items()},
    )


def latency(bench: Workbench) -> PartResult:
    """What Ray Serve adds to a request of one pair of the demo model, beside a plain service.

    Requests go one after the other, over connections that stay open, to each in turn.
    """
    pair = PairStream(bench.demo.limits).take(1)
    body = loss_body(pair, "interactive")
    by_ray = "Ray Serve, HAProxy" if os.environ.get(_HAPROXY_MODE) == "1" else "Ray Serve"
    found: dict[str, list[float]] = {"plain": [], by_ray: []}
    with bench.demo.serve() as plain, OnRay(bench.demo).served(1) as url:
        clients = {
            "plain": httpx.Client(base_url=plain.address),
            by_ray: httpx.Client(base_url=url),
        }
        say("latency")
        for _ in range(_SINGLE_REQUESTS):
            for name, client in clients.items():
                found[name].append(_milliseconds(client, body))
        for client in clients.values():
            client.close()
    kept = {name: values[_SINGLE_REQUESTS // 10 :] for name, values in found.items()}
    added = median(kept[by_ray]) - median(kept["plain"])
    return PartResult(
        name="latency",
        about=latency.__doc__ or "",
        columns=("service", "p50 ms", "p95 ms", "p99 ms"),
        rows=[
            Row(name, tuple(float(one) for one in np.percentile(values, [50, 95, 99])))
            for name, values in kept.items()
        ],
        figures=[Figure(f"added by {by_ray}, p50 ms", added, Wanted("at most", 11.0))],
        samples=kept,
    )


def _milliseconds(client: httpx.Client, body: bytes) -> float:
    started = time.perf_counter()
    reply = client.post("/loss", content=body, headers={"Content-Type": "application/json"})
    reply.raise_for_status()
    return 1000 * (time.perf_counter() - started)


def same(bench: Workbench) -> PartResult:
    """The same 50,000 pairs of the demo model, by Ray Data, by Ray Serve, by a plain service.

    How many have another float64 sum of float32 nlls than the plain service says, bit for bit.
    """
    pairs = PairStream(bench.demo.limits).take(_SAME_PAIRS)
    on_ray = OnRay(bench.demo)
    say("same: a plain service")
    with bench.demo.serve() as plain:
        expected = client_nlls(plain.address, pairs, _SAME_PAIRS_PER_REQUEST)
    say("same: Ray Serve")
    with on_ray.served(2) as url:
        by_serve = client_nlls(url, pairs, _SAME_PAIRS_PER_REQUEST)
    say("same: Ray Data")
    by_data = _by_data(on_ray, pairs)
    differing = {
        name: float(np.sum(np.array(nlls) != np.array(expected)))
        for name, nlls in (("Ray Serve", by_serve), ("Ray Data", by_data))
    }
    return PartResult(
        name="same",
        about=same.__doc__ or "",
        columns=("by", "pairs", "that differ"),
        rows=[Row(name, (len(pairs), number)) for name, number in differing.items()],
        figures=[
            Figure(f"differ by {name}", number, Wanted("at most", 0))
            for name, number in differing.items()
        ],
    )


def _by_data(on_ray: OnRay, pairs: Pairs) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(pairs, Path(folder) / "in" / "pairs.parquet")
        return on_ray.dataset_nlls(Path(folder) / "in", Path(folder) / "out")


def fleet(bench: Workbench) -> PartResult:
    """What a billion pairs would take on H200s: computed, not measured.

    Operations of pairs with the lengths of sentences, over the card's rate by its data sheet and
    the share of it that is aimed at: 0.35 for Marian-base, 0.55 for NLLB-600M, 0.65 for NLLB-3.3B.
    What is sent is JSON of ids, and an nll, a loss and a count back.
    """
    _, lengths = sentence_lengths(_FLEET_LENGTHS)
    tokens = lengths.sum() / len(lengths)
    rows = []
    for name, share in _AIMED_SHARES.items():
        shape = shape_of(MODELS[name].config())
        operations = useful_operations(shape, *lengths.T.tolist()) / len(lengths)
        rate = share * _H200_OPERATIONS / operations
        hours = _BILLION / rate / _SECONDS_PER_HOUR
        sent = rate * (tokens * _JSON_BYTES_PER_TOKEN + _JSON_BYTES_PER_SCORE) / 1e6
        rows.append(Row(name, (operations / 1e9, share, rate, hours, hours / 8, sent)))
    return PartResult(
        name="fleet",
        about=fleet.__doc__ or "",
        columns=(
            "model",
            "giga-operations per pair",
            "share",
            "pairs/s of one",
            "hours on one",
            "hours on eight",
            "MB/s of one",
        ),
        rows=rows,
        figures=[],
    )
