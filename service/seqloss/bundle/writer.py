"""Writes a bundle whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seqloss.bundle.manifest import MANIFEST_NAME, File, Manifest, sha256_of
from seqloss.errors import BundleError


def refuse_unless_free(output: Path, *, force: bool) -> None:
    """Raises BundleError where a bundle written to `output` would destroy something."""
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise BundleError(f"{output} exists; give another --output, or --force to replace it")
    if not (output / MANIFEST_NAME).is_file():
        raise BundleError(f"{output} is not a bundle, and --force replaces bundles only")


@contextmanager
def new_bundle(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to fill and to `seal`; it becomes `output` when the block ends without an error.

    Args:
        output: where the bundle shall lie.
        force: whether a bundle that lies there is replaced.
    """
    refuse_unless_free(output, force=force)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        # mkdtemp makes its folder private; a bundle is read by whoever may read its parent.
        folder = temporary / "bundle"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rename(temporary / "replaced")
        folder.rename(output)
    finally:
        shutil.rmtree(temporary)


def seal(folder: Path, manifest_of: Callable[[dict[str, File]], Manifest]) -> Manifest:
    """Writes the manifest over the files that lie in the folder.

    Args:
        folder: a filled folder.
        manifest_of: makes the manifest, given all files by their path in the folder.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): File(
            sha256=sha256_of(path), num_bytes=path.stat().st_size
        )
        for path in paths
        if path.name != MANIFEST_NAME or path.parent != folder
    }
    manifest = manifest_of(files)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest
