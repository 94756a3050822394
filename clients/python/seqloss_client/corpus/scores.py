"""The scores of a block, and the pairs of it that have none."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from seqloss_client.corpus.blocks import Block
from seqloss_client.corpus.errors import BadPair, BadPairs
from seqloss_client.models import LossResult

RECORD = np.dtype(
    [
        ("nll", "<f8"),
        ("loss", "<f8"),
        ("mean_loss", "<f8"),
        ("perplexity", "<f8"),
        ("num_tokens", "<i4"),
    ]
)
"""What is known of a pair: NaN, and no tokens, where it is bad."""

_OF_NOTHING = np.array((np.nan, np.nan, np.nan, np.nan, 0), RECORD)


class Scores:
    """Filled as replies come; a block may be several requests.

    Attributes:
        block: what was sent.
        records: by place, of the kind `RECORD`. Shape: (pairs,).
        token_nlls: by place, where asked for; empty for a bad pair.
        bad: by place.
        cut: pairs of which tokens were cut, by place, and how many.
        num_tokens_sent: of both sides.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.records = np.full(block.raw.num_pairs, _OF_NOTHING)
        self.token_nlls: list[npt.NDArray[np.float32]] | None = None
        self.bad: BadPairs = dict(block.bad)
        self.cut: BadPairs = {}
        self.num_tokens_sent = 0

    def add(self, result: LossResult, first: int) -> None:
        """Takes the result of the good pairs from `first` on."""
        places = self.block.places[first : first + len(result)]
        for name, values in (
            ("nll", result.nlls),
            ("loss", result.losses),
            ("mean_loss", result.mean_losses),
            ("perplexity", result.perplexities),
            ("num_tokens", result.num_tokens),
        ):
            self.records[name][places] = values
        for error in result.errors:
            why = BadPair(error.code, _without_index(error.detail, error.index))
            self.bad[int(places[error.index])] = why
        if result.token_nlls is not None:
            self._add_token_nlls(result.token_nlls.rows(), places)
        self._add_cut(result, places)
        self.num_tokens_sent += result.usage.source_tokens + result.usage.target_tokens

    def refuse(self, place: int, why: BadPair) -> None:
        """The pair cannot be sent at all."""
        self.bad[place] = why

    def _add_token_nlls(
        self, rows: list[npt.NDArray[np.float32]], places: npt.NDArray[np.intp]
    ) -> None:
        if self.token_nlls is None:
            self.token_nlls = [np.empty(0, np.float32)] * len(self.records)
        for place, row in zip(places.tolist(), rows, strict=True):
            # What was cut off the end does not count, and has no nll.
            self.token_nlls[place] = row[~np.isnan(row)]

    def _add_cut(self, result: LossResult, places: npt.NDArray[np.intp]) -> None:
        sources, targets = result.num_truncated_source_tokens, result.num_truncated_target_tokens
        if sources is None or targets is None:
            return
        for index in np.flatnonzero((sources > 0) | (targets > 0)).tolist():
            self.cut[int(places[index])] = BadPair(
                "truncated",
                f"cut: {sources[index]} tokens of the source, {targets[index]} of the target",
            )


def _without_index(detail: str, index: int) -> str:
    """The service counts pairs from the request's first one; a report has the line beside it."""
    return re.sub(rf"\b(source|target) {index}\b", r"the \1", detail, count=1)
