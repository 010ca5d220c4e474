"""How much memory is held."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from router_tuning.memory import blocks_kept, blocks_returned, held_bytes, peak_bytes

BLOCK = 2**20
CPU = torch.device("cpu")

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def block() -> torch.Tensor:
    return torch.ones(BLOCK // 4)


@linux
def test_the_peak_is_what_was_held_in_between() -> None:
    with blocks_returned():
        before = held_bytes(CPU)
        assert before is not None
        held = [block() for _ in range(64)]
        del held
        peak = peak_bytes(CPU)
        after = held_bytes(CPU)
    assert peak is not None
    assert after is not None
    assert 60 * BLOCK < peak - before < 90 * BLOCK
    assert after - before < 10 * BLOCK


@linux
def test_what_is_freed_goes_back_even_between_what_stays() -> None:
    del_large = torch.ones(2**23)  # glibc then keeps blocks of up to this size for itself
    del del_large
    with blocks_returned():
        before = held_bytes(CPU)
        assert before is not None
        blocks = [block() for _ in range(64)]
        stay = blocks[::2]
        del blocks
        more = [torch.ones(BLOCK // 2) for _ in range(16)]  # too large for the holes
        peak = peak_bytes(CPU)
        assert peak is not None
    assert len(stay) + len(more) == 48
    assert peak - before < 80 * BLOCK  # 64 at once; with the holes kept, 96


@linux
def test_what_is_freed_stays_where_that_is_wanted() -> None:
    with blocks_kept():
        before = held_bytes(CPU)
        assert before is not None
        blocks = [torch.ones(2**22) for _ in range(4)]
        del blocks
        still = held_now()
    with blocks_returned():
        after = held_bytes(CPU)
    assert after is not None
    assert still - before > 50 * BLOCK
    assert after - before < 10 * BLOCK


def held_now() -> int:
    """What is held now, with nothing given back first."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
