"""Memory and page faults of a process, as Linux counts them; None where there is no /proc."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path


def peak_resident_bytes(pid: int) -> int | None:
    """The most memory the process had since its start, or since `reset_peak`."""
    return _status_bytes(pid, "VmHWM")


def resident_bytes(pid: int) -> int | None:
    """The memory the process has."""
    return _status_bytes(pid, "VmRSS")


def reset_peak(pid: int) -> None:
    """Lets the peak begin anew; where that is not allowed it stays what it was, an upper bound."""
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def release_free_memory() -> None:
    """Gives back what this process has freed and glibc keeps; elsewhere it stays, unused."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def minor_page_faults(pid: int) -> int | None:
    """Pages that were given to the process since its start without reading a disk."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command before it, in brackets, may hold anything. Then: state, seven others, minflt.
    return int(text.rpartition(")")[2].split()[7])


def available_bytes() -> int | None:
    """Memory that the machine could still give."""
    try:
        return _kilobytes(Path("/proc/meminfo").read_text(), "MemAvailable")
    except OSError:
        return None


def _status_bytes(pid: int, name: str) -> int | None:
    try:
        return _kilobytes(Path(f"/proc/{pid}/status").read_text(), name)
    except OSError:
        return None


def _kilobytes(text: str, name: str) -> int | None:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None
