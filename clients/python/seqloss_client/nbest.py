"""Moses' n-best lists: lines of `id ||| hypothesis ||| features ||| score`, kept byte for byte.

Ids count the lines of the source file from 0; a source's hypotheses stand together, and every
source has some.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from seqloss_client.corpus.errors import CorpusError

# The space behind the bars belongs to the next field, so that an empty one may be written with
# one space or with two, and fields joined again are the line.
_DELIMITER = re.compile(rb" \|\|\|(?= |$)")
_BARS = b" |||"
_ID, _TEXT, _FEATURES, _SCORE = range(4)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A line of an n-best list.

    Attributes:
        line_number: from 1.
        source: the id, the line of the source file from 0.
        text: the hypothesis without the spaces beside the bars.
        fields: the line's bytes between the bars, spaces included.
    """

    line_number: int
    source: int
    text: str
    fields: tuple[bytes, ...]

    def with_feature(self, name: str, value: float) -> bytes:
        """The line with a feature behind its others."""
        fields = list(self.fields)
        fields[_FEATURES] += f" {name}= {value!r}".encode()
        return _BARS.join(fields)


@dataclass(frozen=True, slots=True)
class NBestList:
    """A source with all its hypotheses, in their order."""

    source: str
    hypotheses: tuple[Hypothesis, ...]


def read_hypotheses(lines: Iterable[bytes], feature: str) -> Iterator[Hypothesis]:
    """Parses lines without their ends.

    Args:
        lines: of the n-best list.
        feature: the name that will be added; no line may have it.

    Raises:
        CorpusError: a line that is none of an n-best list.
    """
    for number, line in enumerate(lines, 1):
        yield _hypothesis(number, line, feature)


def _hypothesis(number: int, line: bytes, feature: str) -> Hypothesis:
    fields = tuple(_DELIMITER.split(line))
    if len(fields) < 4:
        raise _wrong(
            number,
            f"there are {len(fields)} fields where 'id ||| hypothesis ||| features ||| score' "
            "has four or more",
        )
    if not re.fullmatch(rb" *[0-9]+ *", fields[_ID]):
        raise _wrong(
            number, f"{_shown(fields[_ID])} is no id: ids are the lines of the sources, from 0"
        )
    try:
        float(fields[_SCORE])
    except ValueError:
        raise _wrong(
            number,
            f"{_shown(fields[_SCORE])} is no score; a hypothesis must not have ' ||| ' inside",
        ) from None
    if f"{feature}=".encode() in fields[_FEATURES].split():
        raise _wrong(number, f"there is a feature {feature}= already; --feature gives another name")
    return Hypothesis(number, int(fields[_ID]), _text(number, fields[_TEXT]), fields)


def _text(number: int, field: bytes) -> str:
    try:
        return field.decode().removeprefix(" ")
    except UnicodeDecodeError as error:
        raise _wrong(
            number, f"the hypothesis is no UTF-8: byte {error.object[error.start]:#04x}"
        ) from None


def nbest_lists(sources: Iterable[str], hypotheses: Iterable[Hypothesis]) -> Iterator[NBestList]:
    """Puts hypotheses to their sources; reads both as it goes.

    Raises:
        CorpusError: an id without a source, a source without hypotheses, ids out of order.
    """
    expected = 0
    remaining = iter(sources)
    for source_id, group in groupby(hypotheses, key=lambda hypothesis: hypothesis.source):
        found = tuple(group)
        if source_id != expected:
            raise _wrong(found[0].line_number, _why_not(source_id, expected))
        source = next(remaining, None)
        if source is None:
            raise _wrong(
                found[0].line_number,
                f"the id {source_id} has no source: the source file has {expected} lines, for the "
                f"ids below {expected}",
            )
        yield NBestList(source, found)
        expected += 1
    if next(remaining, None) is not None:
        raise CorpusError(
            f"the n-best list ends with the id {expected - 1}, the source file goes on: line "
            f"{expected + 1} has no hypotheses"
        )


def _why_not(source_id: int, expected: int) -> str:
    if source_id < expected:
        return f"the id {source_id} comes a second time; a source's hypotheses must stand together"
    return f"the id is {source_id} where {expected} comes next: source {expected} has no hypotheses"


def _wrong(number: int, what: str) -> CorpusError:
    return CorpusError(f"n-best list, line {number}: {what}")


def _shown(field: bytes) -> str:
    return repr(field.decode(errors="replace").strip())
