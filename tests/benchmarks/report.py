"""Results as text for people: on a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.gemm import PRECISIONS, GemmRates
from benchmarks.machine import Machine, Origin
from benchmarks.results import Outcome, Results, Summary

_PREAMBLE = """\
# Benchmarks

How long seqloss takes to compute losses, beside transformers, CTranslate2 and what the machine can
do at all. This page is written by a program:

```sh
{command}
```

**What is measured.** Every variant gets the same pairs as lists of token ids and returns one nll
per pair; all of that is timed. Models are random ones of real shapes, since speed does not depend
on what a model has learnt; targets are drawn from the model, so that it is as sure of them as a
trained one would be. Each variant is a process of its own, and one runs at a time. Where a variant
has a setting for the size of batches, the warm-up tries several on some of the pairs and keeps the
fastest. Then come the rounds: in each one every variant scores all pairs once, in an order that
changes from round to round.

- **seqloss** runs a server's queue and batches in process; **seqloss HTTP** is `seqloss serve` with
  a client on the same machine that makes and reads the JSON.
- **transformers** computes all logits of a batch, then `cross_entropy`: in batches of 32 in the
  order of the pairs, or sorted by length.
- **CTranslate2** is `Translator.score_batch`.

**Columns.** Seconds are of all pairs: the median, least and largest of the rounds. *bf16 limit* is
the time that the matrix products of the pairs would take, without padding, at the bfloat16 GEMM
rate of the same round, over the measured time; *f32 limit* likewise. *Peak* is the most resident
memory of the computing process during a round; *faults* are its minor page faults per round.
Errors are of the pairs' mean nlls against transformers in float32, in nats per token.

Of the last two tables one is of another model, so small that only its vocabulary matters: how far
the process's peak rises above what it had before, while one batch is scored. The other has 32 of
the pairs in 200 random batches of up to 24, in random order, with and without the compiled kernels:
what any token's nll differs by, and what the batches took, one after the other.

All of this is on a CPU. `make bench-gpu` measures an NVIDIA GPU; it has not been run on one yet.
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; the first column is aligned to the left, the others to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """For a terminal."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """For a document."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.rows))


def terminal(results: Results) -> str:
    """Everything but the preamble."""
    parts = ["\n".join(_facts(results))]
    parts += [f"{title}\n\n{table.text()}" for title, table in _tables(results)]
    return "\n\n".join([*parts, *_notes(results)])


def markdown(results: Results) -> str:
    """A page."""
    parts = [_PREAMBLE.format(command=results.origin.command).rstrip()]
    parts.append("\n".join(f"- {fact}" for fact in _facts(results)))
    parts += [f"## {title}\n\n{table.markdown()}" for title, table in _tables(results)]
    return "\n\n".join([*parts, *_notes(results)]) + "\n"


def _facts(results: Results) -> list[str]:
    machine, workload, origin = results.machine, results.workload, results.origin
    return [
        *platform_facts(machine, origin),
        (
            f"measured: {results.started_at}, rounds: {results.rounds}, "
            f"threads: {results.threads}, `{origin.command}`"
        ),
        (
            f"model: {workload.model}, random, logits with a standard deviation of "
            f"{workload.scale:.2f}; mean nll of the targets {workload.mean_nll:.2f} nats per token"
        ),
        (
            f"pairs: {workload.num_pairs:,} with {workload.source_tokens:,} source and "
            f"{workload.target_tokens:,} target tokens; lengths: {workload.lengths_from}"
        ),
        (
            f"arithmetic: {workload.operations / 1e12:.3g} tera-operations without padding; the "
            f"machine's GEMM rate: {gemm_facts(results.gemm_rates)}"
        ),
        *settings_facts(origin),
    ]


def platform_facts(machine: Machine, origin: Origin) -> list[str]:
    """The machine, and with what code."""
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    return [
        (
            f"machine: {machine.cpu}, {machine.cores} cores ({' '.join(machine.flags)}), "
            f"{machine.memory_bytes / 1e9:.0f} GB, {machine.system}"
        ),
        f"versions: {versions}; commit {origin.commit}",
    ]


