"""What this process holds of a device's memory, and the most it held since it was asked to look."""

from __future__ import annotations

from pathlib import Path

import torch

SELF = Path("/proc/self")
HEIGHT = "5"
"""What clears the mark of the most resident memory, written to clear_refs (proc(5))."""


def held(device: str) -> int | None:
    """Return the bytes this process holds: of a GPU, else resident; None where nobody says it."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS") if device == "cpu" else None


def most_held(device: str) -> int | None:
    """Return the most bytes held since `look_anew`; None where nobody says it."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") if device == "cpu" else None


def most_reserved(device: str) -> int | None:
    """Return the most bytes that torch took of a GPU since `look_anew`; None for no GPU."""
    return torch.cuda.max_memory_reserved(device) if device.startswith("cuda") else None


def look_anew(device: str) -> None:
    """Forget the most that was held: from now on it is what is held now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif device == "cpu":
        try:
            (SELF / "clear_refs").write_text(HEIGHT)
        except OSError:  # not Linux: then nobody says what is resident either
            return


def _resident(field: str) -> int | None:
    """Return a line of /proc/self/status in bytes: VmRSS is now, VmHWM the most there was."""
    try:
        lines = (SELF / "status").read_text().splitlines()
    except OSError:
        return None
    found = (int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
    return next(found, None)
