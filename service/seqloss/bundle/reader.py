"""Opens a bundle: every digest verified, every fault listed, nothing run."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from seqloss.bundle.graph_archive import checked
from seqloss.bundle.manifest import (
    MANIFEST_NAME,
    ONNX_WEIGHTS,
    SCHEMA_VERSION,
    Graph,
    Manifest,
    sha256_of,
)
from seqloss.bundle.onnx_model import check_onnx
from seqloss.errors import BundleError

_MAX_MANIFEST_BYTES = 64 * 1024 * 1024
# Of models without positions to run out of; exported ones are a tenth of that.
_LONGEST_SELF_TEST = 1024


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle on disk.

    Attributes:
        folder: where it lies, links followed.
        manifest: what it says of itself.
        digest: SHA-256 of the manifest, which holds the digests of all other files.
        given: the folder as it was named; a link there may lead to another bundle by now. None
            where it was never on disk.
    """

    folder: Path
    manifest: Manifest
    digest: str
    given: Path | None = None

    def reopened(self) -> Bundle:
        """What lies there now.

        Raises:
            BundleError: as of `open_bundle`.
        """
        return open_bundle(self.given or self.folder)

    def weights_path(self, graph: Graph) -> Path:
        """The file of the weights that a graph reads."""
        return self.folder / graph.weights_path

    def graph_archive(self, graph: Graph) -> bytes:
        """The program of a graph, read, held against its digest and checked.

        Raises:
            BundleError: the file was changed since the bundle was opened, or could do more than
                compute losses.
        """
        files, content = self.manifest.files, self.content(graph.path)
        try:
            if graph.engine == "torch":
                return checked(content)
            check_onnx(content, ONNX_WEIGHTS, files[graph.weights_path].num_bytes)
        except BundleError as error:
            path = self.folder / graph.path
            raise BundleError(f"{path}: {error.detail}", error.faults) from error
        return content

    def content(self, name: str) -> bytes:
        """One of its files, by its path in the bundle, read and held against its digest.

        Raises:
            BundleError: the file was changed since the bundle was opened.
        """
        path = self.folder / name
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise BundleError(f"{path} changed while it was read")
        return content


def open_bundle(folder: Path) -> Bundle:
    """Reads the manifest and holds every file against it.

    Raises:
        BundleError: it is not a bundle, is of another schema version, or its files are not those
            that the manifest lists; all faults at once.
    """
    given, followed = folder, folder.resolve()
    if followed != folder.absolute():
        folder = followed
    content = _manifest_bytes(folder)
    manifest = _parse(folder, content)
    faults = _layout_faults(manifest) + _file_faults(folder, manifest)
    if faults:
        raise BundleError(f"{folder} is not a bundle that can be trusted", faults)
    return Bundle(folder, manifest, hashlib.sha256(content).hexdigest(), given)


def _manifest_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; make a bundle with `seqloss export`")
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{folder} has no {MANIFEST_NAME}: it is not a bundle; if it is a checkpoint, run "
            f"`seqloss export {folder} --output BUNDLE` first"
        )
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than any manifest")
    return path.read_bytes()


def _parse(folder: Path, content: bytes) -> Manifest:
    try:
        version = json.loads(content)["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{folder / MANIFEST_NAME} is not a manifest: {error!r}") from error
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{folder} has schema version {version!r}, and this seqloss reads {SCHEMA_VERSION}; "
            f"export the checkpoint again: `seqloss export CHECKPOINT --output {folder} --force`"
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise BundleError(f"{folder / MANIFEST_NAME} is not a valid manifest", faults) from error


def _layout_faults(manifest: Manifest) -> list[str]:
    """What the manifest must say for the rest of the program to take it at its word."""
    needed = dict.fromkeys(
        name for graph in manifest.graphs for name in (graph.weights_path, graph.path)
    )
    if text := manifest.text:
        needed |= dict.fromkeys((text.source.path, text.target.path))
    faults = [f"{name} is not listed" for name in needed if name not in manifest.files]
    vocabulary = manifest.vocabulary
    if any(
        first > last or last >= vocabulary.classes for first, last in vocabulary.excluded_classes
    ):
        faults.append("excluded_classes name classes that do not exist")
    elif vocabulary.num_classes < 1:
        faults.append("every class is excluded")
    if vocabulary.target > vocabulary.classes:
        faults.append("the decoder knows ids that the output projection does not")
    faults += [
        f"special_ids.{name} is not in the vocabulary"
        for name in ("decoder_start", "pad")
        if getattr(manifest.special_ids, name) >= vocabulary.target
    ]
    return faults or _self_test_faults(manifest)


def _self_test_faults(manifest: Manifest) -> list[str]:
    """Its pairs go to the engine as they are, where a wrong id can take the process along."""
    test, vocabulary = manifest.self_test, manifest.vocabulary
    faults = []
    lengths = [len(ids) for ids in test.target_ids]
    if [len(nlls) for nlls in test.token_nlls] != lengths or len(test.source_index) != len(lengths):
        faults.append("self_test has not one source and one nll per token for every target")
    if not all(lengths) or not all(test.source_ids):
        faults.append("self_test has sequences without tokens")
    if max(test.source_index) >= len(test.source_ids):
        faults.append("self_test.source_index names sources that do not exist")
    for name, sequences, most in (
        ("source", test.source_ids, manifest.max_source_tokens or _LONGEST_SELF_TEST),
        ("target", test.target_ids, manifest.max_target_tokens or _LONGEST_SELF_TEST),
    ):
        if (longest := max(map(len, sequences))) > most:
            faults.append(f"self_test has a {name} of {longest} tokens, and at most {most} go")
    if any(token >= vocabulary.source for ids in test.source_ids for token in ids):
        faults.append("self_test.source_ids are not in the vocabulary")
    excluded = vocabulary.excluded
    if any(
        token >= vocabulary.target or excluded[token] for ids in test.target_ids for token in ids
    ):
        faults.append("self_test.target_ids are not in the vocabulary, or of excluded classes")
    return faults


def _file_faults(folder: Path, manifest: Manifest) -> list[str]:
    found = {str(path.relative_to(folder).as_posix()): path for path in sorted(folder.rglob("*"))}
    faults = []
    for name, path in found.items():
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            faults.append(f"{name!r} is a link or a device, and a bundle holds plain files only")
        elif stat.S_ISDIR(mode) and name in manifest.files:
            faults.append(f"{name!r} is a folder, and the manifest describes a file")
        elif stat.S_ISREG(mode) and name != MANIFEST_NAME and name not in manifest.files:
            faults.append(f"{name!r} is not listed in the manifest")
    for name, listed in manifest.files.items():
        path = folder / name
        if name not in found:
            faults.append(f"{name!r} is missing")
        elif stat.S_ISREG(path.lstat().st_mode) and not (
            path.stat().st_size == listed.num_bytes and sha256_of(path) == listed.sha256
        ):
            faults.append(
                f"{name!r} is not the file that the manifest describes; its digest differs"
            )
    return faults
