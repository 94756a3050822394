"""The client that blocks: httpx and threads around the protocol."""

from __future__ import annotations

import socket
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from typing import Any, TypeVar, Unpack

import httpx

from seqloss_client._chunks import Grouping, chunks_of
from seqloss_client._pace import Next, Pace, Window
from seqloss_client._protocol import HowToScore, Protocol, bulk_options
from seqloss_client._steps import Attempt, Conversation, Lost, Pause, Reply, Timing
from seqloss_client._transport import CAUGHT, key_headers, lost, reply_of, timeout_of
from seqloss_client.models import (
    Chunk,
    LossResult,
    ModelInfo,
    Options,
    Pair,
    PairScore,
    Rows,
    ScoringOptions,
)

_T = TypeVar("_T")
_Trace = Callable[[str, Mapping[str, Any]], None]


class LossClient:
    """Speaks to a seqloss service; may be used by several threads at once.

    Args:
        base_url: where the service is.
        model: the name of the model; None where only one is served.
        timeout: seconds to wait for each reply of a call without a deadline of its own.
        retries: how often a request that met no service, or a busy one, is sent again.
        api_key: for a service that asks for one; None for that of `SEQLOSS_API_KEY`, if any.
        headers: sent with every request.
        http: a client of yours, with its own transport, certificates or proxies; it stays open.
        timing: clocks, sleep and chance, for tests.
    """

    def __init__(  # noqa: PLR0913 - what there is to choose, each with a default
        self,
        base_url: str = "http://localhost:8000",
        *,
        model: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        http: httpx.Client | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._timing = timing or Timing()
        self._protocol = Protocol(
            base_url,
            model=model,
            headers=key_headers(api_key) | dict(headers or {}),
            retries=retries,
            reply_seconds=timeout,
            timing=self._timing,
        )
        self._http = http or httpx.Client()
        self._owns_http = http is None

    def loss(
        self,
        source_ids: Rows,
        target_ids: Rows,
        *,
        source_index: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> LossResult:
        """Scores targets of token ids, given their sources.

        Args:
            source_ids: rows of ids; nothing is added or removed.
            target_ids: rows of ids; -100 marks positions that do not count.
            source_index: the source of each target; None: target i goes with source i.
            **options: see `ScoringOptions`.

        Raises:
            TypeError, ValueError: arguments that no service would take.
            SeqlossError: see `seqloss_client.errors`.
        """
        chunk = Chunk(source_ids, target_ids, source_index)
        return self._run(self._protocol.loss(chunk, HowToScore(ScoringOptions(**options))))

    def loss_text(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        source_index: Sequence[int] | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        tokens: bool = False,
        **options: Unpack[Options],
    ) -> LossResult:
        """Scores strings: the model's own tokenizer makes the ids.

        Args:
            sources: strings.
            targets: strings.
            source_index: the source of each target; None: target i goes with source i.
            source_language: where the model is told it.
            target_language: likewise.
            tokens: whether the reply says what the tokens are and where they stand.
            **options: see `ScoringOptions`; those that are about ids are refused.

        Raises:
            TypeError, ValueError: arguments that no service would take.
            SeqlossError: see `seqloss_client.errors`.
        """
        chunk = Chunk(sources, targets, source_index)
        how = HowToScore(ScoringOptions(**options), source_language, target_language, tokens)
        return self._run(self._protocol.loss_text(chunk, how))

    def score_chunks(
        self,
        chunks: Iterable[Chunk],
        *,
        source_language: str | None = None,
        target_language: str | None = None,
        tokens: bool = False,
        max_requests: int = 16,
        retry_for: float = 60.0,
        **options: Unpack[Options],
    ) -> Generator[LossResult, None, None]:
        """Scores each chunk with a request of its own; results come in the order of the chunks.

        As many requests are under way as the service takes without refusing any. Chunks are read
        as they are needed, at most `max_requests` ahead of the results. An error of `chunks` or of
        a request is raised where its result would have come. Closing the iterator ends what is
        under way.

        Args:
            chunks: strings or ids.
            source_language: for chunks of strings, as in `loss_text`.
            target_language: likewise.
            tokens: likewise.
            max_requests: the most requests under way, and chunks in memory.
            retry_for: seconds that a chunk is tried again beyond the client's `retries`, from its
                first failure on, so that a service may be started anew.
            **options: as in `loss`, but `priority` is `bulk` and `on_error` is `partial` unless
                given.
        """
        how = HowToScore(bulk_options(options), source_language, target_language, tokens, retry_for)
        return self._scored(chunks, how, Pace(max_requests))

    def score_iterable(
        self,
        pairs: Iterable[Pair],
        *,
        pairs_per_request: int = 2000,
        source_language: str | None = None,
        target_language: str | None = None,
        max_requests: int = 16,
        retry_for: float = 60.0,
        **options: Unpack[Options],
    ) -> Generator[PairScore, None, None]:
        """Scores pairs of ids or of strings, lazily and in order; see `score_chunks`.

        Args:
            pairs: (source, target), all strings or all ids.
            pairs_per_request: how many pairs a request has.
            source_language: for strings, as in `loss_text`.
            target_language: likewise.
            max_requests: the most requests under way; `max_requests * pairs_per_request` pairs are
                in memory.
            retry_for: as in `score_chunks`.
            **options: as in `score_chunks`.
        """
        how = HowToScore(
            bulk_options(options), source_language, target_language, retry_for=retry_for
        )
        chunks = chunks_of(pairs, Grouping(pairs_per_request))
        return self._flattened(chunks, how, Pace(max_requests))

    def models(self) -> list[ModelInfo]:
        """What is served."""
        return self._run(self._protocol.models())

    def ready(self) -> bool:
        """Whether the service takes requests; False where nothing answers."""
        return self._run(self._protocol.ready())

    def close(self) -> None:
        """Closes the connections, unless they belong to a client that was given."""
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> LossClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flattened(
        self, chunks: Iterable[Chunk], how: HowToScore, pace: Pace
    ) -> Generator[PairScore, None, None]:
        with closing(self._scored(chunks, how, pace)) as results:
            for result in results:
                yield from result.pairs()

    def _scored(
        self, chunks: Iterable[Chunk], how: HowToScore, pace: Pace
    ) -> Generator[LossResult, None, None]:
        source = iter(chunks)
        window: Window[Future[LossResult]] = Window(pace)
        stop = _Stop()

        def score(chunk: Chunk) -> LossResult:
            return self._run(self._protocol.score(chunk, how, pace), stop.pause, stop.trace)

        pool = ThreadPoolExecutor(pace.most, "seqloss-client")
        try:
            while (step := window.next_step()) is not Next.END:
                if step is Next.READ:
                    try:
                        chunk = next(source)
                    except StopIteration:
                        window.end()
                    except Exception as error:  # raised again once its turn comes
                        window.end(error)
                    else:
                        window.add(pool.submit(score, chunk))
                elif step is Next.YIELD:
                    yield window.pop().result()
                else:
                    wait(window.running(), return_when=FIRST_COMPLETED)
        finally:
            stop.now()
            pool.shutdown(cancel_futures=True)
        window.raise_input_error()

    def _run(
        self,
        conversation: Conversation[_T],
        pause: Callable[[float], None] | None = None,
        trace: _Trace | None = None,
    ) -> _T:
        """Does what the conversation asks for, and returns what it comes to."""
        pause = pause or self._timing.sleep
        outcome: Reply | Lost | None = None
        try:
            while True:
                step = conversation.send(outcome)
                if isinstance(step, Pause):
                    pause(step.seconds)
                    outcome = None
                else:
                    outcome = self._send(step, trace)
        except StopIteration as end:
            result: _T = end.value
            return result
        finally:
            conversation.close()

    def _send(self, attempt: Attempt, trace: _Trace | None) -> Reply | Lost:
        request = attempt.request
        try:
            response = self._http.request(
                request.method,
                request.url,
                headers=request.headers,
                content=request.body,
                timeout=timeout_of(attempt),
                extensions={} if trace is None else {"trace": trace},
            )
        except CAUGHT as error:
            return lost(error)
        return reply_of(response)


class _StoppedError(Exception):
    """Ends a thread whose result nobody waits for."""


class _Stop:
    """Ends the requests of a bulk run: those that pause, and those that wait for a reply."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def now(self) -> None:
        """Ends them; a thread that waits for a reply finds its connection closed."""
        self._stopped.set()
        for one in list(self._sockets):
            _shut(one)

    def pause(self, seconds: float) -> None:
        """Waits; raises once it is over."""
        if self._stopped.wait(seconds):
            raise _StoppedError

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Learns of connections as httpcore makes them."""
        stream: Any = info.get("return_value")
        if event.startswith("connection.") and hasattr(stream, "get_extra_info"):
            opened = stream.get_extra_info("socket")
            if opened is not None:
                self._sockets.add(opened)
                if self._stopped.is_set():
                    _shut(opened)


def _shut(one: socket.socket) -> None:
    # Not the method of an SSL socket, which takes its state from under the thread that reads.
    with suppress(OSError):
        socket.socket.shutdown(one, socket.SHUT_RDWR)
