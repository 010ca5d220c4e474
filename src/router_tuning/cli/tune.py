"""`router-tuning tune`: put routers on a model, train them, calibrate them, save an adapter."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router_tuning.cli.console import fail, say, show, stdout
from router_tuning.cli.options import (
    BUDGETS,
    BatchSize,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    JsonFile,
    Length,
    Seed,
    budgets_to_calibrate,
    check_writable_folder,
    is_typed,
)
from router_tuning.cli.records import command_line, program, run_record, write_json
from router_tuning.config import CALIBRATION_WINDOWS
from router_tuning.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from router_tuning.cli.tuning import Settings

INTERRUPTED = 130
TEXT, ROUTERS, LORA, TRAINING = "Text", "Routers", "LoRA", "Training"
"""Panels of the help."""


def tune(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="M", help="smollm2-135m, gemma3-270m, a hub id or a folder."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the adapter goes.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            rich_help_panel=TEXT,
            metavar="D",
            help="A .jsonl or .txt file or a hub id (org/name, org/name:config). Without it: "
            "shipped prompts, answered by the model.",
        ),
    ] = None,
    granularity: Annotated[
        str,
        typer.Option(
            "--granularity",
            rich_help_panel=ROUTERS,
            metavar="G",
            help="attn_token, attn_sequence, mlp_token or mlp_sequence, or one for attention and "
            "one for MLPs with a comma between them; or block_token or block_sequence alone.",
        ),
    ] = "attn_token",
    kv: Annotated[
        str,
        typer.Option(
            "--kv",
            rich_help_panel=ROUTERS,
            metavar="K",
            help="Keys and values of skipped tokens: kept (none) or all.",
        ),
    ] = "kept",
    budget: Annotated[
        float,
        typer.Option(
            "--budget",
            rich_help_panel=ROUTERS,
            metavar="B",
            help="Kept fraction to train for, in (0, 1]: the least that will be asked for, "
            "since the adapter serves larger ones too.",
        ),
    ] = 0.75,
    budget_in: Annotated[
        str,
        typer.Option(
            "--budget-in",
            rich_help_panel=ROUTERS,
            help="What budgets count: executions (each unit's alike), or flops, so that with "
            "attention and MLPs routed training decides where to save.",
        ),
    ] = "executions",
    steps: Annotated[
        int, typer.Option("--steps", rich_help_panel=TRAINING, min=1, help="Optimizer steps.")
    ] = 480,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            rich_help_panel=TRAINING,
            metavar="O",
            help="distill (stay close to the dense model) or lm.",
        ),
    ] = "distill",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel=TRAINING, help="Continue an interrupted tuning in DIR."
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", rich_help_panel=TRAINING, help="Start anew in a DIR that is not empty."
        ),
    ] = False,
    kv_sink: Annotated[
        int,
        typer.Option(
            "--kv-sink",
            rich_help_panel=ROUTERS,
            min=0,
            help="With --kv kept: first tokens that stay visible.",
        ),
    ] = 0,
    kv_window: Annotated[
        int,
        typer.Option(
            "--kv-window",
            rich_help_panel=ROUTERS,
            min=0,
            help="With --kv kept: latest tokens that stay visible.",
        ),
    ] = 0,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            rich_help_panel=ROUTERS,
            help="Routed layers, such as 4-20,25. Default: all.",
        ),
    ] = None,
    decide_after: Annotated[
        int,
        typer.Option(
            "--decide-after",
            rich_help_panel=ROUTERS,
            min=1,
            help="attn_sequence, mlp_sequence, block_sequence: tokens that decide.",
        ),
    ] = 32,
    router: Annotated[
        str,
        typer.Option(
            "--router", rich_help_panel=ROUTERS, help="linear, bottleneck or bias (static)."
        ),
    ] = "linear",
    router_hidden: Annotated[
        int,
        typer.Option(
            "--router-hidden", rich_help_panel=ROUTERS, min=1, help="Width of a bottleneck router."
        ),
    ] = 32,
    batch_size: BatchSize = 2,
    accumulate: Annotated[
        int,
        typer.Option(
            "--accumulate", rich_help_panel=TRAINING, min=1, help="Batches of one optimizer step."
        ),
    ] = 1,
    length: Length = 256,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", rich_help_panel=TRAINING, help="Of the routers' weights."),
    ] = None,
    bias_learning_rate: Annotated[
        float | None,
        typer.Option(
            "--bias-learning-rate", rich_help_panel=TRAINING, help="Of the routers' biases."
        ),
    ] = None,
    budget_weight: Annotated[
        float | None,
        typer.Option(
            "--budget-weight", rich_help_panel=TRAINING, help="Of (kept - target)^2 in the loss."
        ),
    ] = None,
    threshold_range: Annotated[
        float | None,
        typer.Option(
            "--threshold-range",
            rich_help_panel=TRAINING,
            help="How far every second window's threshold is lowered at most, so that larger "
            "budgets are learned too.",
        ),
    ] = None,
    distill_positions: Annotated[
        float | None,
        typer.Option(
            "--distill-positions",
            rich_help_panel=TRAINING,
            help="Share of the tokens that are compared with the dense model. Fewer is faster.",
        ),
    ] = None,
    lm_weight: Annotated[
        float | None,
        typer.Option(
            "--lm-weight",
            rich_help_panel=TRAINING,
            help="With --objective distill: add the cross entropy to the text, so many times "
            "(default: 0.1). 0 stays as close to the dense model as can be.",
        ),
    ] = None,
    lora_r: Annotated[
        int | None,
        typer.Option(
            "--lora-r",
            rich_help_panel=LORA,
            min=1,
            help="Train LoRA of this rank with the routers, in the same adapter. Default: none.",
        ),
    ] = None,
    lora_alpha: Annotated[
        int | None,
        typer.Option(
            "--lora-alpha", rich_help_panel=LORA, min=1, help="LoRA's alpha. Default: 2 x rank."
        ),
    ] = None,
    lora_target: Annotated[
        str | None,
        typer.Option(
            "--lora-target",
            rich_help_panel=LORA,
            metavar="NAMES",
            help="Linear layers that get LoRA, such as q_proj,v_proj, or all-linear. Default: "
            "PEFT's choice for the family.",
        ),
    ] = None,
    lora_learning_rate: Annotated[
        float | None,
        typer.Option("--lora-learning-rate", rich_help_panel=LORA, help="Of LoRA's weights."),
    ] = None,
    answers_only: Annotated[
        bool,
        typer.Option(
            "--answers-only",
            rich_help_panel=TRAINING,
            help="With --objective lm: loss on answers only.",
        ),
    ] = False,
    prompts: Annotated[
        int,
        typer.Option(
            "--prompts",
            rich_help_panel=TEXT,
            min=2,
            max=300,
            help="Without --data: prompts to answer.",
        ),
    ] = 300,
    answer_tokens: Annotated[
        int,
        typer.Option(
            "--answer-tokens",
            rich_help_panel=TEXT,
            min=1,
            help="Without --data: length of an answer.",
        ),
    ] = 128,
    own_text: Annotated[
        float,
        typer.Option(
            "--own-text",
            rich_help_panel=TEXT,
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="Share of the training text that the model writes itself, from nothing: for an "
            "adapter that meets text of other kinds than --data too.",
        ),
    ] = 0.0,
    held_out: Annotated[
        int,
        typer.Option(
            "--held-out",
            rich_help_panel=TEXT,
            min=1,
            help="Windows held back for calibration, at most.",
        ),
    ] = CALIBRATION_WINDOWS,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Budgets to calibrate at the end.")
    ] = BUDGETS,
    save_every: Annotated[
        int,
        typer.Option(
            "--save-every", rich_help_panel=TRAINING, min=1, help="Steps between checkpoints."
        ),
    ] = 20,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Train routers on a frozen model, calibrate budgets, and save an adapter.

    Some of the text is held back: it never trains, the thresholds are chosen on it, and the losses
    shown are of it. Ctrl-C leaves a checkpoint; --resume continues it.
    """
    started = time.time()
    from router_tuning.cli.tuning import Settings

    settings = Settings.of(ctx.params)
    settings.routing()
    wanted = budgets_to_calibrate(budgets, settings.budget)
    if resume and is_typed(ctx, "resume") and not is_typed(ctx, "overwrite"):
        overwrite = False  # of a --config file, which the tuning to be resumed began with
    _prepare_folder(out, settings, resume, overwrite)
    try:
        result = _run(ctx, settings, out, wanted, device, save_every, started)
    except KeyboardInterrupt:
        fail(_after_stop(ctx, out), label="stopped")
        raise typer.Exit(INTERRUPTED) from None
    except TrainingError as error:
        raise TrainingError(_for_the_command_line(str(error))) from error
    if json_file is not None:
        write_json(json_file, result)
    _show_result(result, out)


