"""seqloss: the loss of an encoder-decoder model as a service."""

import os

__all__ = ["__version__"]

__version__ = "0.1.0"

# ONNX Runtime would tell its makers what it runs, and write files for that into the home folder,
# unless this is said before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
