"""What the CPU can do that decides how long things take. Imports no torch before a call."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def has_amx() -> bool:
    """Whether Linux names AMX among the CPU's instructions: products in bfloat16 then take a
    fraction of the time.
    """
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "amx_bf16" in flags.read_text()


def cpu_instructions() -> str:
    """The widest vectors that torch uses here, such as `AVX512`, and AMX."""
    import torch

    widest: str = torch.backends.cpu.get_cpu_capability()
    return f"{widest}, AMX" if has_amx() else widest
