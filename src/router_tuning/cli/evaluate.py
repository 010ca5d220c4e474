"""`router-tuning eval`: an adapter's loss and tasks at budgets, dense, and beside controls."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from router_tuning.cli.console import show, stdout, warn
from router_tuning.cli.options import (
    Adapter,
    BaseModel,
    BatchSize,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    JsonFile,
    Length,
    Seed,
    budgets_in,
    names_in,
)
from router_tuning.cli.records import run_record, write_json
from router_tuning.errors import ConfigError


def evaluate(
    ctx: typer.Context,
    adapter: Adapter,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE", help="Text or chat that the routers were not trained on."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness, such as arc_challenge,piqa; gsm8k is the loss of "
            "its worked answers, and generation compares greedy answers.",
        ),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(
            "--task-data",
            metavar="DIR",
            help="With --tasks: a folder of JSONL files. Default: the harness's own data.",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=0, help="With --tasks: examples shown. Default: the paper's."),
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Calibrated kept fractions to measure.")
    ] = "0.9,0.8,0.7",
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also random masks, and static dropping: chosen by cosine similarity, greedily by "
            "loss, and learned. Takes many times as long.",
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help="Windows of --data, and rows of each task, to measure at most."
        ),
    ] = None,
    selection_data: Annotated[
        str | None,
        typer.Option(
            "--selection-data",
            metavar="FILE",
            help="With --compare: text on which static dropping is chosen. Default: what `tune` "
            "held back.",
        ),
    ] = None,
    learned_static: Annotated[
        str | None,
        typer.Option(
            "--learned-static",
            metavar="DIR",
            help="With --compare: an adapter tuned with --router bias. Default: one is tuned now, "
            "on the adapter's own text.",
        ),
    ] = None,
    static_steps: Annotated[
        int | None,
        typer.Option(
            "--static-steps",
            min=0,
            help="With --compare: steps of that tuning, at most (default: as many as the "
            "adapter's); 0 leaves the control out.",
        ),
    ] = None,
    masks: Annotated[
        int, typer.Option("--masks", min=1, help="With --compare: random masks to average over.")
    ] = 1,
    model: BaseModel = None,
    batch_size: BatchSize = 8,
    length: Length = 256,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Measure loss per token (--data) and tasks (--tasks), dense and at budgets.

    Text is packed into windows; conversations are written under the model's chat template.
    """
    started = time.time()
    wanted = budgets_in(budgets)
    names = names_in(tasks)
    _check_options(
        data, names, task_data, shots, compare, selection_data, learned_static, static_steps
    )
    from router_tuning.cli.adapters import load_routed
    from router_tuning.cli.controls import Controls, measure
    from router_tuning.cli.task_runs import Asked, measure_tasks
    from router_tuning.data import load_examples, make_windows

    examples = None if data is None else load_examples(data)
    loaded = load_routed(adapter, model, dtype, device)
    _check_budgets(loaded.model, wanted)
    controls = None
    if compare:
        controls = Controls(selection_data, learned_static, static_steps, range(seed, seed + masks))
    result: dict[str, Any] = {}
    told: dict[str, str] = {}
    on_windows = None
    if examples is not None:
        on_windows = make_windows(loaded.tokenizer, examples, length=length, limit=limit)
    if names:  # first: the loss of learned static dropping takes the adapter off
        asked = Asked(names, task_data, shots, limit, batch_size, length)
        result["tasks"], more = measure_tasks(loaded, adapter, asked, wanted, controls)
        told |= more
    if on_windows is not None and data is not None:
        _note_if_tuned_on(adapter, data)
        losses, more = measure(loaded, adapter, on_windows, wanted, batch_size, controls)
        result = {**losses, **result}
        told |= {"measured": data, **more}
    result["run"] = run_record(
        ctx,
        started=started,
        model=loaded.model,  # its device and dtype
        seeds=list(controls.seeds) if controls else [],
        data=told,
    )
    if json_file is not None:
        write_json(json_file, result)
    _show(result)
    if on_windows is not None:
        size = f"{on_windows.num_tokens} tokens in {len(on_windows)} windows"
        show(f"{data}: {size}; losses are nats a token.")


def _check_options(
    data: str | None,
    names: tuple[str, ...],
    task_data: Path | None,
    shots: int | None,
    compare: bool,
    selection_data: str | None,
    learned_static: str | None,
    static_steps: int | None,
) -> None:
    """ConfigError where options do not go with each other."""
    if data is None and not names:
        raise ConfigError("nothing to measure: give --data FILE, --tasks NAMES, or both")
    if not names and (task_data is not None or shots is not None):
        raise ConfigError("--task-data and --shots go with --tasks")
    if not compare and (selection_data or learned_static or static_steps is not None):
        raise ConfigError("--selection-data, --learned-static and --static-steps go with --compare")
    if learned_static is not None and static_steps is not None:
        raise ConfigError("--static-steps tunes the control that --learned-static gives: name one")
    if data is None and (learned_static is not None or static_steps is not None):
        raise ConfigError(
            "--learned-static and --static-steps go with --data; tasks have no rows "
            "of learned static dropping"
        )


def _show(result: dict[str, Any]) -> None:
    from router_tuning.report.tables import evaluation_table
    from router_tuning.report.task_tables import task_tables

    if "dense" in result:
        stdout().print(evaluation_table(result))
    for table in task_tables(result.get("tasks", {})):
        stdout().print(table)


def _check_budgets(model: Any, budgets: tuple[float, ...]) -> None:
    """BudgetError before the text is read, not after."""
    from router_tuning.config import threshold_for
    from router_tuning.execution.context import routing_of

    for budget in budgets:
        threshold_for(routing_of(model).config, budget)


def _note_if_tuned_on(adapter: str, data: str) -> None:
    from router_tuning.cli.adapters import recipe_of

    recipe = recipe_of(adapter)
    tuned = None if recipe is None else recipe.data
    same = tuned == data or (
        tuned is not None
        and Path(tuned).exists()
        and Path(data).exists()
        and os.path.samefile(tuned, data)
    )
    if tuned is not None and same:
        warn(
            f"the adapter was tuned on {data}; losses on text of training look better than they are"
        )
