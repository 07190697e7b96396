"""The resident memory of this process, as Linux tells it."""

from __future__ import annotations

import ctypes
import gc
import platform
from pathlib import Path


def resident_mb(peak: bool) -> float | None:
    """Returns the resident memory of this process, now or at most since `forget_peak`."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    wanted = "VmHWM" if peak else "VmRSS"
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(wanted):
            return int(line.split()[1]) / 1024
    return None


def forget_peak() -> None:
    """Gives freed memory back and makes the peak of this process what it has now (Linux)."""
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")
