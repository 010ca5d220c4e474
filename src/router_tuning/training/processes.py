"""Several processes that train together: what they have to have in common, and agree on.

Knows nothing of models. Gradients are the engine's affair (DDP, FSDP2, DeepSpeed, by way of
accelerate); here is what can be wrong before it starts.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from router_tuning.errors import ConfigError, TrainingError
from router_tuning.training.budget import STATE_FILE, all_reduce_sum

REPLICATED, FSDP, DEEPSPEED = "replicated", "FSDP", "DEEPSPEED"
"""How the engine keeps weights and the optimizer. The first is DDP, and one process alone; the
others are accelerate's names."""


@dataclass(frozen=True)
class Layout:
    """How the rows of an optimizer step are shared out. A checkpoint keeps it."""

    engine: str
    processes: int
    rows: int
    """Of one micro-batch of one process."""
    accumulation: int

    @property
    def rows_a_step(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.processes * self.rows * self.accumulation

    def __str__(self) -> str:
        return (
            f"{self.rows_a_step} rows a step ({self.processes} processes x {self.rows} rows x "
            f"{self.accumulation} micro-batches)"
        )

    def to_json(self) -> dict[str, Any]:
        """For the state file of a checkpoint."""
        return {"layout": asdict(self)}


def layout_of(args: Any, distributed_type: str) -> Layout:
    """The layout of a training that begins."""
    engine = distributed_type if distributed_type in (FSDP, DEEPSPEED) else REPLICATED
    rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return Layout(engine, args.world_size, rows, accumulation)


def check_launch(args: Any) -> None:
    """Refuse processes that a launcher started together, and that do not see each other.

    Without an accelerator, and without `use_cpu`, transformers takes each for a training of its
    own: all would write to the same folder.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1
    if started != args.world_size:
        raise ConfigError(
            f"the launcher started {started} processes, but this one sees {args.world_size}: each "
            "would train alone and write over the others; on machines without an accelerator give "
            "use_cpu=True (--use_cpu True), or start one process"
        )


def check_engine(accelerator: Any) -> None:
    """Refuse an engine that the training cannot run on."""
    if accelerator.distributed_type == FSDP and not accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP of version 1 runs through its wrapper alone, but the teacher is the model inside "
            "it; take version 2: fsdp_version: 2 in accelerate's configuration, as in "
            "recipes/accelerate/fsdp2.yaml"
        )


def check_layout(checkpoint: Path, now: Layout) -> None:
    """Refuse to continue a checkpoint with another engine, or other rows a step.

    Raises:
        TrainingError: the training would not be the one that was begun.
    """
    told = json.loads((checkpoint / STATE_FILE).read_text()).get("layout")
    before = now if told is None else Layout(**told)  # None: of an earlier version
    anew = (
        "or begin a new training with its routers: "
        f'load_adapter("{checkpoint}", model, is_trainable=True)'
    )
    if before.engine != now.engine:
        raise TrainingError(
            f"{checkpoint} was written with {before.engine} weights, but this training has "
            f"{now.engine} ones; launch it as that one was, {anew}"
        )
    if now.engine == DEEPSPEED and before.processes != now.processes:
        raise TrainingError(
            f"{checkpoint} was written by {before.processes} processes, each with its part of "
            f"DeepSpeed's optimizer, but now there are {now.processes}; start as many as then, "
            f"{anew}"
        )
    if before.rows_a_step != now.rows_a_step:
        raise TrainingError(
            f"{checkpoint} was trained at {before}, but now it is {now}; choose "
            "per_device_train_batch_size or gradient_accumulation_steps so that a step has "
            f"{before.rows_a_step} rows again, {anew}"
        )


def any_process(found: bool, device: torch.device) -> bool:
    """Whether any process found it; every process has to ask."""
    return all_reduce_sum([float(found)], device)[0] > 0
