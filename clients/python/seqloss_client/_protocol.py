"""What is said to the service and read from it, without any I/O: see `_steps`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from seqloss_client import _binary_wire, _json_wire
from seqloss_client._pace import Pace
from seqloss_client._pairs import IdPairs, id_pairs
from seqloss_client._retry import Patience, exchange, not_ours, problem_of, read_object
from seqloss_client._steps import Attempt, Conversation, Lost, Reply, Request, Timing
from seqloss_client.errors import ConnectionFailed, NotFound
from seqloss_client.models import Chunk, LossResult, ModelInfo, Options, ScoringOptions

# Ids and lengths in a request of JSON at most.  Both wires bring the same numbers; beyond this,
# making text of them and reading it again costs either side more than half a millisecond.
JSON_UP_TO = 4096

# A bulk request waits behind others of its own run.
_BULK_REPLY_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class HowToScore:
    """What is the same for all requests of a run.

    Attributes:
        scoring: the options of each request.
        source_language, target_language, tokens: for strings alone.
        retry_for: seconds from a request's first failure for which it is sent again in any case.
    """

    scoring: ScoringOptions
    source_language: str | None = None
    target_language: str | None = None
    tokens: bool = False
    retry_for: float = 0.0


def bulk_options(options: Options) -> ScoringOptions:
    """Options of a bulk run: others go first, and a bad pair does not stop it."""
    defaults: Options = {"priority": "bulk", "on_error": "partial"}
    return ScoringOptions(**(defaults | options))


class Protocol:
    """The conversations of one client.

    Args:
        base_url: where the service is.
        model: the name of the model, or None.
        headers: of every request.
        retries: how often a request is sent again.
        reply_seconds: how long to wait for a reply where a call has no deadline.
        timing: clocks and chance.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None,
        headers: Mapping[str, str],
        retries: int,
        reply_seconds: float,
        timing: Timing,
    ) -> None:
        if retries < 0:
            raise ValueError(f"retries is {retries} and must not be negative")
        if not reply_seconds > 0:
            raise ValueError(f"timeout is {reply_seconds} and must be seconds over 0")
        self._base_url = base_url.rstrip("/")
        self._model = model
        self._found_model: str | None = None
        # Losses hardly compress, and on one machine the service would do it for nothing.
        self._headers = {"Accept-Encoding": "identity"} | dict(headers)
        self._patience = Patience(retries, 0.0, reply_seconds)
        self._timing = timing

    def score(
        self, chunk: Chunk, how: HowToScore, pace: Pace | None = None
    ) -> Conversation[LossResult]:
        """Scores strings or ids; `pace` is that of a bulk run."""
        if chunk.is_text:
            return (yield from self.loss_text(chunk, how, pace))
        if how.source_language or how.target_language or how.tokens:
            raise ValueError("languages and tokens are for strings, and these are ids")
        return (yield from self.loss(chunk, how, pace))

    def loss(
        self, chunk: Chunk, how: HowToScore, pace: Pace | None = None
    ) -> Conversation[LossResult]:
        """Scores ids, on the wire that costs least."""
        pairs, options = id_pairs(chunk, how.scoring), how.scoring
        patience = self._patience_for(how, pace)
        lengths = pairs.targets.lengths
        if pairs.size > JSON_UP_TO:
            model = self._model or (yield from self._only_model(patience))
            if model is not None:
                encode = partial(self._infer, pairs, options, model)
                try:
                    reply = yield from exchange(encode, patience, self._timing, pace)
                except NotFound:
                    self._found_model = None  # the service may have begun to serve another
                    raise
                return _binary_wire.read_result(reply, lengths)
        encode_json = partial(_json_wire.encode_ids, pairs, options, self._model)
        reply = yield from exchange(
            lambda left: self._post("/loss", encode_json(left)), patience, self._timing, pace
        )
        return _json_wire.read_result(reply, lengths)

    def loss_text(
        self, chunk: Chunk, how: HowToScore, pace: Pace | None = None
    ) -> Conversation[LossResult]:
        """Scores strings."""
        languages = {
            "source_language": how.source_language,
            "target_language": how.target_language,
        }
        encode = partial(
            _json_wire.encode_text, chunk, how.scoring, languages, how.tokens, self._model
        )
        reply = yield from exchange(
            lambda left: self._post("/loss/text", encode(left)),
            self._patience_for(how, pace),
            self._timing,
            pace,
        )
        return _json_wire.read_result(reply, None)

    def models(self) -> Conversation[list[ModelInfo]]:
        """What is served."""
        return self._models(self._patience)

    def ready(self) -> Conversation[bool]:
        """Whether the service takes requests; asks once."""
        outcome = yield Attempt(self._get("/health/ready"), self._patience.reply_seconds)
        if not isinstance(outcome, Reply):
            if isinstance(outcome, Lost) and outcome.is_final:
                raise ConnectionFailed(outcome.detail) from outcome.cause
            return False
        if outcome.status not in {200, 502, 503, 504}:
            raise problem_of(outcome, self._timing.wall_clock())
        return outcome.status == 200

    def _models(self, patience: Patience) -> Conversation[list[ModelInfo]]:
        reply = yield from exchange(lambda _: self._get("/models"), patience, self._timing)
        try:
            return [_model_info(model) for model in read_object(reply)["models"]]
        except (KeyError, TypeError) as error:
            raise not_ours(reply) from error

    def _only_model(self, patience: Patience) -> Conversation[str | None]:
        """The one model's name, asked for once; None where there are several."""
        if self._found_model is None:
            models = yield from self._models(patience)
            if len(models) != 1:
                return None
            self._found_model = models[0].name
        return self._found_model

    def _patience_for(self, how: HowToScore, pace: Pace | None) -> Patience:
        timeout, patience = how.scoring.timeout, self._patience
        wait = patience.reply_seconds
        return Patience(
            retries=patience.retries,
            retry_for=how.retry_for,
            reply_seconds=wait if pace is None else max(wait, _BULK_REPLY_SECONDS),
            deadline=None if timeout is None else self._timing.clock() + timeout,
        )

    def _get(self, path: str) -> Request:
        return Request("GET", self._base_url + path, self._headers)

    def _post(self, path: str, body: bytes) -> Request:
        return Request("POST", self._base_url + path, self._headers | _json_wire.HEADERS, body)

    def _infer(
        self, pairs: IdPairs, options: ScoringOptions, model: str, seconds_left: float | None
    ) -> Request:
        headers, body = _binary_wire.encode_ids(pairs, options, seconds_left)
        url = f"{self._base_url}/v2/models/{quote(model, safe='')}/infer"
        return Request("POST", url, self._headers | headers, body)


def _model_info(body: dict[str, Any]) -> ModelInfo:
    names = (name for name in ModelInfo.__dataclass_fields__ if name != "details")
    return ModelInfo(**{name: body[name] for name in names}, details=body)
