"""What the page on the Open Inference Protocol shows is what happens."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seqloss.errors import PAIR_CODES
from seqloss.http.tensor_columns import INPUTS
from seqloss.http.tensor_replies import OUTPUTS
from seqloss.http.tensors import InferParameters
from server import Server

PAGE = (Path(__file__).parents[2] / "docs" / "inference-protocol.md").read_text()
BLOCKS = dict(re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))


def test_both_examples_say_the_same(
    serve: Callable[..., Server], bundle_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    address = serve(f"demo={bundle_of('demo').folder}").address
    command, program = (
        BLOCKS[language].replace("\\\n", " ").replace("http://localhost:8000", address)
        for language in ("sh", "python")
    )
    curl = subprocess.run(shlex.split(command), check=True, capture_output=True)
    loss, num_tokens = json.loads(curl.stdout)["outputs"]
    assert num_tokens["data"] == [5, 3]
    exec(compile(program, "inference-protocol.md", "exec"), {})  # noqa: S102 - as readers do
    printed = [
        [float(number) for number in row.split()]
        for row in re.findall(r"\[(.*?)\]", capsys.readouterr().out, re.DOTALL)
    ]
    assert printed[0] == pytest.approx(loss["data"], abs=0.01)
    assert sum(printed[1][:5]) == pytest.approx(loss["data"][0], abs=0.05)
    assert len(printed[1]) == 8


def test_all_tensors_parameters_and_codes_are_explained() -> None:
    for name in (*INPUTS, *OUTPUTS):
        assert re.search(rf"^\|.*`{name}`", PAGE, re.MULTILINE), name
    for name in InferParameters.model_fields.keys() - {
        "sequence_id",
        "sequence_start",
        "sequence_end",
    }:
        assert f"`{name}`" in PAGE, name
    codes = " | ".join(f"`{code}`" for code in PAIR_CODES)
    assert f"| {codes} |" in PAGE
