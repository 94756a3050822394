"""What the service itself costs per pair, stage by stage, without a model."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import numpy as np

from benchmarks.pairs import Pairs
from benchmarks.processes import in_own_process
from benchmarks.progress import say
from benchmarks.served import loss_body
from benchmarks.serving.clients import IdLimits, PairStream
from benchmarks.serving.figures import Figure, PartResult, Row, Wanted
from benchmarks.serving.queueing import TimedQueue, collated, scatter
from benchmarks.serving.workbench import Workbench
from fakes import fake_manifest
from seqloss import records
from seqloss.bundle.manifest import SpecialIds, Vocabulary
from seqloss.checking.check import check
from seqloss.http.columns import arrays_of, encode_loss_reply
from seqloss.http.schemas import parse_loss_request
from seqloss.loss.reduce import LabelSmoothing, reduce_terms
from seqloss.records import LengthLimits, Priority, Ragged, TokenTerms
from seqloss.scorer import ScoredRequest, Times, Usage

_BODY_PAIRS, _BODY_TOKENS = 512, 30
_BULK_PAIRS = 2048
# At most so many of those with many waiting pairs: one by one they take seconds.
_PACK_REPETITIONS: dict[Priority, int] = {"bulk": 15, "interactive": 3}
_IDS = IdLimits(vocabulary=58_101, max_tokens=512)
_LIMITS = LengthLimits(_IDS.max_tokens, _IDS.max_tokens)

_Result = TypeVar("_Result")


def measure(bench: Workbench) -> PartResult:
    """What the service itself costs, stage by stage, on one thread and without a model.

    A body of 512 pairs of 30 + 30 ids goes the whole way of a request; its terms are made up.
    Parsing is from the body's bytes to flat arrays, admitting makes a job of them in the queue,
    packing forms all batches, reducing and encoding lead to the reply's bytes. Then many pairs with
    the lengths of sentences wait at once, in requests of 2,048 and one by one, and all batches are
    formed of them. Medians of the repetitions.
    """
    plan = bench.plan
    say("stages")
    samples = in_own_process(_timed, plan.repetitions, plan.waiting_pairs)
    rows = [_row(name, times) for name, times in samples.items()]
    middle = {name: median(times) for name, times in samples.items()}
    body_ms = sum(middle[name] for name in _PARSING) * _BODY_PAIRS / 1000
    return PartResult(
        name="stages",
        about=measure.__doc__ or "",
        columns=("stage", "µs per pair", "least", "largest"),
        rows=rows,
        figures=[
            Figure("a body of 512 pairs to arrays, ms", body_ms, Wanted("at most", 4.0)),
            Figure(
                "packing pairs of requests of 2,048, µs per pair",
                middle[_WAITING["bulk"].format("pack")],
                Wanted("at most", 2.0),
            ),
        ],
        samples=samples,
    )


_PARSING = ("parse: JSON to lists", "parse: lists to arrays")
_WAITING: dict[Priority, str] = {
    "bulk": "{}, many waiting in requests of 2,048",
    "interactive": "{}, many waiting one by one",
}


def _row(name: str, times: list[float]) -> Row:
    return Row(name, (median(times), min(times), max(times)))


def _timed(repetitions: int, waiting_pairs: int) -> dict[str, list[float]]:
    """Microseconds per pair of each stage, one per repetition."""
    # As a server does once it has loaded: see `seqloss.http.server`.
    gc.collect()
    gc.freeze()
    stream = PairStream(_IDS)
    clock = _Clock()
    lengths = [_BODY_TOKENS] * _BODY_PAIRS
    body = loss_body(Pairs(stream.rows(lengths), stream.rows(lengths)), "bulk")
    _way_of(body, _Clock())  # what is made once is no cost
    for _ in range(repetitions):
        _way_of(body, clock)
    waiting = stream.take(waiting_pairs)
    sizes: dict[Priority, int] = {"bulk": _BULK_PAIRS, "interactive": 1}
    for priority, request_pairs in sizes.items():
        for _ in range(min(repetitions, _PACK_REPETITIONS[priority])):
            _packed(waiting, request_pairs, priority, clock)
    return dict(clock.samples)


class _Clock:
    """Times calls by name, in microseconds per pair."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, num_pairs: int, work: Callable[[], _Result]) -> _Result:
        started = time.perf_counter()
        result = work()
        self.samples[name].append((time.perf_counter() - started) * 1e6 / num_pairs)
        return result


