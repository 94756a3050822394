"""The command `seqloss ray-score`, before there is a Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqloss import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "--prefix-length", "1"], "a prefix is of ids"),
        (["--source-language", "de"], "languages are of texts"),
        (["--target-language", "de"], "languages are of texts"),
        (["--address", "no address"], "there is no Ray to be had at no address: Invalid address"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_in_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(tmp_path / "in"), str(tmp_path / "out"), "--bundle", str(tmp_path)]
    assert cli.main(["ray-score", *places, *arguments]) == 2
    assert f"seqloss ray-score: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
