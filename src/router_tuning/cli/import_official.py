"""`router-tuning import-official`: the routers of the paper's official code, as an adapter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from router_tuning.cli.console import show
from router_tuning.cli.options import (
    ConfigFile,
    Debug,
    Device,
    Dtype,
    JsonFile,
    check_writable_folder,
)
from router_tuning.cli.records import run_record, write_json
from router_tuning.config import RoutingConfig
from router_tuning.errors import ConfigError


def import_official(
    ctx: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(help="The folder that the official code saved its routers in.")
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="The base model that they were tuned on.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder for the adapter.")],
    pooling: Annotated[
        str,
        typer.Option(
            "--pooling",
            help="Of routers that decide once a sequence, by: prompt, prefix; or official, which "
            "sees the answer and is for comparison alone.",
        ),
    ] = "prompt",
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Read a checkpoint of the official code (of 2024, or of 2026) into an adapter folder."""
    started = time.time()
    RoutingConfig(pooling=pooling).check()
    from router_tuning.adapter_folder import save_adapter
    from router_tuning.cli.adapters import load_base
    from router_tuning.execution.context import routing_of
    from router_tuning.official import import_official as read_into
    from router_tuning.official import read_official
    from router_tuning.peft_config import CONFIG_NAME

    found = read_official(checkpoint)
    if (out / CONFIG_NAME).exists():
        raise ConfigError(f"{out} holds an adapter already; name another folder with --out")
    check_writable_folder(out)
    loaded = load_base(model, dtype, device)
    routed = read_into(found, loaded.model, pooling=pooling)
    save_adapter(routed, out)
    ours = routing_of(routed).config
    result: dict[str, Any] = {
        "adapter": str(out),
        "granularity": found.granularity,
        "layers": ours.layers,
        "num_layers": found.num_layers,
        "threshold": found.threshold,
        "kv": ours.kv,
        "pooling": ours.pooling,
        "run": run_record(ctx, started=started, model=routed),
    }
    if json_file is not None:
        write_json(json_file, result)
    listed = ", ".join(map(str, ours.layers or ()))
    show(
        f"{out}: {found.granularity} of layers {listed} of {found.num_layers}, at the official "
        f"threshold of {found.threshold:g}."
    )
    if "sequence" in found.granularity and ours.pooling == "prompt":
        show("Each prompt decides, as in the official prefill; budgets cannot be calibrated.")
    else:
        show(f"For other budgets: router-tuning calibrate --adapter {out} --data FILE")
