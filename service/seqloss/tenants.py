"""Who may ask: tenants with their keys, and what each of them may have."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from seqloss.errors import (
    AuthenticationError,
    ConfigurationError,
    ForbiddenError,
    QuotaExceededError,
)
from seqloss.records import PRIORITIES, Priority

# Whose requests are, where no keys are asked for.
ANONYMOUS = "anonymous"

_DIGEST = "sha256:"
_SHORTEST_KEY = 16
_MINUTE = 60.0
_NAME = r"[A-Za-z0-9._-]{1,64}"


class Quota:
    """Tokens that a tenant may have computed: so many a minute, and a minute's worth at once.

    What is left runs full at a steady rate.  A request is taken where anything is left, and what it
    takes beyond that is owed: however large requests are, none is too large for good, and over time
    nobody has more than the rate.
    """

    def __init__(self, tokens_per_minute: int, clock: Callable[[], float]) -> None:
        self.tokens_per_minute = tokens_per_minute
        self._most = float(tokens_per_minute)
        self._left = self._most
        self._clock = clock
        self._at = clock()

    def take(self, num_tokens: int) -> None:
        """Counts the tokens of a request.

        Raises:
            QuotaExceededError: nothing is left now.
        """
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._most / _MINUTE)
        self._at = now
        if self._left <= 0:
            raise QuotaExceededError(
                f"the quota of {self._most:.0f} tokens per minute is used up; try again later",
                retry_after_seconds=max(1.0, (1.0 - self._left) * _MINUTE / self._most),
            )
        self._left -= num_tokens

    def give_back(self, num_tokens: int) -> None:
        """The tokens were not computed after all."""
        self._left += num_tokens


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose a request is, and what it may have.

    Attributes:
        name: in logs, metrics and the fairness of the queue.
        models: names of those that it may use; None for all.
        priorities: classes that its requests may wait in.
        quota: of tokens; None where there is none.
    """

    name: str = ANONYMOUS
    models: frozenset[str] | None = None
    priorities: tuple[Priority, ...] = PRIORITIES
    quota: Quota | None = None

    def may_use(self, model: str) -> bool:
        """Whether a model is among its own."""
        return self.models is None or model in self.models

    def require_priority(self, priority: Priority) -> None:
        """Refuses a class that is not among its own.

        Raises:
            ForbiddenError: it is not.
        """
        if priority not in self.priorities:
            raise ForbiddenError(
                f"this key may not ask for priority {priority!r}, but for: "
                f"{', '.join(self.priorities)}"
            )


@dataclass(frozen=True, slots=True)
class Tenants:
    """All of them, by the digests of their keys; where there is none, everybody is welcome."""

    by_digest: dict[bytes, Tenant] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_digest)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that `of_key` can answer with."""
        return tuple(dict.fromkeys(one.name for one in self.by_digest.values())) or (ANONYMOUS,)

    def of_key(self, key: str | None) -> Tenant:
        """The tenant of a key.

        It takes the same time whichever key is given: digests are compared, and with all of them.

        Raises:
            AuthenticationError: a key is needed and none was given, or nobody has this one.
        """
        if not self.by_digest:
            return Tenant()
        if not key:
            raise AuthenticationError(
                "this needs an API key: send Authorization: Bearer KEY, or X-API-Key: KEY"
            )
        given = _digest_of(key)
        found = None
        for digest, tenant in self.by_digest.items():
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None:
            raise AuthenticationError("nobody has this API key")
        return found


def _digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


# ---------------------------------------------------------------- the file


def _stored(key: str) -> str:
    """Never says what the key is: the message goes to a log."""
    if key.startswith(_DIGEST):
        if not re.fullmatch(r"[0-9a-f]{64}", key.removeprefix(_DIGEST)):
            raise ValueError(f"after {_DIGEST} come 64 digits of 0-9 and a-f")
    elif len(key) < _SHORTEST_KEY:
        raise ValueError(f"a key has at least {_SHORTEST_KEY} characters")
    elif not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("a key is of printable ASCII characters without spaces")
    return key


class _TenantEntry(BaseModel):
    """What stands under `[tenants.NAME]`."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: list[Annotated[str, AfterValidator(_stored)]] = Field(min_length=1)
    models: list[str] | None = None
    priorities: list[Priority] = Field(list(PRIORITIES), min_length=1)
    tokens_per_minute: int | None = Field(None, ge=1)


class _TenantsFile(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    tenants: dict[Annotated[str, Field(pattern=f"^{_NAME}$")], _TenantEntry] = Field(min_length=1)


_FILE = TypeAdapter(_TenantsFile)


def read_tenants(path: Path, clock: Callable[[], float], before: Tenants = Tenants()) -> Tenants:
    """The tenants of a TOML file.

        [tenants.news]
        keys = ["sha256:..."]             # of the key, in hex; or the key itself
        models = ["en-de"]                # all where it is missing
        priorities = ["bulk"]             # both where it is missing
        tokens_per_minute = 1_000_000     # no quota where it is missing

    Args:
        path: the file.
        clock: seconds that only rise, for the quotas.
        before: what the file said before; a quota that it does not change goes on.

    Raises:
        ConfigurationError: it cannot be read, or something in it is wrong; it names no key.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else _place_of(error)
        raise ConfigurationError(f"the API keys in {path} cannot be read: {reason}") from None
    try:
        # In strict mode a list of priorities is one of strings; JSON has no other.
        entries = _FILE.validate_json(json.dumps(document), strict=True).tenants
    except (ValidationError, TypeError) as error:
        faults = error.errors() if isinstance(error, ValidationError) else []
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in faults)
        raise ConfigurationError(
            f"the API keys in {path} are wrong: {wrong or 'dates have no place here'}"
        ) from None
    quotas = {one.name: one.quota for one in before.by_digest.values()}
    by_digest: dict[bytes, Tenant] = {}
    for name, entry in entries.items():
        rate, quota = entry.tokens_per_minute, quotas.get(name)
        if quota is None or quota.tokens_per_minute != rate:
            quota = None if rate is None else Quota(rate, clock)
        models = None if entry.models is None else frozenset(entry.models)
        tenant = Tenant(name, models, tuple(entry.priorities), quota)
        for key in entry.keys:
            is_digest = key.startswith(_DIGEST)
            digest = bytes.fromhex(key.removeprefix(_DIGEST)) if is_digest else _digest_of(key)
            if digest in by_digest:
                raise ConfigurationError(
                    f"the API keys in {path} are wrong: {by_digest[digest].name} and {name} have "
                    "the same key"
                )
            by_digest[digest] = tenant
    return Tenants(by_digest)


def _place_of(error: Exception) -> str:
    """Where the file breaks off, without what stands there: that may be a key."""
    match = re.search(r"\(at (.*)\)$", str(error))
    return f"it is not TOML{f' ({match[1]})' if match else ''}"
