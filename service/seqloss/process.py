"""What a process that scores is told before Torch is imported, and once its models are loaded."""

from __future__ import annotations

import gc
import os
import sys

# How often a thread of a matrix product looks for the others before it sleeps: for microseconds. By
# default it looks for milliseconds, and keeps a core that the thread it waits for may need: with
# other processes on two cores batches took 3 to 7 times as long; without, they take the same time.
_OPENMP_SPINS = "5000"

# After this time a thread that computes lets others have the interpreter; Python's own is 5 ms.
_SWITCH_SECONDS = 5e-4


def prepare() -> None:
    """To be called before Torch is imported, which reads it then."""
    os.environ.setdefault("GOMP_SPINCOUNT", _OPENMP_SPINS)


def settle() -> None:
    """What was loaded stays, and threads take turns quickly.

    Without the first, parsing a large body takes three times as long: each of its many lists brings
    on collections that walk over all of Torch.  Without the second, the device's thread waits up to
    5 ms for the interpreter after each operator that it has started: 1.03 to 1.09 times as many
    pairs of a small model are scored.
    """
    gc.enable()
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_SECONDS)
