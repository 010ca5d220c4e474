"""`router-tuning calibrate`: choose anew the thresholds of an adapter's budgets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from router_tuning.cli.console import show, stdout
from router_tuning.cli.options import (
    BUDGETS,
    Adapter,
    BaseModel,
    BatchSize,
    Budgets,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    JsonFile,
    Length,
    Seed,
    budgets_to_calibrate,
    check_writable_folder,
)
from router_tuning.cli.records import run_record, write_json
from router_tuning.config import CALIBRATION_WINDOWS
from router_tuning.errors import AdapterError


def calibrate(
    ctx: typer.Context,
    adapter: Adapter,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="D",
            help="Text that the routers were not trained on. Default: what `tune` held back.",
        ),
    ] = None,
    budgets: Budgets = BUDGETS,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Windows to use, at most.")
    ] = CALIBRATION_WINDOWS,
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
    """Find one threshold a budget on held-out text, and write them into the adapter.

    Budgets that the adapter had before are replaced; those that cannot be met are left out with a
    note.
    """
    started = time.time()
    wanted = budgets_to_calibrate(budgets)
    _check_folder(adapter)
    from router_tuning.cli import tuning
    from router_tuning.cli.adapters import load_routed, text_held_back
    from router_tuning.data import load_examples, make_windows
    from router_tuning.execution.context import routing_of

    examples = None if data is None else load_examples(data)
    loaded = load_routed(adapter, model, dtype, device)
    if examples is None:
        windows, name = text_held_back(adapter, loaded, seed)
        windows = windows.take(range(min(limit, len(windows))))
    else:
        windows = make_windows(loaded.tokenizer, examples, length=length, limit=limit)
        name = str(data)
    default = routing_of(loaded.model).config.default_budget
    skipped = tuning.calibrate_what_can_be_met(loaded.model, windows, wanted, batch_size)
    tuning.choose_default(loaded.model, default)
    rows = tuning.budget_rows(loaded.model, windows, batch_size)
    _save(loaded.model, adapter)
    result: dict[str, Any] = {
        "budgets": rows,
        "not_calibrated": skipped,
        "windows": len(windows),
        "run": run_record(
            ctx, started=started, model=loaded.model, seeds=[seed], data={"calibrated": name}
        ),
    }
    if json_file is not None:
        write_json(json_file, result)
    from router_tuning.report.tables import budget_table

    stdout().print(budget_table(rows))
    show(f"Calibrated on {windows.num_tokens} tokens, {name}. Adapter: {adapter}")


def _check_folder(adapter: str) -> None:
    if not Path(adapter).is_dir():
        raise AdapterError(
            f"no adapter folder {adapter}; thresholds are written into a folder, so save one "
            f"that lies on a hub here first"
        )
    check_writable_folder(Path(adapter))


def _save(model: Any, folder: str) -> None:
    """Write the config and the card; the weights did not change."""
    try:
        model.peft_config[model.active_adapter].save_pretrained(folder)
    except OSError as error:
        raise AdapterError(
            f"cannot write the calibration to {folder}: {error.strerror or error}; what was "
            f"there is unchanged"
        ) from error
