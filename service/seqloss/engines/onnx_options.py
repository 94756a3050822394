"""What each session of ONNX Runtime is told, whether it serves or is the truth of an import."""

from __future__ import annotations

import onnxruntime

# Of an error where two nodes use one int8 constant, on a CPU without VNNI.
SHARED_INT8 = "Attempt to replace the existing tensor"


def session_options(log_severity: int) -> onnxruntime.SessionOptions:
    """Options for right products.

    CPUs without VNNI have 16 bits for the sum of two int8 products, which does not always fit, and
    by default ONNX Runtime lets it overflow. With this option it makes such products in another
    way, which is right, and slower; then no two nodes may use the same int8 constant (1.32 fails:
    see `seqloss.export.int8_copies`).

    Args:
        log_severity: from 0, everything, to 4, fatal errors only.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = log_severity
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options
