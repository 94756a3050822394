"""A bundle in words."""

from __future__ import annotations

from collections.abc import Iterator

from seqloss.bundle.manifest import Manifest
from seqloss.bundle.reader import Bundle

_LANGUAGE_PLACES = {
    "first": "first",
    "last": "last",
    "none": "not told",
    "decoder_start": "as decoder_start_token_id",
    "first_of_source": "first in the source",
}
_MOST_LANGUAGES = 8


def describe(bundle: Bundle) -> str:
    """What is in a bundle, what it accepts and how exact it is, for people."""
    rows = [*_rows(bundle)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in rows)


def _rows(bundle: Bundle) -> Iterator[tuple[str, str]]:
    manifest = bundle.manifest
    yield "bundle", str(bundle.folder)
    yield "digest", bundle.digest
    yield "family", manifest.family
    yield "checkpoint", f"{manifest.checkpoint.name} ({manifest.checkpoint.digest[:12]}…)"
    yield "made by", f"seqloss {manifest.seqloss_version}, {manifest.graphs[0].exported_with}"
    yield from _vocabulary(manifest)
    yield from _limits(manifest)
    if text := manifest.text:
        yield "tokenizers", ", ".join(dict.fromkeys((text.source.path, text.target.path)))
    else:
        yield "tokenizers", "none: it takes ids and no texts"
    for graph in manifest.graphs:
        error = (
            f"at most {graph.max_error:.1e} nats per token from {manifest.self_test.described}, "
            f"{graph.mean_error:.1e} on average; a device may be {graph.tolerance:.1e} off"
        )
        yield f"{graph.engine} {graph.precision}", error
    pairs = manifest.self_test.target_ids
    yield "self-test", f"{len(pairs)} pairs, {sum(map(len, pairs))} tokens"
    for name, file in sorted(manifest.files.items()):
        yield f"  {name}", f"{file.num_bytes:,} bytes"


def _vocabulary(manifest: Manifest) -> Iterator[tuple[str, str]]:
    vocabulary = manifest.vocabulary
    yield "source ids", f"0 to {vocabulary.source - 1:,}"
    yield "target ids", f"0 to {vocabulary.target - 1:,}"
    excluded = ", ".join(f"{first}-{last}" for first, last in vocabulary.excluded_classes)
    yield "classes", f"{vocabulary.num_classes:,}" + (f" (without {excluded})" if excluded else "")
    ids = manifest.special_ids.model_dump(exclude_none=True)
    yield "special ids", ", ".join(f"{name} {index}" for name, index in ids.items())
    if languages := manifest.languages:
        shown = [f"{name} {index}" for name, index in languages.ids.items()]
        more = len(shown) - _MOST_LANGUAGES
        rest = f" and {more} more" if more > 0 else ""
        yield "languages", ", ".join(shown[:_MOST_LANGUAGES]) + rest
        yield "  of source", _LANGUAGE_PLACES[languages.source]
        yield "  of target", _LANGUAGE_PLACES[languages.target]


def _limits(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for side, longest in (
        ("source", manifest.max_source_tokens),
        ("target", manifest.max_target_tokens),
    ):
        bound = "of any length" if longest is None else f"at most {longest:,} tokens"
        yield f"{side}s", bound
