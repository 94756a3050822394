"""Pairs for the demo model: what an American writes, and how German, French and Spanish write it.

Every pair is made from Unicode CLDR through Babel, so anyone can make the same data again.  The
target is a function of the source: no English phrase ever has two translations into one language.

A *value* (a date, an amount, a quantity) belongs wholly to the training or to the held-out side,
so that a held-out pair shows a value that training has never seen in any form or language.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import Any, Literal

from babel import Locale, dates, numbers, units

SOURCE_LANGUAGE = "en"
TARGET_LANGUAGES = ("de", "fr", "es")
Split = Literal["train", "held_out"]

# Joins a date and a time of day.  CLDR has these as dateTimeFormat-type-atTime, which Babel 2.18
# does not carry.
_AT_TIME = {"en": "{0} at {1}", "de": "{0} um {1}", "fr": "{0} à {1}", "es": "{0}, {1}"}

NO_BREAK_SPACES = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}"
_PLAIN_SPACES = str.maketrans(dict.fromkeys(NO_BREAK_SPACES, " "))

_CURRENCIES = ("USD", "EUR", "GBP", "CHF", "JPY", "CAD", "INR")
_UNITS = (
    *("length-kilometer", "length-meter", "length-centimeter", "length-millimeter"),
    *("length-mile", "length-foot", "length-inch", "mass-kilogram", "mass-gram", "mass-pound"),
    *("volume-liter", "volume-milliliter", "area-square-meter", "area-square-kilometer"),
    *("temperature-celsius", "temperature-fahrenheit", "speed-kilometer-per-hour"),
    *("speed-mile-per-hour", "digital-kilobyte", "digital-megabyte", "digital-gigabyte"),
    *("power-watt", "power-kilowatt", "energy-kilowatt-hour", "frequency-hertz"),
)
_DURATIONS = tuple(
    f"duration-{unit}" for unit in ("second", "minute", "hour", "day", "week", "month", "year")
)
# Seconds in a unit, and the largest count that Babel still writes in this unit.
_PERIODS = {
    "second": (1, 50),
    "minute": (60, 50),
    "hour": (3600, 20),
    "day": (86400, 5),
    "week": (7 * 86400, 3),
    "month": (30 * 86400, 10),
    "year": (365 * 86400, 500),
}


@dataclass(frozen=True, slots=True)
class Phrase:
    """One pair of texts.

    Attributes:
        kind: the form, such as `date.full` or `currency.standard`.
        value: what is written, such as a date.
        language: the target's.
        source: English, after a tag that names the target's language.
        target: the same value as the target's language writes it.
    """

    kind: str
    value: Any
    language: str
    source: str
    target: str

    @property
    def english(self) -> str:
        """The source without its tag."""
        return self.source.partition(" ")[2]

    @property
    def backward(self) -> tuple[str, str]:
        """Source and target of the other direction, which needs no tag."""
        return self.target, self.english


@dataclass(frozen=True, slots=True)
class _Kind:
    """How to draw a value, and how a locale writes it."""

    name: str
    draw: Callable[[random.Random], Any]
    write: Callable[[Any, str], str]


def plain_spaces(text: str) -> str:
    """CLDR's no-break spaces become the plain ones that people type."""
    return text.translate(_PLAIN_SPACES)


def pairs(split: Split, *, seed: int) -> Iterator[Phrase]:
    """Draws pairs for ever: kinds and target languages uniformly, values by their kind."""
    generator = random.Random(seed)
    while True:
        kind = generator.choice(_KINDS)
        value = kind.draw(generator)
        language = generator.choice(TARGET_LANGUAGES)
        if _split_of(value) == split:
            source = f">>{language}<< {render(kind.name, value, SOURCE_LANGUAGE)}"
            target = render(kind.name, value, language)
            yield Phrase(kind.name, value, language, source, target)


def render(kind: str, value: Any, language: str) -> str:
    """How a language writes a value."""
    return plain_spaces(_KIND_NAMED[kind].write(value, language))


def _split_of(value: Any) -> Split:
    """One value in twenty is held out, by a checksum that is the same on every machine."""
    if isinstance(value, datetime):
        value = value.date()
    return "held_out" if zlib.crc32(repr(value).encode()) % 20 == 0 else "train"


# ---------------------------------------------------------------- values


def _a_date(generator: random.Random) -> date:
    # One century: English short dates have two digits for the year, French ones four.
    return date(1950, 1, 1) + timedelta(days=generator.randrange(100 * 365))


def _a_date_not_in_may(generator: random.Random) -> date:
    # English writes the short and the long name of May alike, and other languages do not.
    value = _a_date(generator)
    return value if value.month != 5 else value.replace(month=generator.choice((1, 3, 7, 8, 10)))


def _a_time(generator: random.Random) -> time:
    return time(generator.randrange(24), generator.randrange(60))


def _a_time_with_seconds(generator: random.Random) -> time:
    return _a_time(generator).replace(second=generator.randrange(60))


def _a_moment(generator: random.Random) -> datetime:
    return datetime.combine(_a_date(generator), _a_time(generator))


def _an_integer(generator: random.Random) -> int:
    return generator.randrange(10 ** generator.randrange(1, 8))


def _a_decimal(generator: random.Random) -> float:
    places = generator.choice((1, 2, 3))
    scale: int = 10**places
    return round(_an_integer(generator) + generator.randrange(1, scale) / scale, places)


