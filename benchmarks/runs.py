"""What a benchmark's result says of its run."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

import torch
from places import shown

from router_tuning.cli.records import device_name, versions
from router_tuning.processor import cpu_instructions


def run_record(
    options: argparse.Namespace, device: torch.device, seeds: list[int]
) -> dict[str, Any]:
    """Of a benchmark that times things: its options have a dtype, threads and repeats."""
    return {
        "command": shlex.join(["python", *map(shown, sys.argv)]),
        "seeds": seeds,
        "versions": versions(),
        "device": device_name(device),
        "dtype": options.dtype,
        "threads": options.threads,
        "instructions": cpu_instructions(),
        "repeats": options.repeats,
    }
