"""The budget term: what counts as kept, the target's course, where the gradient comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from router_tuning.record import ForwardRecord, UnitRecord
from router_tuning.training.budget import (
    RunningKept,
    all_reduce_sum,
    budget_term,
    count_kept,
    target_at,
)


def forward_record(*gates: Tensor, real: Tensor) -> ForwardRecord:
    units = {
        f"layers.{i}.attn": UnitRecord(gate.detach() > 0.5, real, soft_BT=gate)
        for i, gate in enumerate(gates)
    }
    return ForwardRecord(0, real, False, units)


def test_unrouted_units_count_as_kept_and_padding_does_not_count() -> None:
    real = torch.tensor([[False, True, True], [True, True, True]])
    gate = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])  # the 1 at the pad must not count
    kept = count_kept(forward_record(gate, real=real), num_units=3)
    assert kept.executions.item() == 2 + 2 * 5
    assert kept.possible.item() == 3 * 5
    assert kept.fraction.item() == pytest.approx(12 / 15)


def test_the_record_counts_like_its_trace_without_gates() -> None:
    real = torch.ones(2, 4, dtype=torch.bool)
    record = forward_record(torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 0]]), real=real)
    record.units["layers.0.attn"].soft_BT = None  # as the skipping path leaves it
    assert count_kept(record, 1).fraction.item() == 5 / 8


def test_the_target_falls_to_the_budget_and_stays() -> None:
    course = [target_at(step, 8, 0.6, 0.5) for step in range(8)]
    assert course == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6])
    assert target_at(0, 8, 0.6, 0.0) == 0.6


@pytest.mark.parametrize("running", [0.9, 0.5])
def test_value_from_the_mean_gradient_from_the_batch(running: float) -> None:
    gate = torch.tensor([[1.0, 0.0]], requires_grad=True)
    kept = count_kept(forward_record(gate, real=torch.ones(1, 2, dtype=torch.bool)), 2).fraction
    loss = budget_term(kept, running, target=0.7, weight=20.0)
    loss.backward()
    assert loss.item() == pytest.approx(20 * (running - 0.7) ** 2)
    # One token of four more or less moves kept by 1/4; the sign follows the mean, on both sides.
    assert gate.grad is not None
    assert gate.grad[0].tolist() == pytest.approx([2 * 20 * (running - 0.7) / 4] * 2)


def test_the_running_mean_weighs_tokens_and_fades() -> None:
    running = RunningKept()
    running.fade(0.5)
    assert running.add(10, 10) == 1.0  # unbiased from the first on
    assert running.add(0, 30) == 0.25  # the same step: a plain mean over tokens
    running.fade(0.5)
    assert running.add(20, 20) == pytest.approx((5 + 20) / (20 + 20))
    running.fade(0.0)
    assert running.add(3, 4) == 0.75  # momentum 0 forgets


def test_one_process_is_its_own_sum() -> None:
    assert all_reduce_sum([1.0, 2.0], torch.device("cpu")) == [1.0, 2.0]


def _sum_of_ranks(rank: int, store: str, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    summed = all_reduce_sum([float(rank + 1), 0.1], torch.device("cpu"))
    Path(f"{out}{rank}").write_text(repr(summed))
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # two processes import torch
def test_ranks_are_summed(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sum_of_ranks, (str(tmp_path / "store"), str(tmp_path / "out")), 2)
    assert {(tmp_path / f"out{rank}").read_text() for rank in (0, 1)} == {"[3.0, 0.2]"}
