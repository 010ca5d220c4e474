"""`router-tuning generate`: stream an answer, and say what was skipped for it."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from router_tuning.cli.console import show
from router_tuning.cli.options import (
    Adapter,
    BaseModel,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    JsonFile,
    Seed,
)
from router_tuning.cli.records import run_record, write_json
from router_tuning.config import check_budget
from router_tuning.errors import ConfigError


def generate(
    ctx: typer.Context,
    adapter: Adapter,
    prompt: Annotated[
        str,
        typer.Option("--prompt", metavar="TEXT", help="What to answer; - reads standard input."),
    ],
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", metavar="B", help="Kept fraction; default: the adapter's own. 1 is all."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Length of the answer, at most.")
    ] = 128,
    greedy: Annotated[
        bool,
        typer.Option("--greedy/--sample", help="The likeliest token each time, or drawn ones."),
    ] = True,
    temperature: Annotated[float, typer.Option("--temperature", help="With --sample.")] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", help="With --sample.")] = 0.95,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt, without a chat template.")
    ] = False,
    model: BaseModel = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Answer a prompt at a budget."""
    started = time.time()
    if budget is not None:
        check_budget(budget)
    if not greedy and (temperature <= 0 or not 0 < top_p <= 1):
        raise ConfigError(
            f"--temperature must be above 0 and --top-p in (0, 1], got {temperature}, {top_p}"
        )
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigError("the prompt is empty; give --prompt TEXT")
    from router_tuning.cli.adapters import load_routed
    from router_tuning.cli.generation import answer
    from router_tuning.config import threshold_for
    from router_tuning.execution.context import routing_of

    loaded = load_routed(adapter, model, dtype, device)
    threshold_for(routing_of(loaded.model).config, budget)
    sampling = {} if greedy else {"temperature": temperature, "top_p": top_p}
    result: dict[str, Any] = answer(
        loaded,
        text,
        budget=budget,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        raw=raw,
        seed=seed,
    )
    show()
    show(summary(result))
    if json_file is not None:
        run = run_record(ctx, started=started, model=loaded.model, seeds=[] if greedy else [seed])
        write_json(json_file, {**result, "run": run})


def summary(result: dict[str, Any]) -> str:
    """What an answer cost, in a line."""
    kept, kv, dense_kv = (result[name] for name in ("kept_fraction", "kv_bytes", "dense_kv_bytes"))
    return (
        f"kept {kept:.3f} of the executions; key/value cache {kv / 1e6:.2f} MB, dense "
        f"{dense_kv / 1e6:.2f} MB ({kv / dense_kv:.0%}); FLOPs {result['flops_fraction']:.0%} "
        f"of dense; {result['prompt_tokens']} + {result['new_tokens']} tokens"
    )
