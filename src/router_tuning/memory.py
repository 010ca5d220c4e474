"""How much memory is held, and the most that was: of the process, or on CUDA of the device."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CLEAR_PEAK = "5"
"""What Linux wants in clear_refs to forget a process's peak memory."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's mallopt."""
SMALL, LARGE = 2**17, 2**25
"""glibc's first threshold for blocks that go back to the system when they are freed, and the
largest to which it raises it by itself as a process frees large blocks.
"""
ALWAYS = 2**30 - 1
"""A threshold that nothing here reaches; twice it still is a C int."""


@contextmanager
def blocks_returned() -> Iterator[None]:
    """Inside the block, freed tensors go back to the system at once, so that the peak of a process
    is of what was held, and not of the holes between. It costs time: nothing is timed in it.
    """
    _malloc_options(SMALL)
    try:
        yield
    finally:
        _malloc_options(LARGE)


@contextmanager
def blocks_kept() -> Iterator[None]:
    """Inside the block, freed tensors stay with the process, as under the allocators that servers
    run with. Else glibc gives large ones back and asks for them again, and which variant pays for
    that is chance.
    """
    _malloc_options(ALWAYS)
    try:
        yield
    finally:
        _malloc_options(LARGE)


def held_bytes(device: torch.device) -> int | None:
    """What is held now; the peak is counted from here. None where the platform does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        gc.collect()
        # What the allocator kept of earlier runs would serve this one unseen.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    except (OSError, AttributeError):  # another platform, or another C library
        return None
    return _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int | None:
    """The most that was held since `held_bytes`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status_bytes("VmHWM")


def _malloc_options(threshold: int) -> None:
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(MMAP_THRESHOLD, threshold)
    mallopt(TRIM_THRESHOLD, 2 * threshold)


def _status_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(parts[1]) * 1024 for parts in found), None)
