"""Settings come from flags, then from the environment; what is misspelt is refused."""

from __future__ import annotations

import pytest

from seqloss.cli import main
from seqloss.errors import ConfigurationError
from seqloss.settings import load_settings


def test_flags_win_over_the_environment_and_that_over_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEQLOSS_PORT", "9001")
    monkeypatch.setenv("SEQLOSS_MAX_BATCH_TOKENS", "1234")
    monkeypatch.setenv("SEQLOSS_STREAMS", "news,web")
    settings = load_settings(port="9002")
    assert (settings.port, settings.max_batch_tokens, settings.host) == (9002, 1234, "127.0.0.1")
    assert settings.streams == ("news", "web")


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQLOSS_MAX_BATCH_TOKEN", "1234")
    with pytest.raises(ConfigurationError, match="SEQLOSS_MAX_BATCH_TOKEN, and there is no such"):
        load_settings()


def test_an_empty_flag_is_refused_and_not_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nowhere", "--port", ""]) == 2
    assert "port" in capsys.readouterr().err


def test_the_clients_key_is_no_misspelt_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQLOSS_API_KEY", "a-key-of-sixteen-and-more")
    assert load_settings().api_keys_file is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", "70000"), ("max_batch_tokens", "0"), ("threads", "many"), ("device", "tpu")],
)
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        load_settings(**{name: value})


@pytest.mark.parametrize("classes", ["x", "4-", "-4", "4-x", "4--5"])
def test_a_range_of_classes_is_two_numbers(
    classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", "somewhere", "--output", "b", f"--exclude-classes={classes}"])
    assert "FIRST-LAST" in capsys.readouterr().err
