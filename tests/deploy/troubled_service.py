"""`seqloss serve` with the fake model on a device that fails in every way that passes by.

It says that it is a GPU: there is nothing to show of a CPU's memory.
"""

from __future__ import annotations

import random
import sys
import time

import numpy as np

import faulty_service
from fakes import FakeEngine
from seqloss.errors import OutOfMemoryError
from seqloss.records import Batch, TokenTerms

SLOW, NOT_FINITE = 40, 41

_HONEST = FakeEngine()


def troubled(batch: Batch) -> TokenTerms | None:
    """Is slow with one label, gives NaN for another, and does not fit now and then."""
    labels = batch.labels[batch.counted]
    time.sleep(0.5 if SLOW in labels else 0.005)
    if len(batch.decoder_input_ids) > 1 and random.random() < 0.4:
        raise OutOfMemoryError("not now")
    if NOT_FINITE not in labels:
        return None
    terms = _HONEST.score(batch)
    _HONEST.batches.clear()
    logprobs = np.where(labels == NOT_FINITE, np.float32("nan"), terms.target_logprob)
    return TokenTerms(logprobs, terms.mean_logprob)


class PretendedGpu(FakeEngine):
    """Counts memory as the Torch engine does on a GPU."""

    def memory_bytes(self) -> dict[str, int]:
        return {"used": 2**30, "cached": 2**29}


if __name__ == "__main__":
    faulty_service.FakeEngine = PretendedGpu  # type: ignore[attr-defined, misc]
    faulty_service.FAULTS["everything"] = lambda: troubled
    sys.exit(faulty_service.main("everything"))
