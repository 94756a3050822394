"""Picks the loss head of an NVIDIA GPU."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from seqloss.errors import BundleError
from seqloss.loss.head import OutputProjection

if TYPE_CHECKING:
    from seqloss.loss.triton_head import TritonHead

_LOG = logging.getLogger(__name__)


def triton_head(projection: OutputProjection, dtype: torch.dtype) -> TritonHead | None:
    """The head whose kernels Triton compiles, tried out; None where there is none.

    Args:
        projection: the output projection on its device.
        dtype: of the products.
    """
    if projection.softcap is not None or not find_spec("triton"):
        return None
    try:
        from seqloss.loss.triton_head import TritonHead  # noqa: PLC0415 - CPUs have no Triton

        head = TritonHead(projection, dtype)
        head.try_out()
    except (BundleError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # Triton may be of the wrong version for Torch or the driver, or without the C compiler that it
    # makes its launchers with.
    except Exception as error:
        _LOG.warning("Triton makes no loss head here, and Torch's own operators compute: %s", error)
        return None
    return head
