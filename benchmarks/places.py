"""Where results lie, how a document points to one, and what one says of places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def read(path: Path) -> dict[str, Any]:
    """The result in a file."""
    return dict(json.loads(path.read_text()))


def shown(argument: str) -> str:
    """An argument without the folder of an absolute path, which says nothing elsewhere."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if value.startswith("/") else argument


def link(path: Path, root: str, name: str | None = None) -> str:
    """A Markdown link to a result; `root` leads from the document to the repository's root."""
    return f"[{name or path.name}]({root}benchmarks/results/{path.name})"
