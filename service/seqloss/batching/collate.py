"""Puts pairs of several requests into one batch, and takes the batch's terms apart again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from seqloss.batching.digests import first_of_equals, row_digests
from seqloss.batching.jobs import Job, Selection
from seqloss.records import (
    Batch,
    BoolArray,
    Int32Array,
    Int64Array,
    Ragged,
    TokenTerms,
    offsets_of,
    ranges,
    shift_right,
)


@dataclass(frozen=True, slots=True)
class Collated:
    """A batch, and the way back from its terms to the pairs of its jobs.

    Attributes:
        batch: what the engine computes; pairs that are equal in everything are one target of it.
        selection: whose pairs these are.
        target_of_pair: the batch's target of each pair of the selection. Shape: (pairs,).
    """

    batch: Batch
    selection: Selection
    target_of_pair: Int64Array

    def scatter(self, terms: TokenTerms) -> None:
        """Gives each job its pairs' terms; equal pairs get the same ones."""
        batch = self.batch
        counted_before = offsets_of(batch.counted)
        offsets = counted_before[batch.decoder_input_ids.offsets]
        for job, rows, targets in self._parts():
            starts = offsets[targets]
            part = ranges(starts, offsets[targets + 1] - starts)
            job.keep(job.counted_positions(rows), terms, part)
            job.num_encoded_sources += len(np.unique(batch.source_row[targets]))

    def _parts(self) -> Iterator[tuple[Job, Int64Array, Int64Array]]:
        """Each job, its rows, and their targets in the batch."""
        start = 0
        for job, rows in self.selection:
            yield job, rows, self.target_of_pair[start : start + len(rows)]
            start += len(rows)


def collate(selection: Selection) -> Collated:
    """One batch of the selection's pairs: equal sources are one row, equal pairs one target.

    The jobs of a selection agree on `all_terms`.
    """
    sources, source_row = _unique_sources(selection)
    every = _Targets(
        source_row=source_row,
        labels=concatenate([job.pairs.labels.take(rows) for job, rows in selection]),
        inputs=np.concatenate([_decoder_input_ids(job, rows) for job, rows in selection]),
        counted=np.concatenate([job.pairs.counted[job.positions(rows)] for job, rows in selection]),
    )
    distinct, target_of_pair = every.distinct()
    batch = Batch(
        sources=sources,
        source_row=distinct.source_row,
        decoder_input_ids=Ragged(distinct.inputs, distinct.labels.offsets),
        labels=distinct.labels.values,
        counted=distinct.counted,
        with_ranks_and_entropies=selection[0][0].all_terms,
    )
    return Collated(batch, selection, target_of_pair)


def concatenate(parts: Sequence[Ragged]) -> Ragged:
    """The rows of all parts, in order."""
    return Ragged(
        np.concatenate([part.values for part in parts]),
        offsets_of(np.concatenate([part.lengths for part in parts])),
    )


@dataclass(frozen=True, slots=True)
class _Targets:
    """Targets of a batch, with all that their losses depend on.

    Attributes:
        source_row: equal where sources are. Shape: (B,), int32.
        labels: B rows, int32.
        inputs: what the decoder is fed, aligned with `labels.values`, int32.
        counted: aligned likewise, bool.
    """

    source_row: Int32Array
    labels: Ragged
    inputs: Int32Array
    counted: BoolArray

    def distinct(self) -> tuple[_Targets, Int64Array]:
        """Each target once, in order of appearance, and where every one of these is among them."""
        # What is fed and what is predicted, counted or not, in one number per position.
        positions = (self.inputs.astype(np.int64) << 32) | (
            self.labels.values.astype(np.int64) << 1
        )
        positions |= self.counted
        digests = row_digests(Ragged(positions, self.labels.offsets))
        digests = digests * 31 + row_digests(Ragged(self.source_row, np.arange(len(digests) + 1)))
        first, place = first_of_equals(digests)
        kept = self.take(first)
        if len(first) == len(place):
            return self, place
        # Digests find what may be equal; only what is equal is merged.
        again = kept.take(place)
        same = (
            np.array_equal(again.source_row, self.source_row)
            and np.array_equal(again.labels.offsets, self.labels.offsets)
            and np.array_equal(again.labels.values, self.labels.values)
            and np.array_equal(again.inputs, self.inputs)
            and np.array_equal(again.counted, self.counted)
        )
        return (kept, place) if same else (self, np.arange(len(place)))

    def take(self, rows: Int64Array) -> _Targets:
        """The given targets, in the given order."""
        labels = self.labels
        positions = ranges(labels.offsets[rows], labels.lengths_of(rows))
        return _Targets(
            self.source_row[rows],
            labels.take(rows),
            self.inputs[positions],
            self.counted[positions],
        )


def _decoder_input_ids(job: Job, rows: Int64Array) -> Int32Array:
    """Flat, as given or shifted from the labels."""
    pairs = job.pairs
    if pairs.decoder_input_ids is not None:
        return pairs.decoder_input_ids[job.positions(rows)]
    values: Int32Array = shift_right(pairs.labels.take(rows), pairs.start_ids[rows]).values
    return values


def _unique_sources(selection: Selection) -> tuple[Ragged, Int32Array]:
    """Every distinct source once, compared id by id, and each pair's row among them."""
    used = [np.unique(job.pairs.source_index[rows], return_inverse=True) for job, rows in selection]
    sources = concatenate(
        [
            job.pairs.sources.take(index)
            for (job, _), (index, _) in zip(selection, used, strict=True)
        ]
    )
    first_row = offsets_of([len(index) for index, _ in used])[:-1]
    row = np.concatenate(
        [inverse + start for (_, inverse), start in zip(used, first_row, strict=True)]
    )
    first, place = first_of_equals(row_digests(sources))
    if len(first) < len(place):
        kept = sources.take(first)
        again = kept.take(place)
        # Digests find what may be equal; only what is equal is merged.
        if np.array_equal(again.offsets, sources.offsets) and np.array_equal(
            again.values, sources.values
        ):
            return kept, place[row].astype(np.int32)
    return sources, row.astype(np.int32)
