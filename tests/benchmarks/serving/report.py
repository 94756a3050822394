"""Results as text for people: on a terminal, and in Markdown."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.machine import Machine, Origin
from benchmarks.report import Table, number, platform_facts, settings_facts
from benchmarks.serving.figures import Figure, PartResult, Row
from benchmarks.serving.workbench import Plan

_PREAMBLE = """\
# Serving

How the service behaves: what it costs beside the model, how much it pads, and what it gives to whom
under load. This page is written by a program:

```sh
{command}
```

The server is `seqloss serve` in a process of its own, and its client runs on the same machine.
Pairs have the lengths of real sentences where nothing else is said, and random ids: how long a
model takes does not depend on what it has learnt. What is wanted of a figure stands beside it;
nothing fails where it is not reached.
"""


@dataclass(frozen=True, slots=True)
class Results:
    """All of a run."""

    started_at: str
    origin: Origin
    machine: Machine
    plan: Plan
    lengths_from: str
    parts: list[PartResult]


def terminal(results: Results) -> str:
    """Everything but what is measured and how."""
    blocks = ["\n".join(_facts(results))]
    for part in results.parts:
        blocks += [title(part), *(table.text() for table in tables(part))]
    return "\n\n".join(blocks)


def markdown(results: Results) -> str:
    """A page."""
    blocks = [_PREAMBLE.format(command=results.origin.command).rstrip()]
    blocks.append("\n".join(f"- {fact}" for fact in _facts(results)))
    for part in results.parts:
        blocks += [f"## {title(part)}", inspect.cleandoc(part.about)]
        blocks += [table.markdown() for table in tables(part)]
    return "\n\n".join(blocks) + "\n"


def _facts(results: Results) -> list[str]:
    plan, origin = results.plan, results.origin
    return [
        *platform_facts(results.machine, origin),
        f"measured: {results.started_at}, `{origin.command}`",
        (
            f"model: {plan.model}, random, in {plan.precision} on {plan.device}; threads: "
            f"{plan.threads}, rounds: {plan.rounds}, seconds per load: {plan.seconds:g} after "
            f"{plan.warm_up_seconds:g} to warm up"
        ),
        f"lengths: {results.lengths_from}",
        *settings_facts(origin),
    ]


def title(part: PartResult) -> str:
    """Its name, as a heading."""
    return part.name.replace("_", " ").capitalize()


def tables(part: PartResult) -> Sequence[Table]:
    """What was measured, and what was wanted of it."""
    found = [Table(part.columns, [_row(row) for row in part.rows])]
    if part.figures:
        figures = [_figure(one) for one in part.figures]
        found.append(Table(("figure", "value", "wanted", "verdict"), figures))
    return found


def _row(row: Row) -> list[str]:
    return [row.name, *("" if value is None else _number(value) for value in row.values)]


def _figure(figure: Figure) -> list[str]:
    wanted = f"{figure.wanted.side} {_number(figure.wanted.bound)}"
    return [figure.name, _number(figure.value), wanted, figure.verdict]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else number(value)
