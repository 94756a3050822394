"""Two workers beside one, on a Ray of this machine's own; and what Ray adds to a request."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import get_args

import ray

from benchmarks.arguments import common_parser, positive, set_environment, write
from benchmarks.cluster import parts
from benchmarks.machine import machine, origin
from benchmarks.pairs import sentence_lengths
from benchmarks.report import platform_facts, settings_facts
from benchmarks.serving.figures import PartResult
from benchmarks.serving.report import tables, title
from benchmarks.serving.workbench import Plan, Workbench
from seqloss.bundle.manifest import Precision

PARTS: dict[str, Callable[[Workbench], PartResult]] = {
    "data": parts.data,
    "requests": parts.requests,
    "latency": parts.latency,
    "same": parts.same,
    "fleet": parts.fleet,
}

_PREAMBLE = """\
# Ray

What Ray makes of two processors: `seqloss ray-score` and the service on Ray Serve, each worker
with one thread. This page is written by a program:

```sh
{command}
```

Clients, proxies and Ray itself share the processors with the workers. What is wanted of a figure
stands beside it; nothing fails where it is not reached. How to get from here to a fleet is in
[scale.md](scale.md).
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes what was asked for."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if "requests" in options.parts and options.pairs < parts.LEAST_PAIRS:
        parser.error(f"argument --pairs: the part requests wants at least {parts.LEAST_PAIRS}")
    set_environment(1)
    bench = Workbench(_plan(options))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = [PARTS[name](bench) for name in PARTS if name in options.parts]
    finally:
        ray.shutdown()
    facts = [
        *platform_facts(machine(), origin("bench-ray")),
        f"Ray {ray.__version__}; measured: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"model: {options.model}, random, in {options.precision}; rounds: {options.rounds}",
        f"lengths: {sentence_lengths(1)[0]}",
        *settings_facts(origin("bench-ray")),
    ]
    for part in found:
        print("\n\n".join(["", title(part), *(table.text() for table in tables(part))]))
    write(options.output, {"facts": facts, "parts": [asdict(part) for part in found]})
    if options.markdown:
        options.markdown.write_text(_page(facts, found))


def _page(facts: list[str], found: list[PartResult]) -> str:
    blocks = [_PREAMBLE.format(command=origin("bench-ray").command).rstrip()]
    blocks.append("\n".join(f"- {fact}" for fact in facts))
    for part in found:
        blocks += [f"## {title(part)}", inspect.cleandoc(part.about)]
        blocks += [table.markdown() for table in tables(part)]
    return "\n\n".join(blocks) + "\n"


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        parts=tuple(options.parts),
        model=options.model,
        precision=options.precision,
        device="cpu",
        threads=1,
        rounds=options.rounds,
        seconds=0.0,
        repetitions=0,
        waiting_pairs=0,
        pairs=options.pairs,
        folder=options.folder,
    )


def _parser() -> argparse.ArgumentParser:
    parser = common_parser("benchmarks.cluster", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--precision", choices=get_args(Precision), default="bfloat16")
    parser.add_argument("--pairs", type=positive, default=2048, help="that are scored in a round")
    parser.add_argument("--rounds", type=positive, default=3)
    return parser


if __name__ == "__main__":
    main()
