"""`router-tuning eval`: an adapter's loss at budgets, dense, and beside controls."""

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
)
from router_tuning.cli.records import run_record, write_json
from router_tuning.errors import ConfigError


def evaluate(
    ctx: typer.Context,
    adapter: Adapter,
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="FILE", help="Text or chat that the routers were not trained on."
        ),
    ],
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
        int | None, typer.Option("--limit", min=1, help="Windows to measure, at most.")
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
    """Measure loss per token, dense and at budgets.

    Text is packed into windows; conversations are written under the model's chat template.
    """
    started = time.time()
    wanted = budgets_in(budgets)
    if not compare and (selection_data or learned_static or static_steps is not None):
        raise ConfigError("--selection-data, --learned-static and --static-steps go with --compare")
    if learned_static is not None and static_steps is not None:
        raise ConfigError("--static-steps tunes the control that --learned-static gives: name one")
    from router_tuning.cli.adapters import load_routed
    from router_tuning.cli.controls import Controls, measure
    from router_tuning.data import load_examples, make_windows

    examples = load_examples(data)
    loaded = load_routed(adapter, model, dtype, device)
    _check_budgets(loaded.model, wanted)
    windows = make_windows(loaded.tokenizer, examples, length=length, limit=limit)
    names = {"measured": data}
    _note_if_tuned_on(adapter, data)
    controls = None
    if compare:
        controls = Controls(selection_data, learned_static, static_steps, range(seed, seed + masks))
    result, more = measure(loaded, adapter, windows, wanted, batch_size, controls)
    result["run"] = run_record(
        ctx,
        started=started,
        model=loaded.model,  # its device and dtype
        seeds=list(controls.seeds) if controls else [],
        data={**names, **more},
    )
    if json_file is not None:
        write_json(json_file, result)
    from router_tuning.report.tables import evaluation_table

    stdout().print(evaluation_table(result))
    show(f"{data}: {windows.num_tokens} tokens in {len(windows)} windows; losses are nats a token.")


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
