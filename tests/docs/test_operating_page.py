"""What docs/operating.md shows is what the service reads and answers."""

from __future__ import annotations

import re
import time
from pathlib import Path

import orjson
import pytest

from seqloss import errors
from seqloss.http.problems import STATUS_OF
from seqloss.settings import Settings
from seqloss.tenants import read_tenants

PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def test_the_file_of_keys_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(block("toml"))
    tenants = read_tenants(tmp_path / "keys.toml", time.monotonic)
    assert tenants.names == ("news", "web")
    assert tenants.of_key("the-key-itself-works-too").name == "web"


def test_refusals_have_the_statuses_of_the_table() -> None:
    rows = re.findall(r"^\| .* \| (\d{3})\D.*\| `(\w+)` \|$", PAGE, re.MULTILINE)
    codes = {error.code: error for error in vars(errors).values() if hasattr(error, "code")}
    assert len(rows) == 4
    for status, code in rows:
        kinds = codes[code].__mro__
        assert next(STATUS_OF[kind] for kind in kinds if kind in STATUS_OF) == int(status)


def test_a_line_of_the_log_is_json_with_what_a_request_has() -> None:
    line = orjson.loads(block("json"))
    assert line["logger"] == "seqloss.requests"
    assert {"request_id", "tenant", "model", "pairs", "total_ms"} <= set(line)


def names() -> list[str]:
    # One of them is the client's.
    variables = set(re.findall(r"SEQLOSS_([A-Z_]+)", PAGE)) - {"API_KEY"}
    flags = re.findall(r"--((?:admin|api|tls|log)-[a-z-]+)", PAGE)
    return sorted({name.lower().replace("-", "_") for name in [*variables, *flags]})


@pytest.mark.parametrize("name", names())
def test_every_setting_that_is_named_exists(name: str) -> None:
    assert name in Settings.model_fields
