"""The budget term of the loss: weight * (kept - target)^2, two-sided, one target for all units.

The square's coefficient comes from a mean over micro-batches and ranks, because the square of one
noisy mean would also pay for its noise; the gradient comes from the micro-batch at hand. Knows
nothing of models, only of records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router_tuning.errors import TrainingError
from router_tuning.record import ForwardRecord, price_of

STATE_FILE = "router_trainer_state.json"
"""The running mean of the kept fraction and the layout of processes, in a checkpoint."""


@dataclass(frozen=True)
class Kept:
    """How much of the routed kinds one forward ran."""

    executions: Tensor
    """Unit executions over real tokens, each at its price, unrouted units included. Has a gradient
    in training.
    """
    possible: Tensor
    """The same number if everything had run."""

    @property
    def fraction(self) -> Tensor:
        """The kept fraction."""
        return self.executions / self.possible.clamp(min=1)


def count_kept(
    forward: ForwardRecord,
    num_units: int,
    counted: Tensor | None = None,
    prices: Mapping[str, float] | None = None,
) -> Kept:
    """Count a forward's executions over all `num_units` units of the kinds and all real tokens.

    Args:
        forward: the record.
        num_units: units of the routed kinds in the model, routed or not.
        counted: bool, the rows (B,) or tokens (B, T) that count. None counts all.
        prices: what an execution of each unit weighs. None: 1 each.
    """
    prices = prices or {}
    real_BT = forward.real_BT
    if counted is not None:
        real_BT = real_BT & (counted if counted.ndim == 2 else counted[:, None])
    real = real_BT.sum().float()
    executions = (num_units - price_of(forward.units, prices)) * real
    for name, unit in forward.units.items():
        gate_BT = unit.keep_BT if unit.soft_BT is None else unit.soft_BT
        executions = executions + prices.get(name, 1.0) * (gate_BT.float() * real_BT).sum()
    return Kept(executions, num_units * real)


@dataclass
class RunningKept:
    """Kept fraction over the latest micro-batches, weighted by tokens; saved with a checkpoint.

    Both sums fade alike, so the mean is unbiased from the first micro-batch on.
    """

    executions: float = 0.0
    possible: float = 0.0

    def fade(self, momentum: float) -> None:
        """Begin an optimizer step: what earlier steps ran counts less."""
        self.executions *= momentum
        self.possible *= momentum

    def add(self, executions: float, possible: float) -> float:
        """Take in one micro-batch and return the mean."""
        self.executions += executions
        self.possible += possible
        return self.executions / max(self.possible, 1e-12)

    def save(self, checkpoint: Path, **beside: Any) -> None:
        """Write it into a checkpoint's folder, beside transformers' own files. In the same file may
        stand other things.
        """
        checkpoint.mkdir(parents=True, exist_ok=True)
        temporary = checkpoint / (STATE_FILE + ".tmp")
        temporary.write_text(json.dumps({"running_kept": asdict(self), **beside}))
        os.replace(temporary, checkpoint / STATE_FILE)

    @classmethod
    def load(cls, checkpoint: Path) -> RunningKept:
        """Read it from a checkpoint's folder.

        Raises:
            TrainingError: it is missing or damaged.
        """
        path = checkpoint / STATE_FILE
        try:
            return cls(**json.loads(path.read_text())["running_kept"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path} cannot be read ({error}); it was not written by RouterTrainer, or is "
                "damaged: resume from an earlier checkpoint"
            ) from error


def target_at(step: int, steps: int, budget: float, anneal_fraction: float) -> float:
    """The target of a step (from 0): linearly from 1 to the budget, then the budget."""
    anneal_steps = anneal_fraction * steps
    progress = 1.0 if anneal_steps <= 0 else min(step / anneal_steps, 1.0)
    return 1.0 - (1.0 - budget) * progress


def budget_term(kept: Tensor, running: float, target: float, weight: float) -> Tensor:
    """The value weight * (running - target)^2, with its gradient taken to reach `kept`."""
    slope = 2 * weight * (running - target)
    return slope * (kept - kept.detach()) + weight * (running - target) ** 2


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """The sums over all ranks; the values themselves where nothing is distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed
