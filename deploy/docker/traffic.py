"""Traffic for a demo of seqloss: what a news desk and a crawler of the web would send, for ever.

Dates in German, French and Spanish, as the demo model writes them. For most requests somebody waits
(priority `interactive`, a few candidates for one source); others are pieces of a corpus (`bulk`).
Some have a pair that cannot be scored, and some are refused for it. Translations of the stream
`web` grow worse and better again, so that a dashboard of losses has something to show.

It survives a service that is started anew, and ends at once on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from seqloss_client import AsyncLossClient, ProblemError, SeqlossError

Stream = Literal["news", "web"]

_ENGLISH = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "January February March April May June July August September October November December".split(),
)
# Weekdays, months, and how they make a moment; as Unicode CLDR has them.
_LANGUAGES = {
    "de": (
        "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split(),
        "Januar Februar März April Mai Juni Juli August September Oktober November "
        "Dezember".split(),
        "{weekday}, {at.day}. {month} {at.year} um {at.hour:02}:{at.minute:02}",
    ),
    "fr": (
        "lundi mardi mercredi jeudi vendredi samedi dimanche".split(),
        "janvier février mars avril mai juin juillet août septembre octobre novembre "
        "décembre".split(),
        "{weekday} {at.day} {month} {at.year} à {at.hour:02}:{at.minute:02}",
    ),
    "es": (
        "lunes martes miércoles jueves viernes sábado domingo".split(),
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
        "diciembre".split(),
        "{weekday}, {at.day} de {month} de {at.year}, {at.hour}:{at.minute:02}",
    ),
}
_CANDIDATES = 4
_PAIRS_OF_A_PIECE = 40
_OUT_OF_RANGE = 999_999
# More than these under way, and the service is away or too slow: the rest is not sent at all.
_MOST_UNDER_WAY = 32
_REPORT_SECONDS = 30


def english(at: datetime) -> str:
    """A moment, as an American writes it."""
    weekdays, months = _ENGLISH
    day = f"{weekdays[at.weekday()]}, {months[at.month - 1]} {at.day}, {at.year}"
    return f"{day} at {at.hour % 12 or 12}:{at.minute:02} {'AM' if at.hour < 12 else 'PM'}"


def translated(at: datetime, language: str) -> str:
    """A moment in German, French or Spanish."""
    weekdays, months, form = _LANGUAGES[language]
    return form.format(weekday=weekdays[at.weekday()], month=months[at.month - 1], at=at)


def mistranslated(at: datetime, language: str, chance: random.Random) -> str:
    """An hour or a few weeks off, or in another language."""
    fault = chance.choice(("hour", "day", "language"))
    if fault == "language":
        return translated(at, chance.choice([other for other in _LANGUAGES if other != language]))
    away = timedelta(hours=1) if fault == "hour" else timedelta(days=chance.randrange(20, 60))
    return translated(at + away, language)


def share_wrong(stream: Stream, seconds: float, period: float) -> float:
    """How many translations are wrong: always few of the news, a wave of the web."""
    return 0.04 if stream == "news" else 0.3 - 0.25 * math.cos(math.tau * seconds / period)


@dataclass(frozen=True, slots=True)
class Texts:
    """Draws texts of one request.

    Attributes:
        language: of all targets.
        wrong: the share of targets that are no translation.
        chance: what it draws with.
    """

    language: str
    wrong: float
    chance: random.Random

    def moment(self) -> datetime:
        """Of the years that the demo model knows."""
        minutes = self.chance.randrange(60 * 365 * 24 * 60)
        return datetime(1970, 1, 1) + timedelta(minutes=minutes)

    def target(self, at: datetime) -> str:
        """Right or wrong, as the share says."""
        if self.chance.random() < self.wrong:
            return mistranslated(at, self.language, self.chance)
        return translated(at, self.language)


async def ask_for_candidates(client: AsyncLossClient, texts: Texts) -> None:
    """Somebody waits for the best of a few translations, of which most are wrong."""
    at = texts.moment()
    others = [mistranslated(at, texts.language, texts.chance) for _ in range(_CANDIDATES - 1)]
    await client.loss_text(
        [english(at)],
        [texts.target(at), *others],
        source_index=[0] * _CANDIDATES,
        target_language=texts.language,
        priority="interactive",
    )


async def score_a_piece(client: AsyncLossClient, texts: Texts) -> None:
    """A piece of a corpus, for which nobody waits."""
    moments = [texts.moment() for _ in range(_PAIRS_OF_A_PIECE)]
    await client.loss_text(
        [english(at) for at in moments],
        [texts.target(at) for at in moments],
        target_language=texts.language,
        priority="bulk",
    )


async def send_a_bad_pair(client: AsyncLossClient, texts: Texts) -> None:
    """Ids, of which one is none of the model's; the other pair is scored all the same."""
    ids = [[texts.chance.randrange(4, 300), 1], [_OUT_OF_RANGE, 1]]
    await client.loss([ids[0], ids[0]], ids, priority="bulk", on_error="partial")


async def send_what_is_refused(client: AsyncLossClient, _: Texts) -> None:
    """The same without asking for what can be scored."""
    await client.loss([[5, 1]], [[_OUT_OF_RANGE, 1]])


_KINDS: dict[Callable[[AsyncLossClient, Texts], Awaitable[None]], int] = {
    ask_for_candidates: 62,
    score_a_piece: 30,
    send_a_bad_pair: 5,
    send_what_is_refused: 3,
}


class Traffic:
    """Requests at random moments, so many a second on average.

    Args:
        clients: of each stream.
        rate: requests a second.
        period: seconds from one bad time of the web to the next.
    """

    def __init__(self, clients: dict[Stream, AsyncLossClient], rate: float, period: float) -> None:
        self._clients = clients
        self._rate = rate
        self._period = period
        self._chance = random.Random()  # noqa: S311 - texts for a demo
        self._started = time.monotonic()
        self._outcomes: Counter[str] = Counter()
        self._under_way = 0

    async def send(self) -> None:
        """Goes on until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._report())
            while True:
                await asyncio.sleep(self._chance.expovariate(self._rate))
                if self._under_way < _MOST_UNDER_WAY:
                    self._under_way += 1
                    group.create_task(self._send_one())
                else:
                    self._outcomes["not sent"] += 1

    async def _send_one(self) -> None:
        stream: Stream = self._chance.choice(tuple(self._clients))
        language = "de" if stream == "news" else self._chance.choice(("fr", "es"))
        wrong = share_wrong(stream, time.monotonic() - self._started, self._period)
        (kind,) = self._chance.choices(tuple(_KINDS), tuple(_KINDS.values()))
        try:
            await kind(self._clients[stream], Texts(language, wrong, self._chance))
        except ProblemError as error:
            self._outcomes[f"{error.status} {error.code}"] += 1
        except SeqlossError as error:  # the service is away, or starts anew
            self._outcomes[type(error).__name__] += 1
        else:
            self._outcomes["scored"] += 1
        finally:
            self._under_way -= 1

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            self.report()

    def report(self) -> None:
        """Prints what became of the requests so far."""
        said = ", ".join(f"{count} {what}" for what, count in self._outcomes.most_common())
        print(f"requests: {said or 'none yet'}", flush=True)


async def run(url: str, rate: float, period: float) -> None:
    """Sends until a signal comes."""
    loop, sending = asyncio.get_running_loop(), asyncio.current_task()
    assert sending is not None  # noqa: S101 - for mypy; this runs in one
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, sending.cancel)
    # A request that fails is counted, and others follow: it need not be sent again for long.
    async with _client(url, "news") as news, _client(url, "web") as web:
        traffic = Traffic({"news": news, "web": web}, rate, period)
        print(f"sending {rate:g} requests a second to {url}", flush=True)
        try:
            await traffic.send()
        except asyncio.CancelledError:
            traffic.report()


def _client(url: str, stream: Stream) -> AsyncLossClient:
    return AsyncLossClient(url, timeout=30, retries=1, headers={"X-Seqloss-Stream": stream})


def main() -> None:
    """Reads the command line, whose defaults are variables for a container's sake."""
    given = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default=given("TRAFFIC_URL", "http://localhost:8000"))
    parser.add_argument("--rate", type=float, default=given("TRAFFIC_RATE", "5"), help="a second")
    parser.add_argument(
        "--period",
        type=float,
        default=given("TRAFFIC_PERIOD_SECONDS", "1200"),
        help="seconds from one bad time of the stream `web` to the next (default: 1200)",
    )
    options = parser.parse_args()
    if not (options.rate > 0 and options.period > 0):
        parser.error("--rate and --period are above 0")
    asyncio.run(run(options.url, options.rate, options.period))


if __name__ == "__main__":
    main()
