"""`router-tuning bench`: an adapter's speed and memory beside dense, controls and its own limit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from router_tuning.cli.console import bar, show, stdout
from router_tuning.cli.options import (
    Adapter,
    BaseModel,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    JsonFile,
    Seed,
    budgets_in,
)
from router_tuning.cli.records import run_record, write_json
from router_tuning.errors import ConfigError


def bench(
    ctx: typer.Context,
    adapter: Adapter,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", help="Calibrated kept fractions; default: the adapter's own."),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", help="Lengths of prompts.")
    ] = "512,2048",
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=0, help="Tokens to decode after each prompt.")
    ] = 32,
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Rows that run together.")
    ] = "1,8",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="How often each variant is timed.")
    ] = 7,
    variants: Annotated[
        str | None,
        typer.Option("--variants", help="Leave all but these, dense and floor out."),
    ] = None,
    most_tokens: Annotated[
        int | None,
        typer.Option("--most-tokens", min=1, help="Leave out prompts that hold more, all rows."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE", help="Text to run on. Default: what `tune` held back."
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", metavar="FILE", help="Draw the times beside dense here."),
    ] = None,
    growth: Annotated[
        Path | None,
        typer.Option("--growth", metavar="FILE", help="Draw them against the prompt's length."),
    ] = None,
    model: BaseModel = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; default: torch's choice.")
    ] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Time prefill and decoding, routed and not, in one run.

    Only ratios within a run mean something; run it on a machine that does nothing else.
    """
    started = time.time()
    wanted: tuple[float | None, ...] = (None,) if budgets is None else budgets_in(budgets)
    lengths = numbers_in("--prompt-tokens", prompt_tokens)
    rows = numbers_in("--batch-size", batch_size)
    import torch

    from router_tuning.bench import Plan
    from router_tuning.bench import bench as measure
    from router_tuning.cli.adapters import load_routed
    from router_tuning.report.figures import growth_figure, speed_figure
    from router_tuning.report.tables import speed_table

    if threads is not None:
        torch.set_num_threads(threads)
    names = None if variants is None else [n.strip() for n in variants.split(",") if n.strip()]
    plan = Plan(lengths, new_tokens, rows, wanted, repeats, seed, names, most_tokens)
    loaded = load_routed(adapter, model, dtype, device)
    ids_N, name = _text(adapter, loaded, data, seed)
    with bar("Measuring") as progress:
        cells = measure(loaded.model, ids_N, plan, progress=progress)
    result: dict[str, Any] = {
        "model": loaded.name,
        "adapter": _described(loaded.model),
        "cells": cells,
        "run": run_record(
            ctx, started=started, model=loaded.model, seeds=[seed], data={"text": name}
        ),
    }
    if json_file is not None:
        write_json(json_file, result)
    if figure is not None:
        speed_figure(result, figure)
    if growth is not None:
        growth_figure(result, growth)
    stdout().print(speed_table(result))
    show("Times are over dense (dense = 1). * marks a saving too small to tell from the noise.")


def numbers_in(option: str, text: str) -> tuple[int, ...]:
    """`512,2048` as positive numbers, each once.

    Raises:
        ConfigError: not such a list.
    """
    try:
        found = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise ConfigError(f"{option} wants whole numbers such as 1,8, got {text!r}") from error
    if not found or found[0] < 1:
        raise ConfigError(f"{option} wants numbers of at least 1, such as 1,8, got {text!r}")
    return tuple(found)


def _text(adapter: str, loaded: Any, data: str | None, seed: int) -> tuple[Any, str]:
    """Tokens of real text, one behind the other."""
    from router_tuning.cli.adapters import text_held_back
    from router_tuning.data import load_examples, make_windows

    if data is None:
        windows, name = text_held_back(adapter, loaded, seed)
    else:
        windows, name = make_windows(loaded.tokenizer, load_examples(data)), data
    return windows.ids.flatten(), name


def _described(model: Any) -> dict[str, Any]:
    """What of an adapter decides its speed."""
    from router_tuning.execution.context import routing_of

    routing = routing_of(model)
    names = ("granularity", "kv", "kv_sink", "kv_window", "decide_after", "router")
    return {
        **{name: getattr(routing.config, name) for name in names},
        "routed_units": len(routing.units),
        "units_of_the_kinds": routing.num_units_of_kind,
    }
