"""`router-tuning export`: an ordinary checkpoint without the blocks that hardly ever run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from router_tuning.cli.console import bar, show, stdout
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
)
from router_tuning.cli.records import run_record, write_json

NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*", "*TERMS*", "USE_POLICY*")
"""Names of files that go with a model's weights wherever these go."""


def export(
    ctx: typer.Context,
    adapter: Adapter,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Text or chat on which the loss is measured, before and after.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="A new folder for the checkpoint.")
    ],
    drop_below: Annotated[
        float,
        typer.Option(
            "--drop-below",
            metavar="S",
            help="Leave out blocks that run for a smaller share of the tokens than this.",
        ),
    ] = 0.05,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", metavar="B", help="At this calibrated budget; default: the adapter's own."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Windows of --data, at most.")
    ] = None,
    model: BaseModel = None,
    batch_size: BatchSize = 8,
    length: Length = 256,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Turn a block-routed adapter into a shallower model that any engine loads, without routers.

    It is written in the type that the base model is loaded in (--dtype).
    """
    started = time.time()
    from router_tuning.cli.adapters import load_routed
    from router_tuning.data import load_examples, make_windows
    from router_tuning.evaluation.perplexity import evaluate, window_loss
    from router_tuning.export import blocks_below, check_droppable, check_new, write_shallow
    from router_tuning.peft_config import RouterTuningConfig

    settings = RouterTuningConfig.from_pretrained(adapter)
    dropped = blocks_below(settings, drop_below, budget)
    at = settings.default_budget if budget is None else budget
    assert at is not None, "blocks_below asks for one"
    check_new(out)
    examples = load_examples(data)
    loaded = load_routed(adapter, model, dtype, device)
    check_droppable(loaded.model, dropped)
    windows = make_windows(loaded.tokenizer, examples, length=length, limit=limit)
    with bar(f"Measuring {windows.num_tokens} tokens") as progress:
        before = evaluate(loaded.model, windows, [at], batch_size=batch_size, progress=progress)
    with bar(f"Writing {out}"):
        shallow = write_shallow(
            loaded.model, dropped, out, tokenizer=loaded.tokenizer, notices=_notices(loaded.name)
        )
    with bar(f"Measuring {windows.num_tokens} tokens, exported") as progress:
        after = window_loss(shallow, windows, batch_size=batch_size, progress=progress)
    whole = loaded.model.get_base_model()
    result: dict[str, Any] = {
        "out": str(out),
        "budget": at,
        "drop_below": drop_below,
        "dropped": dropped,
        "layers": _layers(whole),
        "parameters": _parameters(whole),
        "dense": before["dense"],
        "routed": before["routed"][0],
        "exported": {
            "loss": after.loss,
            "answer_loss": after.answer_loss,
            "layers": _layers(shallow),
            "parameters": _parameters(shallow),
        },
        "run": run_record(ctx, started=started, model=shallow, data={"measured": data}),
    }
    if json_file is not None:
        write_json(json_file, result)
    from router_tuning.report.tables import export_table

    stdout().print(export_table(result))
    listed = ", ".join(f"{name} ({share:.3f})" for name, share in dropped.items())
    blocks = "1 block" if len(dropped) == 1 else f"{len(dropped)} blocks"
    show(f"{out}: {loaded.name} without {blocks}: {listed}. In brackets what budget {at:g} kept.")


def _notices(name: str) -> list[Path]:
    """The licence files in a local model's folder."""
    from router_tuning.embedded import resolve

    folder = Path(resolve(name))
    found = (path for pattern in NOTICES for path in folder.glob(pattern) if path.is_file())
    return sorted(set(found))


def _layers(model: Any) -> int:
    from router_tuning.units import decoder_layers, decoder_of

    return len(decoder_layers(decoder_of(model)))


def _parameters(model: Any) -> int:
    from router_tuning.identity import base_parameters

    return sum(p.numel() for p in {id(p): p for _, p in base_parameters(model)}.values())
