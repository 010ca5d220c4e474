"""scripts/setup chooses a CPU build of torch, also with a pip that knows no --dry-run."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup"
BASH = shutil.which("bash") or "bash"
LISTED = "torch (2.13.0)\nAvailable versions: 3.0.0+cpu, 2.13.0, 2.12.1+cpu, 2.12.0+cpu, 2.5.1+cpu"


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")
@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        (LISTED, "torch==2.12.1+cpu"),
        ("torch (2.13.0)\nAvailable versions: 2.13.0, 2.12.0", ""),
        ("torch (2.5.1+cpu)\nAvailable versions: 2.5.1+cpu", ""),
        (None, ""),
    ],
    ids=["some", "none", "older", "no index"],
)
def test_the_newest_cpu_build_in_range_is_chosen(
    tmp_path: Path, listed: str | None, chosen: str
) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    answer = "return 1" if listed is None else f"printf '%s' '{listed}'"
    script = f"""
set -euo pipefail
. '{SETUP}'
venv='{tmp_path}'
pip() {{
    [ "$1 $2" = "index versions" ] || {{ say "this pip has no $*"; return 2; }}
    {answer}
}}
newest_cpu_build 'torch>=2.6,<3'
"""
    done = subprocess.run([BASH, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == chosen