def _a_number(generator: random.Random) -> float:
    draw: Callable[[random.Random], float] = generator.choice((_an_integer, _a_decimal))
    return draw(generator)


def _a_share(generator: random.Random) -> float:
    return generator.randrange(2000) / 1000


def _an_amount(generator: random.Random) -> tuple[str, float]:
    currency = generator.choice(_CURRENCIES)
    whole = generator.randrange(10 ** generator.randrange(1, 8))
    cents = 10 ** numbers.get_currency_precision(currency)
    return currency, whole + generator.randrange(cents) / cents


def _a_quantity(of: tuple[str, ...]) -> Callable[[random.Random], tuple[str, float]]:
    def draw(generator: random.Random) -> tuple[str, float]:
        size = generator.randrange(10 ** generator.randrange(1, 5))
        tenth = generator.choice((0, generator.randrange(10)))
        return generator.choice(of), size + tenth / 10 if tenth else size

    return draw


def _a_distance_in_time(generator: random.Random) -> tuple[str, int]:
    unit = generator.choice(tuple(_PERIODS))
    return unit, generator.randint(1, _PERIODS[unit][1])


def _two_days(generator: random.Random) -> tuple[date, date]:
    first = _a_date_not_in_may(generator).replace(day=generator.randrange(1, 20))
    return first, first + timedelta(days=generator.randrange(1, 9))


def _two_times(generator: random.Random) -> tuple[time, time]:
    first, second = sorted(generator.sample(range(24 * 60), 2))
    return time(*divmod(first, 60)), time(*divmod(second, 60))


# ---------------------------------------------------------------- how a locale writes them


def _date(style: str) -> Callable[[date, str], str]:
    return lambda value, locale: dates.format_date(value, style, locale=locale)


def _skeleton(skeleton: str) -> Callable[[date, str], str]:
    return lambda value, locale: dates.format_skeleton(skeleton, value, locale=locale)


def _time(style: str) -> Callable[[time, str], str]:
    return lambda value, locale: dates.format_time(value, style, locale=locale)


def _moment(style: str) -> Callable[[datetime, str], str]:
    def write(value: datetime, locale: str) -> str:
        day = dates.format_date(value.date(), style, locale=locale)
        return _AT_TIME[locale].format(day, dates.format_time(value.time(), "short", locale=locale))

    return write


def _number(value: float, locale: str) -> str:
    return numbers.format_decimal(value, locale=locale)


def _percent(value: float, locale: str) -> str:
    pattern = Locale.parse(locale).percent_formats[None].pattern.replace("0", "0.#")
    return numbers.format_percent(value, pattern, locale=locale)


def _currency(style: Literal["standard", "name"]) -> Callable[[tuple[str, float], str], str]:
    return lambda value, locale: numbers.format_currency(
        value[1], value[0], locale=locale, format_type=style
    )


def _unit(length: Literal["long", "short"]) -> Callable[[tuple[str, float], str], str]:
    return lambda value, locale: units.format_unit(value[1], value[0], length, locale=locale)


def _relative(sign: Literal[1, -1]) -> Callable[[tuple[str, int], str], str]:
    def write(value: tuple[str, int], locale: str) -> str:
        unit, count = value
        distance = timedelta(seconds=sign * count * _PERIODS[unit][0])
        return dates.format_timedelta(distance, add_direction=True, locale=locale)

    return write


def _days(value: tuple[date, date], locale: str) -> str:
    return dates.format_interval(*value, "yMMMd", locale=locale)


def _hours(value: tuple[time, time], locale: str) -> str:
    clock = "hm" if locale == SOURCE_LANGUAGE else "Hm"
    return dates.format_interval(*value, clock, locale=locale)


_KINDS = (
    *(_Kind(f"date.{style}", _a_date, _date(style)) for style in ("full", "long", "short")),
    *(
        _Kind(f"date.{skeleton}", _a_date, _skeleton(skeleton))
        for skeleton in ("yMd", "yMMMM", "MMMMd", "yQQQQ", "yQQQ")
    ),
    *(
        _Kind(f"date.{skeleton}", _a_date_not_in_may, _skeleton(skeleton))
        for skeleton in ("yMMMd", "yMMMEd", "MMMEd", "MMMd", "yMMM")
    ),
    _Kind("date.interval", _two_days, _days),
    _Kind("time.short", _a_time, _time("short")),
    _Kind("time.medium", _a_time_with_seconds, _time("medium")),
    _Kind("time.interval", _two_times, _hours),
    *(_Kind(f"moment.{style}", _a_moment, _moment(style)) for style in ("full", "long", "short")),
    _Kind("number.decimal", _a_number, _number),
    _Kind("number.percent", _a_share, _percent),
    _Kind("currency.standard", _an_amount, _currency("standard")),
    _Kind("currency.name", _an_amount, _currency("name")),
    _Kind("unit.long", _a_quantity(_UNITS), _unit("long")),
    _Kind("unit.short", _a_quantity(_UNITS), _unit("short")),
    # English writes "5 days" for both lengths, German "5 Tage" and "5 Tg.": durations are long.
    _Kind("duration.long", _a_quantity(_DURATIONS), _unit("long")),
    _Kind("relative.future", _a_distance_in_time, _relative(1)),
    _Kind("relative.past", _a_distance_in_time, _relative(-1)),
)
_KIND_NAMED = {kind.name: kind for kind in _KINDS}