def _run(
    ctx: typer.Context,
    settings: Settings,
    out: Path,
    budgets: tuple[float, ...],
    device: str,
    save_every: int,
    started: float,
) -> dict[str, Any]:
    """All the steps; returns the result, which is written into the folder too."""
    from router_tuning.adapter_folder import save_adapter
    from router_tuning.attach import num_router_parameters
    from router_tuning.cli import tuning
    from router_tuning.cli.adapters import ANSWERS, RECORD, WORK, load_base
    from router_tuning.cli.material import prepare
    from router_tuning.lora import lora_parameters

    recipe = settings.recipe()
    base = load_base(settings.model, settings.dtype, device)
    material = prepare(recipe, base.model, base.tokenizer, answers=out / WORK / ANSWERS)
    model = tuning.attach_routers(base.model, settings)
    log = tuning.train(model, settings, material, out, save_every=save_every)
    skipped = tuning.calibrate_what_can_be_met(
        model, material.held_out, budgets, settings.batch_size
    )
    tuning.choose_default(model, settings.budget)
    rows = tuning.budget_rows(model, material.held_out, settings.batch_size)
    save_adapter(model, out)
    result = {
        **json.loads((out / RECORD).read_text(encoding="utf-8")),
        "finished": True,
        "router_parameters": num_router_parameters(model),
        "lora_parameters": sum(p.numel() for p in lora_parameters(model)),
        "train_tokens": recipe.windows * material.train.ids.shape[1],
        "train_windows": len(material.train),
        "held_out_windows": len(material.held_out),
        "not_calibrated": skipped,
        "budgets": rows,
        "log": log,
        "run": run_record(
            ctx, started=started, model=model, seeds=[settings.seed], data={"tuned": recipe.name}
        ),
    }
    write_json(out / RECORD, result)
    return result


