"""What tests of hostile bundles share."""

from __future__ import annotations

from pathlib import Path

from seqloss.bundle.manifest import MANIFEST_NAME, Manifest
from seqloss.bundle.writer import seal
from seqloss.errors import BundleError


def reseal(folder: Path) -> None:
    """Has the manifest's digests agree with the files, as whoever makes a bundle can."""
    manifest = Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    seal(folder, lambda files: manifest.model_copy(update={"files": files}))


def text_of(error: BundleError) -> str:
    return "\n".join([error.detail, *map(str, error.faults)])
