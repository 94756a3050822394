from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from seqloss.errors import (
    AuthenticationError,
    ConfigurationError,
    ForbiddenError,
    QuotaExceededError,
)
from seqloss.tenants import ANONYMOUS, Quota, Tenants, read_tenants

KEY, OTHER = "a-key-of-sixteen-and-more", "another-key-of-sixteen"


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def tenants_of(path: Path, text: str, clock: Clock | None = None, **more: Tenants) -> Tenants:
    path = path / "keys.toml"
    path.write_text(text)
    return read_tenants(path, clock or Clock(), **more)


def test_a_key_names_its_tenant_and_what_it_may_have(tmp_path: Path) -> None:
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    tenants = tenants_of(
        tmp_path,
        f"""
        [tenants.news]
        keys = ["{KEY}"]
        models = ["en-de"]
        priorities = ["bulk"]
        tokens_per_minute = 600

        [tenants.web]
        keys = ["sha256:{digest}"]
        """,
    )
    news, web = tenants.of_key(KEY), tenants.of_key(OTHER)
    assert (news.name, web.name) == ("news", "web")
    assert tenants.names == ("news", "web")
    assert (news.may_use("en-de"), news.may_use("de-en"), web.may_use("de-en")) == (
        True,
        False,
        True,
    )
    news.require_priority("bulk")
    web.require_priority("interactive")
    with pytest.raises(ForbiddenError, match="'interactive', but for: bulk"):
        news.require_priority("interactive")
    assert news.quota is not None
    assert web.quota is None


@pytest.mark.parametrize("key", [None, "", "nobody's", KEY[:-1], KEY + "x", "ÿ\udcff"])
def test_whoever_has_no_key_is_refused(tmp_path: Path, key: str | None) -> None:
    tenants = tenants_of(tmp_path, f'[tenants.news]\nkeys = ["{KEY}"]')
    with pytest.raises(AuthenticationError):
        tenants.of_key(key)


def test_without_a_file_everybody_is_welcome() -> None:
    assert Tenants().of_key(None).name == ANONYMOUS
    assert Tenants().of_key("whatever").may_use("anything")


def test_every_digest_is_compared_whichever_key_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time tells nothing: neither where a key first differs nor which tenant it is."""
    text = "\n".join(f'[tenants.t{index}]\nkeys = ["{KEY}-{index}"]' for index in range(5))
    tenants = tenants_of(tmp_path, text)
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr("seqloss.tenants.hmac.compare_digest", compare)
    for key in (f"{KEY}-0", f"{KEY}-4", "nobody's"):
        compared.clear()
        try:
            tenants.of_key(key)
        except AuthenticationError:
            assert key == "nobody's"
        assert len(compared) == 5
        assert {len(one) for pair in compared for one in pair} == {32}


def test_a_quota_is_a_rate_and_large_requests_are_paid_off() -> None:
    clock = Clock()
    quota = Quota(600, clock)
    quota.take(500)
    quota.take(300)  # something was left
    with pytest.raises(QuotaExceededError) as caught:
        quota.take(1)
    # 200 are owed, and the first token after them comes at ten a second.
    assert caught.value.retry_after_seconds == pytest.approx(20.1)
    clock.seconds += caught.value.retry_after_seconds
    quota.take(1)
    clock.seconds += 1000
    quota.take(599)
    quota.take(1)
    with pytest.raises(QuotaExceededError):
        quota.take(1)


def test_over_time_nobody_has_more_than_the_rate() -> None:
    clock = Clock()
    quota = Quota(600, clock)
    taken = 0
    while clock.seconds < 3600:
        try:
            quota.take(1700)
            taken += 1700
        except QuotaExceededError as error:
            clock.seconds += error.retry_after_seconds or 0.0
    assert taken <= 600 * 61 + 1700
    assert taken >= 600 * 59


def test_what_was_not_admitted_is_given_back() -> None:
    quota = Quota(100, Clock())
    for _ in range(10):
        quota.take(100)
        quota.give_back(100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "Field required"),
        ("[tenants]", "at least 1 item"),
        ("[tenants.news]", "keys: Field required"),
        ("[tenants.news]\nkeys = []", "keys: List should have at least 1 item"),
        ('[tenants.news]\nkeys = ["SHORTSECRET"]', "at least 16 characters"),
        ('[tenants.news]\nkeys = ["SECRETSECRET SECRET"]', "without spaces"),
        ('[tenants.news]\nkeys = ["sha256:SECRET"]', "64 digits"),
        ('[tenants.news]\nkeys = "SECRETSECRETSECRET"', "keys: Input should be a valid array"),
        (f'[tenants.news]\nkeys = ["{KEY}"]\nmodel = "x"', "model: Extra inputs"),
        (f'[tenants.news]\nkeys = ["{KEY}"]\npriorities = ["high"]', "'interactive' or 'bulk'"),
        (f'[tenants.news]\nkeys = ["{KEY}"]\ntokens_per_minute = 0', "greater than or equal to 1"),
        (f'[tenants.news]\nkeys = ["{KEY}"]\ntokens_per_minute = 2026-01-01', "dates"),
        (f'[tenants."a b"]\nkeys = ["{KEY}"]', "pattern"),
        (f'[tenants.a]\nkeys = ["{KEY}"]\n[tenants.b]\nkeys = ["{KEY}"]', "a and b have the same"),
        ('[tenants.news]\nkeys = ["SECRETSECRETSECRET', "it is not TOML (end of document)"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_without_any_key(
    tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        tenants_of(tmp_path, text)
    assert expected in str(caught.value)
    assert "keys.toml" in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_tenants(tmp_path / "none.toml", Clock())


def test_reading_again_keeps_what_was_used_of_a_quota(tmp_path: Path) -> None:
    text = f'[tenants.news]\nkeys = ["{KEY}"]\ntokens_per_minute = 100'
    before = tenants_of(tmp_path, text)
    quota = before.of_key(KEY).quota
    assert quota is not None
    quota.take(100)
    same = tenants_of(tmp_path, text, before=before).of_key(KEY).quota
    assert same is quota
    raised = tenants_of(tmp_path, text.replace("100", "200"), before=before).of_key(KEY).quota
    assert raised is not None
    raised.take(1)
