"""`router-tuning env`: what a bug report needs to say about a machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import typer
from rich.table import Table

from router_tuning.cli.console import bar, stdout
from router_tuning.cli.options import ConfigFile, Debug, JsonFile
from router_tuning.cli.records import command_line, versions, write_json

ALSO = ("accelerate", "datasets", "safetensors", "tokenizers", "numpy", "gguf")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "ROUTER_TUNING_CACHE",
    "ROUTER_TUNING_ALLOW_CHANGED_WEIGHTS",
)


def env(
    ctx: typer.Context, json_file: JsonFile = None, config: ConfigFile = None, debug: Debug = False
) -> None:
    """Show versions, machine, cache and models, for a bug report."""
    with bar("Looking around"):
        found = _found()
    if json_file is not None:
        write_json(json_file, {**found, "run": {"command": command_line(ctx)}})
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        table.add_row(name, _shown(value))
    stdout().print(table)


def _found() -> dict[str, Any]:
    import torch

    from router_tuning.embedded import ALIASES, models_folder

    folder = models_folder()
    return {
        "versions": {**versions(), **{name: _version(name) for name in ALSO}},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "cache": str(folder),
        "embedded models": {name: _state(folder / name) for name in ALIASES},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [
            f"cuda:{i} ({torch.cuda.get_device_name(i)}, "
            f"{torch.cuda.get_device_properties(i).total_memory >> 30} GiB)"
            for i in range(torch.cuda.device_count())
        ]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _state(folder: Any) -> str:
    return "there" if (folder / "config.json").is_file() else "made on first use"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "-"
    return ", ".join(value) if isinstance(value, list) else str(value)
