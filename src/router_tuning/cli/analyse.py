"""`router-tuning analyse`: which layers and tokens skip, by domain, and how stable that is."""

from __future__ import annotations

import time
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from router_tuning.cli.console import show, stdout
from router_tuning.cli.options import (
    BaseModel,
    BatchSize,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    JsonFile,
    Length,
    Seed,
    files_by_name,
)
from router_tuning.cli.records import run_record, write_json
from router_tuning.config import check_budget
from router_tuning.errors import BudgetError, ConfigError

START = "start"
"""What the fitted start is called among the adapters."""


def analyse(
    ctx: typer.Context,
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            metavar="DIR",
            help="An adapter's folder (or hub repository). Give several, such as seeds, to compare "
            "their decisions.",
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="NAME=FILE",
            help="A domain's name, and text of it that the routers were not trained on. Give "
            "several.",
        ),
    ],
    budget: Annotated[
        float,
        typer.Option("--budget", metavar="B", help="The part of all this text to keep, below 1."),
    ],
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated",
            help="Take the adapters' calibrated thresholds instead of those that keep exactly the "
            "budget here.",
        ),
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Windows of each domain, at most.")
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--start-from",
            metavar="FILE",
            help="The text of training: compare with routers that are only fitted to it, as they "
            "are before the first step.",
        ),
    ] = None,
    start_rows: Annotated[
        int, typer.Option("--start-rows", min=1, help="With --start-from: windows to fit to.")
    ] = 128,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", metavar="FILE", help="Draw what is kept, by layer and by token."),
    ] = None,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts",
            help="Of a mixture of experts: count the tokens that each expert is assigned, and that "
            "it executes, before and with the routers.",
        ),
    ] = False,
    expert_figure: Annotated[
        Path | None,
        typer.Option("--expert-figure", metavar="FILE", help="Draw that; goes with --experts."),
    ] = None,
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
    """Tell which layers and which tokens skip, domain by domain, and whether several adapters (and
    the start of their training) decide alike.

    All domains share a threshold, so one can be kept more than another.
    """
    started = time.time()
    _check_budget(budget, calibrated, start_from)
    if expert_figure is not None and not experts:
        raise ConfigError("--expert-figure draws what --experts counts: give --experts too")
    files = files_by_name("--data", data)
    names = adapter_names(adapter)
    from router_tuning.cli.adapters import base_name, load_base
    from router_tuning.cli.routing_runs import (
        Asked,
        check_calibrated,
        check_one_start,
        configs_of,
        of_adapter,
        of_dense,
        of_start,
        start_rows_of,
        text_entry,
        text_of,
    )
    from router_tuning.data import load_examples, make_windows
    from router_tuning.evaluation.expert_analysis import check_mixture, experts_entry

    configs = configs_of(adapter)
    if calibrated:
        check_calibrated(configs, budget)
    if start_from is not None:
        check_one_start(adapter, configs)
    examples = {name: load_examples(file) for name, file in files.items()}
    start_text = None if start_from is None else load_examples(start_from)
    loaded = load_base(model or base_name(adapter[0]), dtype, device)
    if experts:
        check_mixture(loaded.model)
    asked = Asked(budget, calibrated, batch_size, experts)
    domains = {
        name: make_windows(loaded.tokenizer, found, length=length, limit=limit)
        for name, found in examples.items()
    }
    text = text_of(loaded, domains, batch_size)
    ran = {}
    if start_text is not None:
        rows = start_rows_of(loaded, start_text, length, start_rows, seed)
        ran[START] = of_start(loaded, configs[0], rows, seed, text, asked)
    for name, folder in zip(names, adapter, strict=True):
        ran[name] = of_adapter(loaded, folder, name, text, asked)
    used = {name: of.experts for name, of in ran.items() if of.experts is not None}
    told = dict(zip(names, configs, strict=True)) | {START: configs[0]}
    served = {f"measured: {name}": file for name, file in files.items()}
    result: dict[str, Any] = {
        "model": loaded.name,
        "budget": budget,
        "threshold_from": "calibration" if calibrated else "measured text",
        "text": text_entry(text),
        **_compared({name: of.decisions for name, of in ran.items()}, told, text),
        "experts": experts_entry(of_dense(loaded, text, asked), used) if experts else None,
        "run": run_record(
            ctx,
            started=started,
            model=loaded.model,
            seeds=[] if start_from is None else [seed],
            data=served if start_from is None else {**served, "start": start_from},
        ),
    }
    if json_file is not None:
        write_json(json_file, result)
    _draw(result, figure, expert_figure)
    _show(result)


def _check_budget(budget: float, calibrated: bool, start_from: str | None) -> None:
    if check_budget(budget) == 1:
        raise BudgetError("--budget 1 keeps everything, so there is nothing to analyse; ask less")
    if calibrated and start_from is not None:
        raise ConfigError(
            "--start-from compares with routers that have no calibrated thresholds: leave "
            "--calibrated out, so that all keep exactly the budget"
        )


def adapter_names(adapters: list[str]) -> list[str]:
    """The adapters' folders by their last name, or as they were given where two share it."""
    last = [Path(folder).resolve().name if Path(folder).is_dir() else folder for folder in adapters]
    names = adapters if len(set(last)) < len(last) or START in last else last
    if len(set(names)) < len(names):
        raise ConfigError(f"--adapter names one adapter twice: {', '.join(adapters)}")
    if START in names:
        raise ConfigError(f"--adapter {START}: that is what the start is called; write ./{START}")
    return names


def _compared(decided: dict[str, Any], told: dict[str, Any], text: Any) -> dict[str, Any]:
    """What each decided, and how far two decide alike."""
    from router_tuning.cli.routing_runs import routed_entry
    from router_tuning.evaluation.routing_analysis import stability

    found = {name: routed_entry(name, told[name], of, text) for name, of in decided.items()}
    pairs = [
        {"a": a, "b": b, **stability(decided[a], decided[b], text)}
        for a, b in combinations(decided, 2)
    ]
    start = found.pop(START, None)
    return {"start": start, "adapters": list(found.values()), "pairs": pairs}


def _draw(result: dict[str, Any], figure: Path | None, expert_figure: Path | None) -> None:
    if figure is not None:
        from router_tuning.report.routing_figures import routing_figure

        routing_figure(result, figure)
    if expert_figure is not None:
        from router_tuning.report.expert_figures import expert_figure as draw

        draw(result["experts"], expert_figure)


def _show(result: dict[str, Any]) -> None:
    from router_tuning.report.routing_tables import routing_table, stability_table, token_table

    stdout().print(routing_table(result))
    stdout().print(token_table(result))
    if result["pairs"]:
        stdout().print(stability_table(result))
    if result["experts"] is not None:
        from router_tuning.report.expert_tables import expert_stability_table, expert_table

        stdout().print(expert_table(result["experts"]))
        if result["experts"]["pairs"]:
            stdout().print(expert_stability_table(result["experts"]))
    tokens = sum(text["tokens"] for text in result["text"].values())
    show(
        f"{tokens} tokens, thresholds from the {result['threshold_from']}. kappa: equal decisions "
        f"over chance; of layers: what is left of it when each layer's tokens are shuffled; within "
        f"layers: over that."
    )
