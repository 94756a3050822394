"""Ways to make a target wrong that a good model must notice."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Literal

from babel import Locale

from seqloss.demo.phrases import TARGET_LANGUAGES, Phrase, plain_spaces, render

Corruption = Literal["number", "month", "language", "order"]


def corrupt(phrase: Phrase, corruption: Corruption, generator: random.Random) -> str | None:
    """The phrase's target with one fault, or None where it has nothing to corrupt in this way."""
    corrupted = CORRUPTIONS[corruption](phrase, generator)
    return None if corrupted == phrase.target else corrupted


def _another_number(phrase: Phrase, generator: random.Random) -> str | None:
    """One digit is another one."""
    places = [match.start() for match in re.finditer(r"\d", phrase.target)]
    if not places:
        return None
    place = generator.choice(places)
    digit = generator.choice([digit for digit in "0123456789" if digit != phrase.target[place]])
    return phrase.target[:place] + digit + phrase.target[place + 1 :]


def _another_month(phrase: Phrase, generator: random.Random) -> str | None:
    """One month's name is another one's, of the same length and case."""
    months = Locale.parse(phrase.language).months["format"]
    for width in ("wide", "abbreviated"):
        names = [plain_spaces(name) for name in months[width].values()]
        for name in names:
            pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
            if re.search(pattern, phrase.target):
                other = generator.choice([month for month in names if month != name])
                return re.sub(pattern, other, phrase.target, count=1)
    return None


def _another_language(phrase: Phrase, generator: random.Random) -> str | None:
    """The same value in a language that was not asked for."""
    texts = {render(phrase.kind, phrase.value, language) for language in TARGET_LANGUAGES}
    others = sorted(texts - {phrase.target})
    return generator.choice(others) if others else None


def _another_order(phrase: Phrase, generator: random.Random) -> str | None:
    """Two numbers or words have changed places."""
    words = list(re.finditer(r"\w+", phrase.target))
    if len({word.group() for word in words}) < 2:
        return None
    first = generator.choice(words)
    second = generator.choice([word for word in words if word.group() != first.group()])
    left, right = sorted((first, second), key=re.Match.start)
    text = phrase.target
    return (
        text[: left.start()]
        + right.group()
        + text[left.end() : right.start()]
        + left.group()
        + text[right.end() :]
    )


CORRUPTIONS: dict[Corruption, Callable[[Phrase, random.Random], str | None]] = {
    "number": _another_number,
    "month": _another_month,
    "language": _another_language,
    "order": _another_order,
}
