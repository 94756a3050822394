"""Which families are supported, and how exactly: the table in the README.

Of each family a small random checkpoint is made, exported in every precision that is safe in it,
and compared with transformers on targets drawn from it.  Trained checkpoints differ, and
`seqloss verify` compares any.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from checkpoints import RECIPES, save_checkpoint
from seqloss.bundle.manifest import EngineName, Precision
from seqloss.bundle.reader import open_bundle
from seqloss.errors import CheckpointError
from seqloss.export.exporter import ExportOptions, export_checkpoint
from seqloss.export.families import FAMILIES, REFUSED
from seqloss.export.verify import Comparison, VerifyOptions, verify_bundle

BEGIN, END = "<!-- families -->\n", "<!-- /families -->\n"
_HEADING = (
    "| family | `model_type` | Torch float32 | Torch bfloat16 | Torch float16 | ONNX float32 | "
    "ONNX int8 |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)
_OVERFLOWS = "overflows"

_Column = tuple[EngineName, Precision]
_COLUMNS: tuple[_Column, ...] = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch", "float16"),
    ("onnx", "float32"),
    ("onnx", "int8"),
)
# float16 apart: some families are refused in it.
_EXPORTED: tuple[tuple[EngineName, tuple[Precision, ...]], ...] = (
    ("torch", ("float32", "bfloat16")),
    ("torch", ("float16",)),
    ("onnx", ("float32", "int8")),
)


def main() -> None:
    """Measures, prints the table, and puts it into the README where that is asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.families", description=__doc__)
    parser.add_argument("--readme", type=Path, help="the file to put the table into")
    options = parser.parse_args()
    lines = [_HEADING]
    for line in _lines():
        print(line, flush=True)
        lines.append(line)
    if options.readme:
        text = options.readme.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        table = "\n".join(lines)
        options.readme.write_text(f"{before}{BEGIN}{table}\n{END}{after}")


def _lines() -> Iterator[str]:
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            yield _measured(name, Path(folder))
    for model_type, refusal in REFUSED.items():
        yield f"| {refusal.name} | `{model_type}` | no: {refusal.reason} | no | no | no | no |"


def _measured(name: str, folder: Path) -> str:
    checkpoint = save_checkpoint(name, folder / "checkpoint")
    cells: dict[_Column, str] = {}
    for engine, precisions in _EXPORTED:
        bundle = folder / f"{engine}-{precisions[0]}"
        options = ExportOptions(engines=(engine,), precisions=precisions)
        try:
            manifest = export_checkpoint(str(checkpoint), bundle, options)
        except CheckpointError:
            if precisions != ("float16",):
                raise
            cells[engine, "float16"] = _OVERFLOWS
            continue
        cells |= _cells(bundle, checkpoint)
        model_type = manifest.family
    variant = "" if name == model_type else f" ({name.removeprefix(f'{model_type}-')})"
    return (
        f"| {FAMILIES[model_type].name}{variant} | `{model_type}` | "
        f"{' | '.join(cells[column] for column in _COLUMNS)} |"
    )


def _cells(bundle: Path, checkpoint: Path) -> dict[_Column, str]:
    verification = verify_bundle(
        open_bundle(bundle), str(checkpoint), VerifyOptions(device="cpu", num_sources=16)
    )
    return {(one.engine, one.precision): _cell(one) for one in verification.comparisons}


def _cell(comparison: Comparison) -> str:
    if comparison.precision == "float32":
        return f"{comparison.max_token_error:.1e}"
    return f"{comparison.mean_pair_error:.4f}, {comparison.max_pair_error:.3f}"


if __name__ == "__main__":
    main()