def _prepare_folder(out: Path, settings: Settings, resume: bool, overwrite: bool) -> None:
    """Make the folder ready, or refuse it; leaves the record that --resume compares with."""
    from dataclasses import asdict

    from router_tuning.cli.adapters import RECORD, WORK
    from router_tuning.cli.tuning import remove_tuning

    if resume and overwrite:
        raise ConfigError(
            "--resume continues a tuning and --overwrite starts anew: give one of them"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; wanted a folder")
    here = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    earlier = _earlier(out / RECORD)
    if earlier is not None and _is_empty(out, here, earlier):
        here, earlier = [], None
    if here and not overwrite:
        _refuse(out, here, earlier, settings, resume)
    elif resume:
        say(f"There is no tuning in {out} to resume, so this one starts at the beginning.")
    check_writable_folder(out)
    if overwrite:
        remove_tuning(out)
    check_writable_folder(out / WORK)
    if earlier is None or overwrite:
        record = {"format": 1, "finished": False, "settings": asdict(settings)}
        write_json(out / RECORD, {**record, "recipe": asdict(settings.recipe())})


def _is_empty(out: Path, here: list[str], earlier: dict[str, Any]) -> bool:
    """Whether a tuning ended before it had anything to keep, as after a mistyped --data."""
    from router_tuning.cli.adapters import RECORD, WORK

    begun = earlier.get("finished") or any((out / WORK).glob("*"))
    return not begun and set(here) <= {RECORD, WORK}


def _refuse(
    out: Path, here: list[str], earlier: dict[str, Any] | None, settings: Settings, resume: bool
) -> None:
    """Raise ConfigError unless a folder with something in it may be continued."""
    if earlier is None:
        raise ConfigError(
            f"--out {out} is not empty (it holds "
            f"{', '.join(here[:3])}{', ...' if len(here) > 3 else ''}) and holds no tuning; "
            f"give another folder, or --overwrite to write into this one"
        )
    if not resume:
        raise ConfigError(
            f"--out {out} holds {'a finished' if earlier.get('finished') else 'an interrupted'} "
            f"tuning; --resume continues it, --overwrite starts anew"
        )
    from dataclasses import asdict, fields

    # An option that is newer than the record had its default's effect.
    defaults = {field.name: field.default for field in fields(settings)}
    before = {**defaults, **earlier.get("settings", {})}
    now = asdict(settings)
    changed = [name for name in now if now[name] != before[name]]
    if changed:
        told = "; ".join(
            f"--{name.replace('_', '-')} was {before.get(name)!r} and is {now[name]!r}"
            for name in changed
        )
        raise ConfigError(f"--resume continues the tuning in {out} as it was begun, but {told}")


def _earlier(record: Path) -> dict[str, Any] | None:
    """The record of an earlier tuning; None where there is none."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{record} cannot be read ({error}); give another --out, or --overwrite after a "
            f"look at it"
        ) from error
    return found if isinstance(found, dict) else None


def _after_stop(ctx: typer.Context, out: Path) -> str:
    from router_tuning.cli.adapters import WORK
    from router_tuning.training.safety import last_complete_checkpoint

    checkpoint = last_complete_checkpoint(str(out / WORK))
    if checkpoint is None:
        saved = "no checkpoint was written yet, so the training starts at its beginning"
    else:
        saved = f"step {checkpoint.name.rpartition('-')[2]} is saved"
    arguments = command_line(ctx, "--resume", program=program()).replace(" --overwrite", "")
    return f"{saved}; continue with --resume:\n  {arguments}"


def _for_the_command_line(message: str) -> str:
    """The trainer speaks of its argument, and people here have an option."""
    argument = "resume_from_checkpoint=True"
    return message.replace(f"train({argument})", "--resume").replace(argument, "--resume")


def _show_result(result: dict[str, Any], out: Path) -> None:
    from router_tuning.report.tables import budget_table

    stdout().print(budget_table(result["budgets"]))
    lora = f", {result['lora_parameters']} of LoRA" if result["lora_parameters"] else ""
    show(
        f"{result['router_parameters']} router parameters{lora}, {result['train_tokens']} training "
        f"tokens. Adapter: {out}"
    )
