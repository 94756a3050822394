"""An engine that answers at once, and computes with kernels as soon as they are compiled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from seqloss.engines.base import Engine, EngineInfo
from seqloss.errors import KernelsUnavailableError, SelfTestError
from seqloss.records import Batch, TokenTerms

_LOG = logging.getLogger(__name__)

# To compile, to load and to test take less where the machine has time for it.  Whoever ends the
# process waits for no longer; a compiler that runs then ends by itself.
_LAST_SECONDS = 30


class UpgradingEngine:
    """See `seqloss.engines.base.Engine`.

    The better engine takes the place of the first one between two batches, after it has passed the
    self-test. Where it does not, the first one goes on, and the log says why.
    """

    def __init__(self, first: Engine, make_better: Callable[[], Engine]) -> None:
        """Starts to make the better engine.

        Args:
            first: computes meanwhile.
            make_better: compiles, loads and tests it; called on a thread of its own.
        """
        self._engine = first
        self._make_better = make_better
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._upgrade, name="seqloss-kernels", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        """Of the engine that computes now."""
        return self._engine.info

    def score(self, batch: Batch) -> TokenTerms:
        """See `Engine.score`."""
        return self._engine.score(batch)

    def release_memory(self) -> None:
        """See `Engine.release_memory`."""
        self._engine.release_memory()

    def memory_bytes(self) -> Mapping[str, int]:
        """See `Engine.memory_bytes`."""
        return self._engine.memory_bytes()

    def close(self) -> None:
        """Frees the memory of whichever engines there are; no call follows.

        Waits for a better engine that is being made, within bounds: a process that ends meanwhile
        leaves a compiler and its files behind, or aborts in the midst of Torch.
        """
        with self._lock:
            self._is_closed = True
            self._engine.close()
        # Without the lock, which the thread takes before it ends.
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive():
            _LOG.warning("the engine with kernels is still being made, and not waited for")

    def _upgrade(self) -> None:
        if self._is_closed:
            return
        try:
            better = self._make_better()
        except KernelsUnavailableError as error:
            _LOG.warning("there are no kernels, and Torch's own operators compute: %s", error)
            return
        except SelfTestError as error:
            _LOG.error("the kernels do not compute what they should, and are not used: %s", error)
            return
        except Exception as error:  # whatever it is, the first engine works
            _LOG.exception(
                "the engine with kernels could not be made, and Torch's own operators compute: %s",
                error,
            )
            return
        if not better.info.has_kernels:
            better.close()
            _LOG.warning(
                "there are no kernels for sizes of this model, and Torch's own operators compute"
            )
            return
        with self._lock:
            if self._is_closed:
                better.close()
                return
            # The old one is freed when the batch that it may be computing is done.
            self._engine = better
        _LOG.info("kernels compute from now on")
