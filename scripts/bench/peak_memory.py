"""Reads how much memory of the host is resident in this process, and was at its peak."""

import re
from pathlib import Path

from penstock.scheduler.units import KIB

PEAK, NOW = "VmHWM", "VmRSS"


def resident_bytes(which: str = PEAK) -> int:
    """Bytes that are resident NOW, or at the PEAK since it was last reset."""
    return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * KIB


def reset_peak() -> None:
    """Lets the peak begin again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
