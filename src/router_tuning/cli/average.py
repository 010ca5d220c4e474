"""`router-tuning average`: one adapter from several trainings of one recipe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from router_tuning.cli.console import show, stdout
from router_tuning.cli.options import (
    BUDGETS,
    BaseModel,
    BatchSize,
    Budgets,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    JsonFile,
    Length,
    budgets_to_calibrate,
    check_writable_folder,
)
from router_tuning.cli.records import run_record, write_json
from router_tuning.config import CALIBRATION_WINDOWS
from router_tuning.errors import ConfigError


def average(
    ctx: typer.Context,
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", metavar="DIR", help="An adapter; give two or more of them."),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="D",
            help="Text that none of them was trained on, to calibrate the budgets.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder for the mean.")],
    budgets: Budgets = BUDGETS,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Windows to calibrate on, at most.")
    ] = CALIBRATION_WINDOWS,
    model: BaseModel = None,
    batch_size: BatchSize = 8,
    length: Length = 256,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Average the routers of adapters tuned with different seeds, and calibrate the mean.

    The mean costs what one of them does, and loses less of the text that they were not tuned on.
    """
    started = time.time()
    wanted = budgets_to_calibrate(budgets)
    from router_tuning.adapter_folder import save_adapter
    from router_tuning.averaging import average_adapters
    from router_tuning.cli import tuning
    from router_tuning.cli.adapters import base_name, load_base
    from router_tuning.data import load_examples, make_windows
    from router_tuning.peft_config import CONFIG_NAME

    if (out / CONFIG_NAME).exists():
        raise ConfigError(f"{out} holds an adapter already; name another folder with --out")
    check_writable_folder(out)
    examples = load_examples(data)
    loaded = load_base(model or base_name(adapter[0]), dtype, device)
    routed = average_adapters(adapter, loaded.model).eval()
    windows = make_windows(loaded.tokenizer, examples, length=length, limit=limit)
    skipped = tuning.calibrate_what_can_be_met(routed, windows, wanted, batch_size)
    rows = tuning.budget_rows(routed, windows, batch_size)
    save_adapter(routed, out)
    result: dict[str, Any] = {
        "adapter": str(out),
        "averaged": adapter,
        "budgets": rows,
        "not_calibrated": skipped,
        "windows": len(windows),
        "run": run_record(ctx, started=started, model=routed, data={"calibrated": data}),
    }
    if json_file is not None:
        write_json(json_file, result)
    from router_tuning.report.tables import budget_table

    stdout().print(budget_table(rows))
    show(f"{out}: the mean of {len(adapter)} adapters, calibrated on {windows.num_tokens} tokens.")
