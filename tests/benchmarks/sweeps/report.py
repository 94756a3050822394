"""Results as text for people: on a terminal, and in Markdown."""

from __future__ import annotations

from benchmarks.report import (
    Table,
    gemm_facts,
    megabytes,
    number,
    platform_facts,
    settings_facts,
)
from benchmarks.sweeps.results import Results, SweepResult

_PREAMBLE = """\
# Sweeps

How the cost of a token depends on how many pairs there are, how long they are, how many classes and
how many candidates there are, and how large batches may be. This page is written by a program:

```sh
{command}
```

The engine, the queue and the batches are those of a server, in process and without HTTP; models
are random ones, and ids too. Timed is the whole way from lists of ids to one nll per pair. In each
round every point of a sweep is measured once, in an order that changes from round to round.

**Columns.** *µs* are of the median, the least and the largest round. *Limit* is the time that the
matrix products of the pairs would take, without padding, at the machine's largest GEMM rate of the
same round, over the measured time. *Peak* is the most memory while the pairs are scored, the
model's included: of the process, or on a GPU of its tensors; *growth* is how far that is above what
was held before. Points of one model share a process, which keeps the kernels that were made for
other points.
"""


def terminal(results: Results) -> str:
    """Everything but what is measured and how."""
    blocks = ["\n".join(_facts(results))]
    for result in results.sweeps:
        blocks += [_title(result), _table(result).text(), *notes(result)]
    return "\n\n".join(blocks)


def markdown(results: Results, plots: str | None) -> str:
    """A page.

    Args:
        results: what it is about.
        plots: the folder of pictures, as the page names it; None without.
    """
    blocks = [_PREAMBLE.format(command=results.origin.command).rstrip()]
    blocks.append("\n".join(f"- {fact}" for fact in _facts(results)))
    for result in results.sweeps:
        blocks += [f"## {_title(result)}", result.sweep.about]
        if plots is not None and result.summaries():
            blocks.append(f"![{_title(result)}]({plots}/{result.sweep.name}.svg)")
        blocks += [_table(result).markdown(), *notes(result)]
    return "\n\n".join(blocks) + "\n"


def _facts(results: Results) -> list[str]:
    return [
        *platform_facts(results.machine, results.origin),
        (
            f"measured: {results.started_at}, device: {results.device}, rounds: {results.rounds}, "
            f"threads: {results.threads}, `{results.origin.command}`"
        ),
        *settings_facts(results.origin),
    ]


def _title(result: SweepResult) -> str:
    return result.sweep.name.replace("-", " ").capitalize()


def _table(result: SweepResult) -> Table:
    costs = (result.unit, "least", "largest")
    return Table(
        (result.sweep.axis, "precision", *costs, "limit", "peak MB", "growth MB"),
        [
            (
                f"{summary.value:,}",
                summary.precision,
                number(summary.cost_micros),
                number(summary.least_cost_micros),
                number(summary.largest_cost_micros),
                f"{summary.limit_share:.1%}",
                megabytes(summary.peak_bytes),
                megabytes(summary.growth_bytes),
            )
            for summary in result.summaries()
        ],
    )


def notes(result: SweepResult) -> list[str]:
    """What the table is of, and what is not in it."""
    models = ", ".join(dict.fromkeys(entry.point.model for entry in result.points))
    return [
        f"Models: {models}. GEMM rate: {gemm_facts(result.gemm_rates)}.",
        *(
            f"Left out: {entry.point.value:,} in {entry.precision}, {entry.failure}"
            for entry in result.points
            if entry.failure
        ),
    ]
