"""What is wrong with a corpus, as a whole or with one of its pairs."""

from __future__ import annotations

from dataclasses import dataclass

from seqloss_client.errors import SeqlossError


class CorpusError(SeqlossError):
    """The command cannot go on; says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class BadPair:
    """Why a pair has no loss: a stable word for programs, and a sentence for people.

    What the readers find has the codes `not_utf8`, `line_too_long`, `missing_column`,
    `ragged_row`, `malformed_csv`, `malformed_json`, `wrong_type` and `malformed_ids`; `too_large`
    is a pair that no request can hold; the service adds its own.
    """

    code: str
    detail: str


BadPairs = dict[int, BadPair]
"""By the pair's place in its block, from 0."""
