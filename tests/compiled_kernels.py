"""The compiled kernels, for tests of what is computed with them."""

from __future__ import annotations

import functools
from unittest import mock

import pytest

from seqloss.kernels import build
from seqloss.kernels.functions import KernelLibrary
from seqloss.settings import USER_CACHE

# What tests of the kernels themselves go through: a CPU with AVX-512 runs the others too.
LEVELS = ["best", "avx2"] if build.instructions() >= build.AVX512 else ["best"]


@functools.cache
def kernel_library(level: str = "best") -> KernelLibrary:
    """Those for this CPU. One that has AVX2 and does not get them fails its tests."""
    if lacking := build.AVX2 - build.instructions():
        pytest.skip(f"kernels need AVX2, and this CPU has no {', '.join(sorted(lacking))}")
    if level == "best":
        return KernelLibrary(build.built(USER_CACHE))
    with mock.patch.object(build, "instructions", return_value=build.AVX2):
        return KernelLibrary(build.built(USER_CACHE))