def settings_facts(origin: Origin) -> list[str]:
    """The settings that the environment changes, where it does."""
    settings = ", ".join(f"{name}={value}" for name, value in origin.environment.items())
    return [f"settings: {settings}"] if settings else []


def gemm_facts(gemm_rates: Sequence[GemmRates]) -> str:
    """What the machine can do: the medians over rounds."""

    def rate(precision: str) -> float:
        return median(rates[precision] for rates in gemm_rates) / 1e9

    return ", ".join(f"{rate(name):,.0f} GFLOP/s in {name}" for name in PRECISIONS)


def _tables(results: Results) -> list[tuple[str, Table]]:
    tables = [("Speed", _speed(results)), ("Memory and errors", _costs(results))]
    if ratios := results.ratios():
        rows = [
            (
                f"{ratio.first} / {ratio.second}",
                *map(number, (ratio.value, ratio.least, ratio.largest)),
            )
            for ratio in ratios
        ]
        header = ("times as fast, per round", "median", "least", "largest")
        tables.append(("Ratios", Table(header, rows)))
    if results.memory:
        tables.append(("One batch over a large vocabulary", _memory(results)))
    if results.independence:
        tables.append(("The same pairs in other batches", _independence(results)))
    return tables


def _speed(results: Results) -> Table:
    header = ("variant", "median s", "least", "largest", "pairs/s", "target tokens/s")
    limits = ("bf16 limit", "f32 limit", "setting")
    rows = zip(results.measured, results.summaries(), strict=True)
    return Table((*header, *limits), [_speed_row(*row) for row in rows])


def _speed_row(outcome: Outcome, summary: Summary) -> tuple[str, ...]:
    seconds = (summary.median_seconds, summary.least_seconds, summary.largest_seconds)
    return (
        summary.name,
        *map(number, seconds),
        f"{summary.pairs_per_second:,.1f}",
        f"{summary.target_tokens_per_second:,.0f}",
        f"{summary.bfloat16_limit_share:.0%}",
        _or_blank(summary.float32_limit_share, ".0%"),
        ", ".join(f"{name} {value}" for name, value in outcome.choice.setting.items()),
    )


def _costs(results: Results) -> Table:
    rows = zip(results.measured, results.summaries(), strict=True)
    return Table(
        ("variant", "peak MB", "faults", "largest error", "mean error"),
        [
            (
                summary.name,
                megabytes(summary.peak_resident_bytes),
                _or_blank(summary.minor_page_faults, ","),
                _or_blank(outcome.max_error, ".1e"),
                _or_blank(outcome.mean_error, ".1e"),
            )
            for outcome, summary in rows
        ],
    )


def _memory(results: Results) -> Table:
    header = (
        "variant",
        "classes",
        "target tokens",
        "all logits in float32, MB",
        "growth of the peak, MB",
    )
    return Table(
        (*header, "share"),
        [
            (
                entry.name,
                f"{entry.vocabulary:,}",
                f"{entry.target_tokens:,}",
                megabytes(entry.logits_bytes),
                megabytes(entry.growth_bytes),
                f"{entry.growth_bytes / entry.logits_bytes:.1%}",
            )
            for entry in results.memory
        ],
    )


def _independence(results: Results) -> Table:
    header = ("variant", "kernels", "batches", "largest difference of a token's nll", "s")
    return Table(
        header,
        [
            (
                entry.name,
                "compiled" if entry.has_kernels else "the engine's",
                f"{entry.compositions}",
                f"{entry.largest_difference:.1e}" if entry.largest_difference else "0",
                number(entry.seconds),
            )
            for entry in results.independence
        ],
    )


def _notes(results: Results) -> list[str]:
    notes = [
        f"Left out: {outcome.name}, {outcome.failure}"
        for outcome in results.outcomes
        if outcome.failure
    ]
    if any(outcome.without_pad for outcome in results.measured):
        notes.append(
            "CTranslate2 drops this family's pad class; its errors are against transformers' "
            "softmax without it."
        )
    return notes


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def megabytes(value: int | None) -> str:
    """Of bytes; nothing where they are not known."""
    return "" if value is None else f"{value / 1e6:,.0f}"
