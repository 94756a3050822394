"""Results as text for people: on a terminal, and in Markdown."""

from __future__ import annotations

from statistics import median

from benchmarks.gpu.results import BulkRun, ModelResult, ProductRate, Results
from benchmarks.report import Table, megabytes, number, platform_facts, settings_facts

_PREAMBLE = """\
# seqloss on a GPU

This page is written by a program:

```sh
{command}
```

Everything is bfloat16. Models are random ones of real shapes, and ids are random; lengths are those
of sentences. **Products** are single matrix products, and **the head** is what comes between hidden
states and losses, each alone on the device, without waiting for the host. **Bulk** is the whole way
from lists of ids to one nll per pair, in process: seqloss with its queue and batches; transformers
sorted by length, with all logits of a batch. *Limit* is the time that the matrix products of the
pairs would take, without padding, at the rate of the large square, over the measured time; *peak*
is the most memory of tensors, the model's included. **Latency** is of single pairs, one after the
other, through HTTP.
"""


def terminal(results: Results) -> str:
    """Everything but the preamble."""
    blocks = ["\n".join(_facts(results))]
    for model in results.models:
        for title, table in _tables(results, model):
            blocks += [f"{model.name}: {title}", table.text()]
        blocks += _notes(model)
    return "\n\n".join(blocks)


def markdown(results: Results) -> str:
    """A page."""
    blocks = [_PREAMBLE.format(command=results.origin.command).rstrip()]
    blocks.append("\n".join(f"- {fact}" for fact in _facts(results)))
    for model in results.models:
        blocks.append(f"## {model.name}")
        for title, table in _tables(results, model):
            blocks += [f"### {title}", table.markdown()]
        blocks += _notes(model)
    return "\n\n".join(blocks) + "\n"


def _facts(results: Results) -> list[str]:
    square = results.square
    return [
        (
            f"GPU: {results.gpu}; a product of {square.rows:,} x {square.columns:,} x "
            f"{square.inner:,} at {_tera(square.rate)} TFLOP/s"
        ),
        *platform_facts(results.machine, results.origin),
        f"measured: {results.started_at}, rounds: {results.rounds}, `{results.origin.command}`",
        *settings_facts(results.origin),
    ]


def _tables(results: Results, model: ModelResult) -> list[tuple[str, Table]]:
    return [
        (f"Products of {model.head_tokens:,} tokens", _products(model.rates)),
        (f"The head of {model.head_tokens:,} tokens", _heads(model)),
        ("Bulk", _bulk(results, model)),
    ]


def _products(rates: list[ProductRate]) -> Table:
    return Table(
        ("product", "columns", "inner", "ms", "TFLOP/s"),
        [
            (
                rate.name,
                f"{rate.columns:,}",
                f"{rate.inner:,}",
                number(rate.seconds * 1e3),
                _tera(rate.rate),
            )
            for rate in rates
        ],
    )


def _heads(model: ModelResult) -> Table:
    logits_seconds = model.head[0].seconds
    return Table(
        ("head", "ms", "times the logits alone", "growth MB"),
        [
            (
                run.name,
                number(run.seconds * 1e3),
                f"{run.seconds / logits_seconds:.2f}",
                megabytes(run.growth_bytes),
            )
            for run in model.head
        ],
    )


def _bulk(results: Results, model: ModelResult) -> Table:
    header = ("way", "batches", "median s", "pairs/s", "target tokens/s", "limit", "peak MB")
    return Table(header, [_bulk_row(results, model, run) for run in model.bulk if run.seconds])


def _bulk_row(results: Results, model: ModelResult, run: BulkRun) -> tuple[str, ...]:
    seconds = median(run.seconds)
    limit = model.operations / results.square.rate
    return (
        run.name,
        run.setting,
        number(seconds),
        f"{model.num_pairs / seconds:,.0f}",
        f"{model.target_tokens / seconds:,.0f}",
        f"{limit / seconds:.0%}",
        megabytes(run.peak_bytes),
    )


def _notes(model: ModelResult) -> list[str]:
    notes = [
        (
            f"{model.num_pairs:,} pairs with {model.source_tokens:,} source and "
            f"{model.target_tokens:,} target tokens: {model.operations / 1e12:.3g} tera-operations."
        ),
    ]
    if model.latency:
        p50, p95 = model.latency.p50_seconds, model.latency.p95_seconds
        notes.append(
            f"Latency of {model.latency.num_requests:,} single pairs: {number(p50 * 1e3)} ms "
            f"(p50), {number(p95 * 1e3)} ms (p95)."
        )
    notes += [
        f"Left out: {run.name}, {run.setting}, {run.failure}" for run in model.bulk if run.failure
    ]
    return notes


def _tera(rate: float) -> str:
    return number(rate / 1e12)
