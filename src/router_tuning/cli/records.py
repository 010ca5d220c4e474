"""The JSON files of the verbs: who ran what on what. Imports no torch before a call."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import typer

import router_tuning
from router_tuning.errors import RouterTuningError
from router_tuning.processor import cpu_instructions

PACKAGES = ("torch", "transformers", "peft")
PROGRAM = "router-tuning"


def versions() -> dict[str, str]:
    """Of what decides a result."""
    found = {"router-tuning": router_tuning.__version__, "python": platform.python_version()}
    return {**found, **{name: importlib.metadata.version(name) for name in PACKAGES}}


def run_record(
    ctx: typer.Context,
    *,
    started: float,
    model: Any = None,
    seeds: list[int] | None = None,
    data: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What a result is worth nothing without.

    Args:
        ctx: of the verb.
        started: `time.time()` when it began.
        model: the model that ran; None where none did.
        seeds: of what was random.
        data: what text served for what, by name.
    """
    import torch

    parameter = None if model is None else next(model.parameters())
    return {
        "command": command_line(ctx),
        "options": {name: _plain(value) for name, value in ctx.params.items()},
        "seeds": seeds or [],
        "data": data or {},
        "versions": versions(),
        "device": None if parameter is None else device_name(parameter.device),
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "instructions": cpu_instructions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "peak_rss_mb": peak_rss_mb(),
    }


def command_line(ctx: typer.Context, *more: str, program: str = PROGRAM) -> str:
    """The command as it was typed, with options added that it does not have."""
    arguments: list[str] = list(ctx.meta.get("arguments", []))
    options = shlex.join([*arguments, *(a for a in more if a not in arguments)])
    return f"{program} {options}"


def program() -> str:
    """How a shell calls this program: its name where that is found, else the path it has here."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("router_tuning", "__main__.py"):
        return f"{shlex.quote(sys.executable)} -m router_tuning"
    found = shutil.which(PROGRAM)
    if called.name != PROGRAM or (found and Path(found).resolve() == called.resolve()):
        return PROGRAM
    return shlex.quote(sys.argv[0])


def device_name(device: Any) -> str:
    """Such as `cpu` or `cuda (NVIDIA H100)`."""
    import torch

    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return str(device)


def peak_rss_mb() -> int | None:
    """The most memory that this process has held; None where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document as `write_text` does; what JSON cannot hold becomes text or null."""
    write_text(path, json.dumps(_plain(document), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename.

    Raises:
        RouterTuningError: the file cannot be written; nothing of it is left.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RouterTuningError(
            f"cannot write {path}: {error.strerror or error}; make room there, or "
            f"choose another place"
        ) from error


def _plain(value: Any) -> Any:
    """What JSON can hold; a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
