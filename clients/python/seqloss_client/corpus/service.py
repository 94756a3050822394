"""The model behind the service: which one it is, and that it stays the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from seqloss_client import (
    ConnectionFailed,
    LossClient,
    ModelInfo,
    Overloaded,
    RequestTimeout,
    Unavailable,
)
from seqloss_client.corpus.errors import CorpusError

_T = TypeVar("_T")
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 5.0


class ServedModel:
    """One model, with patience for a service that is being started.

    Args:
        client: of the service.
        name: of the model; None where only one is served.
        retry_for: seconds that a service may be away.
    """

    def __init__(self, client: LossClient, name: str | None, retry_for: float) -> None:
        self._client = client
        self._name = name
        self._retry_for = retry_for
        self._identity = _identity(self._patiently(self._when_ready))

    @property
    def identity(self) -> dict[str, str | None]:
        """All that its numbers depend on, by name."""
        return dict(self._identity)

    def check(self) -> None:
        """Raises CorpusError where another model, or another bundle, has taken its place."""
        now = _identity(self._patiently(self._found))
        # What is not loaded yet has no engine, device or precision.
        differing = [
            name
            for name, value in now.items()
            if value is not None and value != self._identity[name]
        ]
        if differing:
            listed = "".join(
                f"\n  - {name}: {self._identity[name]} before, {now[name]} now"
                for name in differing
            )
            raise CorpusError(
                f"the service has another model than when the run began:{listed}\n"
                "serve what it had and start the same command again, or begin anew"
            )

    def _found(self) -> ModelInfo:
        models = {model.name: model for model in self._client.models()}
        served = ", ".join(models)
        if self._name is None:
            if len(models) != 1:
                raise CorpusError(f"several models are served; choose with --model: {served}")
            return next(iter(models.values()))
        if self._name not in models:
            raise CorpusError(f"there is no model {self._name!r}; served are: {served}")
        return models[self._name]

    def _when_ready(self) -> ModelInfo:
        model = self._found()
        if model.state == "failed":
            raise CorpusError(f"model {model.name!r} has failed; the service's log says why")
        if model.state != "ready":
            raise _NotReadyError(f"model {model.name!r} is {model.state}")
        return model

    def _patiently(self, ask: Callable[[], _T]) -> _T:
        started = time.monotonic()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return ask()
            except (
                ConnectionFailed,
                RequestTimeout,
                Overloaded,
                Unavailable,
                _NotReadyError,
            ):
                if time.monotonic() - started + pause > self._retry_for:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


class _NotReadyError(CorpusError):
    """It will be."""


def _identity(model: ModelInfo) -> dict[str, str | None]:
    return {
        "model": model.name,
        "bundle": model.bundle_digest,
        "engine": model.engine,
        "device": model.device,
        "precision": model.precision,
    }
