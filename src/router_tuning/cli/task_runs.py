"""The tasks of `eval`, with what people see meanwhile. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_tuning.cli.adapters import Loaded
from router_tuning.cli.console import bar
from router_tuning.cli.controls import Controls, selection_text
from router_tuning.evaluation.tasks import evaluate_tasks, load_tasks, static_orders


@dataclass(frozen=True)
class Asked:
    """What `eval` was told about tasks."""

    names: Sequence[str]
    folder: Path | None
    """Of local JSONL files; None: the harness's own data."""
    shots: int | None
    """None: the paper's."""
    limit: int | None
    batch_size: int
    length: int
    """Tokens of a window of the text on which static dropping is chosen."""


def measure_tasks(
    loaded: Loaded,
    adapter: str,
    asked: Asked,
    budgets: Sequence[float],
    controls: Controls | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The `tasks` of the JSON, and the names of the data that was taken."""
    model, told = loaded.model, {"tasks": str(asked.folder or "lm-evaluation-harness")}
    with bar("Loading tasks") as progress:
        tasks = load_tasks(
            asked.names,
            model,
            loaded.tokenizer,
            folder=asked.folder,
            shots=asked.shots,
            limit=asked.limit,
            batch_size=asked.batch_size,
            progress=progress,
        )
    orders = None
    if controls is not None:
        selection, told["selection"] = selection_text(controls, adapter, loaded, asked.length)
        with bar("Choosing what static dropping leaves out") as progress:
            orders = static_orders(
                model, selection, budgets, batch_size=asked.batch_size, progress=progress
            )
    with bar(f"Evaluating {', '.join(task.name for task in tasks)}") as progress:
        found = evaluate_tasks(
            model,
            tasks,
            budgets,
            orders=orders,
            seeds=controls.seeds if controls else (),
            progress=progress,
        )
    return found, told
