"""`router-tuning demo`: the whole job on a real model, small enough for a laptop."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from router_tuning.cli.console import say, show, stdout
from router_tuning.cli.options import (
    ConfigFile,
    Debug,
    Device,
    JsonFile,
    Seed,
    budgets_to_calibrate,
    check_writable_folder,
)
from router_tuning.cli.records import program, run_record, write_json
from router_tuning.errors import ConfigError

RESULT = "demo.json"
FIGURE = "demo.png"
KV_SINK, KV_WINDOW = 4, 16
"""The first and the latest tokens stay visible: for so short a training it matters most."""
DISTILL_POSITIONS = 0.25
"""A part of each step goes into the output head, and this is how much of it is left."""
PROMPT = "Give me three tips for learning a new language."


def demo(
    ctx: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where everything goes.")
    ] = Path("router-tuning-demo"),
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="M", help="smollm2-135m, gemma3-270m, a hub id or a folder."
        ),
    ] = "smollm2-135m",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 30,
    prompts: Annotated[
        int,
        typer.Option("--prompts", min=10, max=300, help="Shipped prompts that the model answers."),
    ] = 48,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", min=8, help="Length of an answer, at most.")
    ] = 48,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Windows of one step.")
    ] = 2,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens of a window.")] = 128,
    budget: Annotated[float, typer.Option("--budget", help="Kept fraction to train for.")] = 0.7,
    budgets: Annotated[str, typer.Option("--budgets", help="Budgets to measure.")] = "0.9,0.8,0.7",
    prompt: Annotated[str, typer.Option("--prompt", help="Answered dense and routed.")] = PROMPT,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Length of those two answers, at most.")
    ] = 40,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that holds something else.")
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Tune attention routers for SmolLM2-135M, measure them beside controls, and use them.

    Needs no data: the frozen model answers shipped prompts, some of which are held back to measure
    on. Takes some minutes on two free CPU cores.
    """
    started = time.time()
    from router_tuning.cli.adapters import RECORD
    from router_tuning.cli.tuning import Settings

    settings = Settings(
        model=model,
        granularity="attn_token",
        kv="kept",
        kv_sink=KV_SINK,
        kv_window=KV_WINDOW,
        budget=budget,
        distill_positions=DISTILL_POSITIONS,
        steps=steps,
        batch_size=batch_size,
        length=length,
        prompts=prompts,
        answer_tokens=answer_tokens,
        seed=seed,
    )
    settings.routing()
    wanted = budgets_to_calibrate(budgets, budget)
    _prepare_folder(out, overwrite)
    result = _run(settings, out, wanted, device, prompt, max_new_tokens)
    result["run"] = run_record(
        ctx, started=started, model=result.pop("model"), seeds=[seed], data=result.pop("data")
    )
    write_json(out / RECORD, result.pop("record"))
    write_json(out / RESULT, result)
    if json_file is not None:
        write_json(json_file, result)
    _show_result(result, out, model)


def _run(
    settings: Any,
    out: Path,
    budgets: tuple[float, ...],
    device: str,
    prompt: str,
    max_new_tokens: int,
) -> dict[str, Any]:
    """All the steps; returns the result."""
    from router_tuning.adapter_folder import save_adapter
    from router_tuning.cli import tuning
    from router_tuning.cli.adapters import ANSWERS, WORK, load_base
    from router_tuning.cli.comparison import compare, demo_text
    from router_tuning.report.figures import loss_figure

    base = load_base(settings.model, "auto", device)
    check_writable_folder(out / WORK)
    text = demo_text(settings, base, out / WORK / ANSWERS)
    model = tuning.attach_routers(base.model, settings)
    tuning.train(model, settings, text.material, out, evaluate=False)
    tuning.calibrate_what_can_be_met(model, text.material.held_out, budgets)
    tuning.choose_default(model, settings.budget)
    save_adapter(model, out)
    calibrated = tuning.calibrated_budgets(model)
    result = compare(model, text, calibrated, settings.seed)
    loss_figure(
        result,
        out / FIGURE,
        f"{settings.model}: attention skipped, {_tokens(result)} tokens of text",
    )
    result["answers"] = _answers(model, base, prompt, calibrated, max_new_tokens, settings.seed)
    record = {"format": 1, "finished": True, "settings": asdict(settings)}
    return {
        **result,
        "model": model,
        "data": text.names,
        "record": {**record, "recipe": asdict(text.recipe)},
    }


def _answers(
    model: Any,
    base: Any,
    prompt: str,
    budgets: list[float],
    max_new_tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The dense answer, and a routed one at the middle budget."""
    from router_tuning.cli.adapters import Loaded
    from router_tuning.cli.generation import answer

    loaded = Loaded(model, base.tokenizer, base.name)
    found = []
    show(f"\n> {prompt}")
    for budget in (1.0, budgets[len(budgets) // 2]):
        show(f"\n{'dense' if budget == 1.0 else f'budget {budget:g}'}:")
        found.append(
            answer(loaded, prompt, budget=budget, max_new_tokens=max_new_tokens, seed=seed)
        )
    return found


def _prepare_folder(out: Path, overwrite: bool) -> None:
    """Make the folder ready; one that holds something else than a demo is refused."""
    from router_tuning.cli.adapters import RECORD, WORK
    from router_tuning.cli.tuning import remove_tuning

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; wanted a folder")
    # An interrupted demo has no record yet; `tune` begins with one.
    own = (out / RESULT).is_file() or ((out / WORK).is_dir() and not (out / RECORD).is_file())
    if out.is_dir() and any(out.iterdir()) and not own and not overwrite:
        raise ConfigError(
            f"--out {out} is not empty and holds no demo; give another folder, or --overwrite "
            f"to write into it"
        )
    check_writable_folder(out)
    remove_tuning(out)


def _tokens(result: dict[str, Any]) -> int:
    return int(result["dense"]["tokens"])


def _show_result(result: dict[str, Any], out: Path, model: str) -> None:
    from router_tuning.cli.generate import summary
    from router_tuning.report.tables import evaluation_table

    show()
    stdout().print(evaluation_table(result))
    show(
        f"Losses are nats a token over {_tokens(result)} tokens that nothing was tuned or "
        f"chosen on."
    )
    show(f"The routed answer {summary(result['answers'][-1])}.")
    run = result["run"]
    memory = "" if run["peak_rss_mb"] is None else f", {run['peak_rss_mb'] / 1000:.1f} GB of memory"
    say(f"{run['seconds']:.0f} s{memory}")
    show(f"\nAdapter  {out}\nFigure   {out / FIGURE}\nNumbers  {out / RESULT}")
    show("\nNext: ask it, tune for longer and better, measure it on text of your own.")
    budgets = [row["budget"] for row in result["routed"]]
    for line in next_commands(shlex.quote(str(out)), budgets, shlex.quote(model)):
        show(f"  {line}")


def next_commands(out: str, budgets: list[float], model: str) -> list[str]:
    """Command lines to try after the demo; all but the data file of the last are as they stand."""
    start, largest, listed = program(), f"{max(budgets):g}", ",".join(f"{b:g}" for b in budgets)
    return [
        f'{start} generate --adapter {out} --budget {largest} --prompt "What is a router?"',
        f"{start} tune --model {model} --out my-adapter",
        f"{start} eval --adapter {out} --data YOUR.jsonl --budgets {listed} --compare",
    ]