def _way_of(body: bytes, clock: _Clock) -> None:
    """One request, from its body to its reply."""

    def timed(name: str, work: Callable[[], _Result]) -> _Result:
        return clock.time(name, _BODY_PAIRS, work)

    manifest = fake_manifest(
        vocabulary=Vocabulary(
            source=_IDS.vocabulary, target=_IDS.vocabulary, classes=_IDS.vocabulary
        ),
        special_ids=SpecialIds(decoder_start=_IDS.vocabulary - 1, pad=_IDS.vocabulary - 1, eos=0),
    )
    to_lists, to_arrays = _PARSING
    request = timed(to_lists, lambda: parse_loss_request(body, _BODY_PAIRS))
    arrays = timed(to_arrays, lambda: arrays_of(request))
    checked = timed("check", lambda: check(arrays, manifest, _LIMITS))
    queue = TimedQueue()
    job = timed("admit", lambda: queue.admit(checked.pairs, "bulk"))
    selections = timed("pack", lambda: queue.pack("bulk"))
    batches = timed("collate", lambda: [collated(selection) for selection in selections])
    terms = [_made_up_terms(batch.batch) for batch in batches]

    def scatter_all() -> None:
        for batch, its_terms in zip(batches, terms, strict=True):
            scatter(batch, its_terms)

    timed("scatter", scatter_all)
    scores = timed(
        "reduce",
        lambda: reduce_terms(
            job.outcome().terms,
            checked.counted_positions,
            arrays.target_ids.offsets,
            LabelSmoothing(),
            _IDS.vocabulary,
        ),
    )
    scored = ScoredRequest(
        scores=scores,
        faults=(),
        cut_source_tokens=checked.cut_source_tokens,
        cut_target_tokens=checked.cut_target_tokens,
        usage=Usage(
            source_tokens=checked.num_source_tokens,
            target_tokens=checked.num_target_tokens,
            encoded_sources=_BODY_PAIRS,
            batches=len(batches),
            queue_seconds=0.0,
            compute_seconds=0.0,
        ),
        times=Times(0.0, [], 0.0),
    )
    timed("encode the reply", lambda: encode_loss_reply("bench", request, scored))


def _made_up_terms(batch: records.Batch) -> TokenTerms:
    """What an engine would return."""
    logprobs = np.full(int(batch.counted.sum()), -1.5, np.float32)
    return TokenTerms(target_logprob=logprobs, mean_logprob=logprobs)


def _packed(waiting: Pairs, request_pairs: int, priority: Priority, clock: _Clock) -> None:
    """All batches of what waits in requests of this size."""
    count = len(waiting)
    requests = [
        _checked(waiting.part(start, start + request_pairs))
        for start in range(0, count, request_pairs)
    ]
    name = _WAITING[priority]
    queue = TimedQueue()

    def admit_all() -> None:
        for pairs in requests:
            queue.admit(pairs, priority)

    clock.time(name.format("admit"), count, admit_all)
    clock.time(name.format("pack"), count, lambda: queue.pack(priority))


def _checked(pairs: Pairs) -> records.Pairs:
    """As they come out of the checks."""
    labels = Ragged.from_rows(pairs.target_ids, np.int32)
    return records.Pairs(
        sources=Ragged.from_rows(pairs.source_ids, np.int32),
        source_index=np.arange(len(pairs), dtype=np.int32),
        labels=labels,
        counted=np.ones(len(labels.values), np.bool_),
        start_ids=np.full(len(pairs), _IDS.vocabulary - 1, np.int32),
    )
