"""scripts/setup chooses a CPU build of torch, also with a pip that knows no --dry-run.

And it reads the lower bounds that scripts/test-matrix installs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "scripts" / "setup"
BASH = shutil.which("bash") or "bash"
LISTED = "torch (2.13.0)\nAvailable versions: 3.0.0+cpu, 2.13.0, 2.12.1+cpu, 2.12.0+cpu, 2.5.1+cpu"


PROJECT = """
[project]
dependencies = [
    "torch>=2.6,<3",
    "peft>=0.21,<1", # a comment
    "pyyaml",
    "tomli>=2; python_version < '3.0'",
]
[project.optional-dependencies]
dev = ["pytest>=8.3", "extras[some]>=1.5"]
other = ["left-out>=1"]
"""

pytestmark = pytest.mark.skipif(
    not list(metadata.distributions(name="pip")), reason="this Python has no pip"
)


def call(place: Path, commands: str) -> str:
    """What some commands print after scripts/setup, where `place` is both the repository and its
    environment.
    """
    python = place / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    script = f"set -euo pipefail; . '{SETUP}'; venv='{place}' root='{place}'\n{commands}"
    done = subprocess.run([BASH, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("which", ["newest", "lowest"])
@pytest.mark.parametrize(
    ("listed", "newest", "lowest"),
    [
        (LISTED, "torch==2.12.1+cpu", "torch==2.12.0+cpu"),
        ("torch (2.13.0)\nAvailable versions: 2.13.0, 2.12.0", "", ""),
        ("torch (2.5.1+cpu)\nAvailable versions: 2.5.1+cpu", "", ""),
        (None, "", ""),
    ],
    ids=["some", "none", "older", "no index"],
)
def test_a_cpu_build_in_range_is_chosen(
    tmp_path: Path, listed: str | None, newest: str, lowest: str, which: str
) -> None:
    answer = "return 1" if listed is None else f"printf '%s' '{listed}'"
    chosen = call(
        tmp_path,
        f"""
pip() {{
    [ "$1 $2" = "index versions" ] || {{ say "this pip has no $*"; return 2; }}
    {answer}
}}
cpu_build {which} 'torch>=2.6,<3'
""",
    )
    assert chosen == (newest if which == "newest" else lowest)


def test_lower_bounds_are_those_of_the_package_and_of_its_tests(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    bounds = ["torch==2.6", "peft==0.21", "pytest==8.3", "extras==1.5"]
    assert call(tmp_path, "lower_bounds").split() == bounds


@pytest.mark.parametrize("corner", ["newest", "lowest"])
def test_a_corner_holds_torch_to_the_build_that_is_there(tmp_path: Path, corner: str) -> None:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    held = call(tmp_path, f"corner={corner}; constraints").split()
    assert held[0] == f"torch=={metadata.version('torch')}"
    assert held[1:] == ([] if corner == "newest" else ["peft==0.21", "pytest==8.3", "extras==1.5"])


def test_every_dependency_has_a_lower_bound(tmp_path: Path) -> None:
    text = (SETUP.parents[1] / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text)
    bounded = {line.partition("==")[0] for line in call(tmp_path, "lower_bounds").split()}
    named = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert named is not None
    wanted = re.findall(r'^ *"([\w-]+)', named[1], re.MULTILINE)
    assert {"torch", "transformers", "peft"} <= set(wanted) <= bounded


@pytest.mark.parametrize("arguments", ["--only", "--only newer"])
def test_a_corner_that_there_is_not_is_refused(arguments: str) -> None:
    done = subprocess.run(
        [BASH, SETUP.parent / "test-matrix", *arguments.split()], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "--only takes lowest or newest" in done.stderr
