"""Imports an ONNX encoder-decoder that somebody else exported: merges, measures, then writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir

from seqloss.bundle.manifest import Checkpoint, Graph, Manifest, Vocabulary
from seqloss.bundle.writer import refuse_unless_free
from seqloss.errors import CheckpointError
from seqloss.export.bundling import Graphs, Origin, vocabulary_of, write_bundle
from seqloss.export.huggingface import digest_of
from seqloss.export.languages import languages_of
from seqloss.export.onnx_files import OnnxFiles, OnnxReference, OnnxSessions, read_onnx_files
from seqloss.export.onnx_graph import saved
from seqloss.export.onnx_merge import merged, precision_of
from seqloss.export.reference import make_self_test
from seqloss.export.texts import stored_text_of

# Longer pairs cost more memory than a probe may.
_MAX_PROBE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How to import.

    Attributes:
        excluded_classes: first and last of ranges of classes to keep out of the softmax.
        decoder_start: instead of the configuration's decoder_start_token_id.
        force: whether a bundle at the output is replaced.
    """

    excluded_classes: tuple[tuple[int, int], ...] = ()
    decoder_start: int | None = None
    force: bool = False


def import_onnx(folder: Path, output: Path, options: ImportOptions) -> Manifest:
    """Writes a bundle of ONNX files, measured against what these compute one pair at a time.

    Args:
        folder: in Optimum's layout; see `seqloss.export.onnx_files`.
        output: the bundle's folder; made whole or not at all.
        options: excluded classes, start id.

    Raises:
        CheckpointError: the files cannot be imported; all faults at once.
        BundleError: the output exists.
    """
    refuse_unless_free(output, force=options.force)
    files = read_onnx_files(folder, options.decoder_start)
    start = files.special_ids.decoder_start
    sessions = OnnxSessions(files)
    classes = sessions.logits([start], [[start]]).shape[-1]
    vocabulary = vocabulary_of(*files.num_ids, classes, options.excluded_classes, start)
    _refuse_short_tables(sessions, files, vocabulary)
    excluded = [int(index) for index in np.flatnonzero(vocabulary.excluded)]
    self_test = make_self_test(
        OnnxReference(sessions, start, vocabulary.target, excluded),
        vocabulary,
        files.max_positions,
    ).model_copy(update={"reference": "imported"})
    languages = languages_of(folder, files.config.model_type)
    origin = Origin(
        family=files.config.model_type,
        checkpoint=Checkpoint(name=folder.resolve().name, digest=digest_of(files.weight_files)),
        vocabulary=vocabulary,
        special_ids=files.special_ids,
        languages=languages,
        max_positions=files.max_positions,
        softcap=None,  # where there is one, it is in the logits
        text=stored_text_of(folder, languages),
    )
    return write_bundle(
        output,
        origin,
        self_test,
        lambda place: _write_graph(place, files, vocabulary),
        force=options.force,
    )


def _refuse_short_tables(sessions: OnnxSessions, files: OnnxFiles, vocabulary: Vocabulary) -> None:
    """Has the files compute the last ids, and a pair as long as may be."""
    if vocabulary.target > vocabulary.classes:
        raise CheckpointError(
            f"its configuration promises {vocabulary.target} target ids, and its logits are of "
            f"{vocabulary.classes} classes"
        )
    longest = (min(limit or 1, _MAX_PROBE_TOKENS) for limit in files.max_positions)
    source_length, target_length = longest
    sessions.logits(
        [vocabulary.source - 1] * source_length, [[vocabulary.target - 1] * target_length]
    )


def _write_graph(folder: Path, files: OnnxFiles, vocabulary: Vocabulary) -> Graphs:
    model = merged(files, vocabulary.excluded)
    precision = precision_of(model)
    graph = Graph(
        engine="onnx",
        precision=precision,
        layout="padded",
        source_multiple=files.source_multiple,
        folder=f"graphs/onnx-{precision}",
        exported_with="",
        makes_logits=True,
        max_error=0.0,
        mean_error=0.0,
        tolerance=1.0,
        mean_tolerance=1.0,
    )
    place = folder / graph.folder
    place.mkdir(parents=True)
    written = saved(
        place, model, f"{_producer(files)}, imported with onnx-ir {onnx_ir.__version__}"
    )
    return Graphs([graph.model_copy(update=asdict(written))], {})


def _producer(files: OnnxFiles) -> str:
    decoder = onnx_ir.load(files.decoder)
    return f"{decoder.producer_name or 'unknown'} {decoder.producer_version or ''}".strip()
