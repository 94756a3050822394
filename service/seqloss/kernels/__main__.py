"""`python -m seqloss.kernels`: compiles the kernels into the package, for whoever builds one."""

from __future__ import annotations

import sys

from seqloss.errors import KernelsUnavailableError
from seqloss.kernels.build import PREBUILT, build_for_all

if __name__ == "__main__":
    try:
        for path in build_for_all(PREBUILT):
            print(path)
    except KernelsUnavailableError as error:
        sys.exit(f"seqloss.kernels: {error}")
