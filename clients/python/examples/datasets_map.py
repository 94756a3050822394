"""Adds the loss of every pair to a Hugging Face dataset.

    pip install seqloss-client datasets
    python datasets_map.py pairs.jsonl scored.parquet --url http://localhost:8000

`pairs.jsonl` has an object per line with `source` and `target`; the new columns are `nll`, in nats,
and `num_tokens`. What cannot be scored has NaN there, and the reason in the column `error`.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

from datasets import load_dataset

from seqloss_client import LossClient


@cache
def client(url: str) -> LossClient:
    """One client per process: connections are kept from batch to batch."""
    return LossClient(url)


def add_losses(batch: dict[str, list[str]], url: str) -> dict[str, Any]:
    """What `datasets` adds to a batch of rows."""
    result = client(url).loss_text(
        batch["source"], batch["target"], on_error="partial", priority="bulk", reproducible=True
    )
    reasons = {error.index: error.detail for error in result.errors}
    return {
        "nll": result.nlls,
        "num_tokens": result.num_tokens,
        "error": [reasons.get(index, "") for index in range(len(result))],
    }


def main() -> None:
    """Scores a file, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs")
    parser.add_argument("scored")
    parser.add_argument("--url", default="http://localhost:8000")
    arguments = parser.parse_args()
    dataset = load_dataset("json", data_files=arguments.pairs, split="train")
    # The address goes along instead of a client, so that `datasets` can cache the result and copy
    # the function into `num_proc` processes.
    scored = dataset.map(
        add_losses, batched=True, batch_size=2000, fn_kwargs={"url": arguments.url}
    )
    scored.to_parquet(arguments.scored)


if __name__ == "__main__":
    main()
