"""Processes that train together, on the CPU over gloo: `together(folder, work, *args)`.

They come from a fork server that has imported the heavy libraries once.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

multiprocessing.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "peft", "accelerate", "transformers.trainer"]
)

RANKS = 2


def together(work: Callable[..., Any], *args: Any, ranks: int = RANKS) -> list[Any]:
    """Run `work(*args)` in each of some processes that form a group; what each returned.

    As a launcher does, it ends the others when one fails or is killed, and raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _run, (ranks, folder, work, args), nprocs=ranks, start_method="forkserver"
        )
        return [torch.load(Path(folder) / str(r), weights_only=False) for r in range(ranks)]


def _on_any_cpu(storage: Any, location: str) -> Any:
    """transformers 5.16 reads a checkpoint in several processes to "cpu:0", which torch cannot."""
    return storage if location.startswith("cpu:") else None


def _run(rank: int, ranks: int, folder: str, work: Callable[..., Any], args: Any) -> None:
    torch.serialization.register_package(9, lambda storage: None, _on_any_cpu)
    warnings.simplefilter("ignore", FutureWarning)  # as pyproject.toml has it
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(number) for name, number in local.items()})
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    found = work(*args)
    torch.save(found, Path(folder) / str(rank))
    torch.distributed.barrier()  # nobody leaves while another may still need it
    torch.distributed.destroy_process_group()
