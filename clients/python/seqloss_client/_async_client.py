"""The asynchronous client: httpx and tasks of asyncio around the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from typing import TypeVar, Unpack

import httpx

from seqloss_client._chunks import Grouping
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


class AsyncLossClient:
    """`LossClient` for asyncio: the same arguments, results and errors.

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
        http: httpx.AsyncClient | None = None,
        timing: Timing | None = None,
    ) -> None:
        timing = timing or Timing()
        self._sleep = timing.async_sleep or asyncio.sleep
        self._protocol = Protocol(
            base_url,
            model=model,
            headers=key_headers(api_key) | dict(headers or {}),
            retries=retries,
            reply_seconds=timeout,
            timing=timing,
        )
        self._http = http or httpx.AsyncClient()
        self._owns_http = http is None

    async def loss(
        self,
        source_ids: Rows,
        target_ids: Rows,
        *,
        source_index: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> LossResult:
        """As `LossClient.loss`."""
        chunk = Chunk(source_ids, target_ids, source_index)
        return await self._run(self._protocol.loss(chunk, HowToScore(ScoringOptions(**options))))

    async def loss_text(
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
        """As `LossClient.loss_text`."""
        chunk = Chunk(sources, targets, source_index)
        how = HowToScore(ScoringOptions(**options), source_language, target_language, tokens)
        return await self._run(self._protocol.loss_text(chunk, how))

    def score_chunks(
        self,
        chunks: Iterable[Chunk] | AsyncIterable[Chunk],
        *,
        source_language: str | None = None,
        target_language: str | None = None,
        tokens: bool = False,
        max_requests: int = 16,
        retry_for: float = 60.0,
        **options: Unpack[Options],
    ) -> AsyncGenerator[LossResult, None]:
        """As `LossClient.score_chunks`; `chunks` may be asynchronous.

        Who leaves the loop early should close the iterator (`contextlib.aclosing`), which ends what
        is under way at once.
        """
        how = HowToScore(bulk_options(options), source_language, target_language, tokens, retry_for)
        return self._scored(chunks, how, Pace(max_requests))

    def score_iterable(
        self,
        pairs: Iterable[Pair] | AsyncIterable[Pair],
        *,
        pairs_per_request: int = 2000,
        source_language: str | None = None,
        target_language: str | None = None,
        max_requests: int = 16,
        retry_for: float = 60.0,
        **options: Unpack[Options],
    ) -> AsyncGenerator[PairScore, None]:
        """As `LossClient.score_iterable`; `pairs` may be asynchronous, see `score_chunks`."""
        how = HowToScore(
            bulk_options(options), source_language, target_language, retry_for=retry_for
        )
        chunks = _chunks_of(pairs, Grouping(pairs_per_request))
        return self._flattened(chunks, how, Pace(max_requests))

    async def models(self) -> list[ModelInfo]:
        """What is served."""
        return await self._run(self._protocol.models())

    async def ready(self) -> bool:
        """Whether the service takes requests; False where nothing answers."""
        return await self._run(self._protocol.ready())

    async def close(self) -> None:
        """Closes the connections, unless they belong to a client that was given."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> AsyncLossClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _flattened(
        self, chunks: AsyncIterator[Chunk], how: HowToScore, pace: Pace
    ) -> AsyncGenerator[PairScore, None]:
        async with aclosing(self._scored(chunks, how, pace)) as results:
            async for result in results:
                for score in result.pairs():
                    yield score

    async def _scored(
        self, chunks: Iterable[Chunk] | AsyncIterable[Chunk], how: HowToScore, pace: Pace
    ) -> AsyncGenerator[LossResult, None]:
        source = _asynchronous(chunks)
        window: Window[asyncio.Task[LossResult]] = Window(pace)
        try:
            while (step := window.next_step()) is not Next.END:
                if step is Next.READ:
                    try:
                        chunk = await anext(source)
                    except StopAsyncIteration:
                        window.end()
                    except Exception as error:  # raised again once its turn comes
                        window.end(error)
                    else:
                        scoring = self._run(self._protocol.score(chunk, how, pace))
                        window.add(asyncio.create_task(scoring))
                elif step is Next.YIELD:
                    yield window.pop().result()
                else:
                    await asyncio.wait(window.running(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(window.rest())
        window.raise_input_error()

    async def _run(self, conversation: Conversation[_T]) -> _T:
        """Does what the conversation asks for, and returns what it comes to."""
        outcome: Reply | Lost | None = None
        try:
            while True:
                step = conversation.send(outcome)
                if isinstance(step, Pause):
                    await self._sleep(step.seconds)
                    outcome = None
                else:
                    outcome = await self._send(step)
        except StopIteration as end:
            result: _T = end.value
            return result
        finally:
            conversation.close()

    async def _send(self, attempt: Attempt) -> Reply | Lost:
        request = attempt.request
        try:
            response = await self._http.request(
                request.method,
                request.url,
                headers=request.headers,
                content=request.body,
                timeout=timeout_of(attempt),
            )
        except CAUGHT as error:
            return lost(error)
        return reply_of(response)


async def _cancel(tasks: Iterable[asyncio.Task[LossResult]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _asynchronous(items: Iterable[_T] | AsyncIterable[_T]) -> AsyncIterator[_T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def _chunks_of(
    pairs: Iterable[Pair] | AsyncIterable[Pair], grouping: Grouping
) -> AsyncIterator[Chunk]:
    try:
        async for pair in _asynchronous(pairs):
            if (chunk := grouping.add(pair)) is not None:
                yield chunk
    except Exception:
        if (chunk := grouping.rest()) is not None:
            yield chunk
        raise
    if (chunk := grouping.rest()) is not None:
        yield chunk
