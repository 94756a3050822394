"""Makes what is measured, in the folder that a build may use; models and pairs are kept there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models import Model, save_checkpoint
from benchmarks.processes import in_own_process
from benchmarks.workload import make_workload
from seqloss.bundle.manifest import EngineName


def checkpoint_of(model: Model, scale: float, folder: Path) -> Path:
    """The model as a Hugging Face checkpoint; made where it is not there."""
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "model.safetensors").is_file():
        checkpoint.mkdir(parents=True, exist_ok=True)
        in_own_process(save_checkpoint, model, scale, checkpoint)
    return checkpoint


def workload_of(checkpoint: Path, num_pairs: int, folder: Path) -> Path:
    """A file of pairs; made where it is not there."""
    path = folder / f"pairs-{num_pairs}.json"
    if not path.is_file():
        in_own_process(_save_workload, checkpoint, num_pairs, path)
    return path


def _save_workload(checkpoint: Path, num_pairs: int, path: Path) -> None:
    make_workload(checkpoint, num_pairs).save(path)


def export_bundle(
    checkpoint: Path, precisions: Sequence[str], folder: Path, engine: EngineName = "torch"
) -> Path:
    """A bundle of the checkpoint; always made anew, since the exporter is what is measured."""
    bundle = folder / f"bundle-{engine}"
    arguments = [str(checkpoint), "--output", str(bundle), "--engine", engine]
    arguments += ["--precision", *precisions, "--force"]
    subprocess.run([sys.executable, "-m", "seqloss.cli", "export", *arguments], check=True)
    return bundle
