"""The compiled kernels, for tests of what is computed with them."""

from __future__ import annotations

import functools

import pytest

from seqloss.kernels.build import built, instructions
from seqloss.kernels.functions import KernelLibrary
from seqloss.settings import USER_CACHE


@functools.cache
def _loaded() -> KernelLibrary:
    return KernelLibrary(built(USER_CACHE))


def kernel_library() -> KernelLibrary:
    """Those for this CPU. One that has AVX-512 and does not get them fails its tests."""
    if lacking := {"avx512f", "avx512bw", "avx512dq", "avx512vl"} - instructions():
        pytest.skip(f"kernels need AVX-512, and this CPU has no {', '.join(sorted(lacking))}")
    return _loaded()
