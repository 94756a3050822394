"""`seqloss-client rerank`: n-best lists in the order of their losses."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from seqloss_client._client import LossClient
from seqloss_client.corpus.arguments import positive
from seqloss_client.corpus.errors import CorpusError
from seqloss_client.models import Chunk, LossResult
from seqloss_client.nbest import Hypothesis, NBestList, nbest_lists, read_hypotheses
from seqloss_client.plain_lines import LineWriter, read_lines, read_text_lines

_FAULTS_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that `run` reads."""
    parser.description = (
        "Adds the log-probability of every hypothesis, given its source, to Moses' n-best lists "
        "('id ||| hypothesis ||| features ||| score') and puts the likeliest first. A source is "
        "sent, and encoded, once with all its hypotheses."
    )
    parser.add_argument("--url", default="http://localhost:8000", help="the service's address")
    parser.add_argument("--model", help="the model's name; only needed where several are served")
    parser.add_argument("--sources", required=True, metavar="FILE", help="line k, from 0, is id k")
    parser.add_argument("--nbest", required=True, metavar="FILE", help="the lists; - for stdin")
    parser.add_argument("--output", default="-", metavar="FILE", help="- for stdout, the default")
    parser.add_argument("--best", action="store_true", help="write each list's first line only")
    parser.add_argument(
        "--normalize", action="store_true", help="per token, instead of the sum over tokens"
    )
    parser.add_argument(
        "--feature", default="seqloss", metavar="NAME", help="what the new feature is called"
    )
    parser.add_argument(
        "--ids",
        action="store_true",
        help="sources and hypotheses are token ids with spaces between",
    )
    parser.add_argument("--source-language", help="where the model's tokenizer asks for it")
    parser.add_argument("--target-language", help="where the model's tokenizer asks for it")
    parser.add_argument(
        "--hypotheses-per-request",
        type=positive,
        default=2000,
        metavar="N",
        help="a request has whole lists, so one long list may have more (default: %(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")


@dataclass(slots=True)
class Reranker:
    """Scores lists through a client and orders them.

    Attributes:
        client: speaks to the service.
        feature: what is added to each line.
        is_normalized: whether a loss is divided by its tokens.
        is_best_only: whether the other lines are left out.
        is_ids: whether texts are token ids.
        languages: of source and target.
        hypotheses_per_request: how many there are at most, unless one list has more.
        faults: filled as lists are read: (line number, what is wrong with the hypothesis).
    """

    client: LossClient
    feature: str = "seqloss"
    is_normalized: bool = False
    is_best_only: bool = False
    is_ids: bool = False
    languages: tuple[str | None, str | None] = (None, None)
    hypotheses_per_request: int = 2000
    faults: list[tuple[int, str]] = field(default_factory=list)

    def reranked(self, sources: Iterable[str], lines: Iterable[bytes]) -> Iterator[bytes]:
        """The lists' lines, each list's likeliest hypothesis first, equal ones as they were.

        A hypothesis that cannot be scored comes last, with the feature's value `nan`.

        Raises:
            CorpusError: see `nbest_lists`.
            SeqlossError: the service failed.
        """
        waiting: deque[tuple[NBestList, ...]] = deque()

        def chunks() -> Iterator[Chunk]:
            lists = nbest_lists(sources, read_hypotheses(lines, self.feature))
            for batch in _batches(lists, self.hypotheses_per_request):
                waiting.append(batch)
                yield self._chunk(batch)

        source_language, target_language = self.languages
        results = self.client.score_chunks(
            chunks(),
            source_language=source_language,
            target_language=target_language,
            reproducible=True,
        )
        for result in results:
            yield from self._ordered(waiting.popleft(), result)

    def _chunk(self, batch: Sequence[NBestList]) -> Chunk:
        sources = [nbest.source for nbest in batch]
        hypotheses = _hypotheses(batch)
        index = [place for place, nbest in enumerate(batch) for _ in nbest.hypotheses]
        if not self.is_ids:
            return Chunk(sources, [hypothesis.text for hypothesis in hypotheses], index)
        source_ids = [_ids(nbest.source, f"source {nbest.hypotheses[0].source}") for nbest in batch]
        target_ids = [
            _ids(hypothesis.text, f"n-best list, line {hypothesis.line_number}")
            for hypothesis in hypotheses
        ]
        return Chunk(source_ids, target_ids, index)

    def _ordered(self, batch: Sequence[NBestList], result: LossResult) -> Iterator[bytes]:
        hypotheses = _hypotheses(batch)
        for error in result.errors:
            self.faults.append((hypotheses[error.index].line_number, error.detail))
        losses = (result.mean_losses if self.is_normalized else result.losses).tolist()
        start = 0
        for nbest in batch:
            end = start + len(nbest.hypotheses)
            scored = sorted(zip(losses[start:end], nbest.hypotheses, strict=True), key=_last_if_nan)
            for loss, hypothesis in scored[:1] if self.is_best_only else scored:
                yield hypothesis.with_feature(self.feature, -loss)
            start = end


def _hypotheses(batch: Sequence[NBestList]) -> list[Hypothesis]:
    return [hypothesis for nbest in batch for hypothesis in nbest.hypotheses]


def _last_if_nan(scored: tuple[float, Hypothesis]) -> tuple[bool, float]:
    loss, _ = scored
    return (True, 0.0) if math.isnan(loss) else (False, loss)


def _batches(lists: Iterable[NBestList], size: int) -> Iterator[tuple[NBestList, ...]]:
    """Whole lists that have up to `size` hypotheses together, or one list that has more."""
    batch: list[NBestList] = []
    count = 0
    for nbest in lists:
        if batch and count + len(nbest.hypotheses) > size:
            yield tuple(batch)
            batch, count = [], 0
        batch.append(nbest)
        count += len(nbest.hypotheses)
    if batch:
        yield tuple(batch)


def _ids(text: str, where: str) -> list[int]:
    words = text.split()
    for word in words:
        if not re.fullmatch("[0-9]+", word):
            raise CorpusError(f"{where}: with --ids there are token ids only, {word!r} is none")
    return [int(word) for word in words]


def run(arguments: argparse.Namespace) -> int:
    """Writes the lists; the exit status is 0.

    Raises:
        SeqlossError: it could not be done.
    """
    with (
        LossClient(arguments.url, model=arguments.model, timeout=arguments.timeout) as client,
        closing(read_text_lines(arguments.sources)) as sources,
        closing(read_lines(arguments.nbest)) as lines,
        LineWriter(arguments.output) as output,
    ):
        reranker = Reranker(
            client,
            feature=arguments.feature,
            is_normalized=arguments.normalize,
            is_best_only=arguments.best,
            is_ids=arguments.ids,
            languages=(arguments.source_language, arguments.target_language),
            hypotheses_per_request=arguments.hypotheses_per_request,
        )
        num_lines = 0
        for line in reranker.reranked(sources, lines):
            output.write([line + b"\n"])
            num_lines += 1
    print(f"{num_lines:,} lines written to {arguments.output}", file=sys.stderr)
    _report(reranker.faults)
    return 0


def _report(faults: Sequence[tuple[int, str]]) -> None:
    if not faults:
        return
    print(f"{len(faults):,} hypotheses could not be scored and come last:", file=sys.stderr)
    for line_number, detail in faults[:_FAULTS_SHOWN]:
        print(f"  line {line_number}: {detail}", file=sys.stderr)
    if len(faults) > _FAULTS_SHOWN:
        print(f"  and {len(faults) - _FAULTS_SHOWN:,} more", file=sys.stderr)
