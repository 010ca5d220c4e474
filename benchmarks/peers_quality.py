"""Loss against kept fraction of what others train, beside our routers: time and memory too.

Mixture of depths with all weights, by top-k and by threshold, for as many steps as the routers and
for several times their time; and the official recipe, as its code has it and with the paper's
hinge (peers.py). All on the windows, and measured on the text, of quality.py, with the untouched
model and static drop. Everything is measured in float32. Each training loads a model of its own.
The JSON is rewritten after every run, and `--continue` goes on where it stopped. Example:

    python benchmarks/peers_quality.py --train alpaca_train.jsonl \\
        --report alpaca=alpaca_report.jsonl --static 3,6,9 --steps 480 --batch-size 2 --times 3 \\
        --json benchmarks/results/peers-smollm2-135m.json

Shapes: B batch, T tokens, N tokens of all windows.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import peers
import quality
import torch
from torch import Tensor
from transformers import TrainingArguments

from router_tuning import RoutingConfig, attach, decided_by, detach, record
from router_tuning.data import WindowDataset, Windows
from router_tuning.embedded import load_model, load_tokenizer
from router_tuning.execution.context import routers_of, routing_of
from router_tuning.memory import held_bytes, peak_bytes
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.units import decoder_layers, decoder_of

ALL_WEIGHTS = ("mod_topk", "mod_threshold")
OFFICIAL = ("official", "official_hinge")
METHODS = ("routers", *ALL_WEIGHTS, *OFFICIAL)
TOP_K = {"warm_start": 0, "threshold_range": 0.0, "budget_weight": 0.0}
"""What ranking by logits has no use for."""
UNBOUNDED = 10**9
"""Steps of a training that a clock ends."""
SPARE = 2.0
"""How many more steps than by the routers' pace a time might be enough for."""
LOGGED = ("step", "loss", "task_loss", "kept", "grad_norm")

Run = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments ask for; None takes those of the command line."""
    options = _options(arguments)
    path = quality.opened(options)
    bench = _prepare(options)
    quality.update(path, lambda document: _check_static(document, options))
    document = quality.begin(path, bench)
    for seed in options.seeds:
        for method in options.methods:
            for bound in _bounds(options, document, method, seed):
                which = {"method": method, "seed": seed, "tuning": _tuning(options, method, bound)}
                if not _found(document, which):
                    run = which | _run(bench, document["dense"], method, seed, bound)
                    document = quality.add_runs(path, run)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    quality.add_options(parser)
    parser.add_argument("--methods", type=lambda s: s.split(","), default=list(METHODS))
    parser.add_argument("--unit", default="attn", choices=["attn", "block"], help="that is routed")
    parser.add_argument("--kv", default="all", choices=["all", "kept"])
    parser.add_argument(
        "--seconds",
        type=float,
        help="a router training's, which --times multiplies; else those of this file's",
    )
    parser.add_argument(
        "--times",
        type=quality.numbers(float),
        default=[],
        help="train all weights once more, for so many times that time; 1 with --seconds",
    )
    parser.add_argument("--weights-learning-rate", type=float, default=2e-5)
    parser.add_argument(
        "--top-k-learning-rate", type=float, default=1e-3, help="of routers that rank and weigh"
    )
    parser.add_argument("--samples", type=int, default=1000, help="windows of the official recipe")
    parser.add_argument("--hinge-weight", type=float, default=0.1)
    parser.add_argument("--capacity", type=float, default=0.5, help="that the hinge begins at")
    parser.set_defaults(positions=1.0, static=[3, 6, 9])
    options = quality.parsed(parser, arguments)
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown or options.dtype not in ("float32", "bfloat16"):
        parser.error(f"methods are of {', '.join(METHODS)}; dtype is float32 or bfloat16")
    if options.seconds and not options.times:
        options.times = [1.0]
    options.static_of, options.random = f"{options.unit}_token", []
    return options


def _prepare(options: argparse.Namespace) -> quality.Bench:
    """The text, and the untouched model to measure with."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = load_model(options.model, dtype="float32", device=device).requires_grad_(False)
    wanted = options.steps * options.batch_size
    timed = SPARE * max([0.0, *options.times])
    needed = max(math.ceil(wanted * max(timed, 1)), options.samples)
    windows = quality.read_windows(options, load_tokenizer(options.model), needed)
    return quality.Bench(options, measured, measured, *windows, teacher={})


def _check_static(document: Run, options: argparse.Namespace) -> None:
    """Refuse to go on beside static controls of other units."""
    static = document.setdefault("static_of", options.static_of)
    if static != options.static_of:
        sys.exit(f"--continue: the file has static controls of {static}; give another --json")


def _found(document: Run, which: Run) -> Run:
    """The run in the file that is this one; empty where there is none."""
    same = (run for run in document["runs"] if all(run[name] == which[name] for name in which))
    return next(same, {})


# ---- training ----


def _bounds(
    options: argparse.Namespace, document: Run, method: str, seed: int
) -> list[dict[str, Any]]:
    """How long each training of a method lasts."""
    if method in OFFICIAL:
        steps = max(options.samples // peers.OFFICIAL_BATCH, 1)
        return [{"max_steps": steps, "samples": options.samples}]
    found: list[dict[str, Any]] = [{"max_steps": options.steps}]
    if method in ALL_WEIGHTS and options.times:
        seconds = options.seconds or _routers_seconds(options, document, seed)
        found += [{"times": times, "seconds": round(times * seconds, 1)} for times in options.times]
    return found


def _routers_seconds(options: argparse.Namespace, document: Run, seed: int) -> float:
    tuning = _tuning(options, "routers", {"max_steps": options.steps})
    run = _found(document, {"method": "routers", "seed": seed, "tuning": tuning})
    if not run:
        sys.exit(
            "--times multiplies the time of a router training, and the file has none of seed "
            f"{seed}; begin --methods with routers, or give --seconds"
        )
    return float(run["seconds"])


def _tuning(options: argparse.Namespace, method: str, bound: dict[str, Any]) -> dict[str, Any]:
    """What decides a training, beside its method and seed."""
    model = {
        "granularity": f"{options.unit}_token",
        "kv": options.kv,
        "dtype": options.dtype,
        "attention": options.attention,
    }
    return {**model, **bound, **_arguments(options, method)}


def _arguments(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """What a method's trainer is told."""
    if method in OFFICIAL:
        weight = options.hinge_weight if method == "official_hinge" else 0.0
        return {**peers.OFFICIAL, "hinge_weight": weight, "capacity": options.capacity}
    told = {
        field.name: field.default
        for field in fields(RouterTrainingArguments)
        if field.name in quality.TOLD
    }
    told |= {"distill_positions": options.positions} | options.argument
    told |= {"budget": options.budget, "per_device_train_batch_size": options.batch_size}
    if method in ALL_WEIGHTS:
        told |= {"objective": "lm", "weights_learning_rate": options.weights_learning_rate}
    if method == "mod_topk":
        told |= {"learning_rate": options.top_k_learning_rate, **TOP_K}
    return told


def _run(bench: quality.Bench, dense: Run, method: str, seed: int, bound: dict[str, Any]) -> Run:
    """Train and sweep one model."""
    config = _config(bench, method)
    model, trained = _train(bench, config, method, seed, bound)
    if method in ALL_WEIGHTS:
        model.set_attn_implementation("sdpa")
        measured = _measures(bench, dense, model.eval(), method)
    else:
        _move_routers(model, bench.measured, config)
        measured = _measures(bench, dense, bench.measured, method)
        detach(bench.measured)
    quality.say(f"{method} seed {seed}, {trained['seconds']} s", measured)
    return {**trained, "threads": torch.get_num_threads(), "layers": config.layers, **measured}


def _config(bench: quality.Bench, method: str) -> RoutingConfig:
    num_layers = len(decoder_layers(decoder_of(bench.measured)))
    return RoutingConfig(
        granularity=f"{bench.options.unit}_token",
        kv=bench.options.kv,
        layers=peers.official_layers(num_layers) if method in OFFICIAL else None,
    )


def _train(
    bench: quality.Bench, config: RoutingConfig, method: str, seed: int, bound: dict[str, Any]
) -> tuple[Any, Run]:
    """A model of its own, trained; and what that took, its weights included."""
    options, device = bench.options, next(bench.measured.parameters()).device
    held = held_bytes(device)
    torch.manual_seed(seed)
    model = _fresh(options, config, method)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(bench, model, method, seed, bound, folder)
        began, began_cpu = time.perf_counter(), time.process_time()
        if "seconds" in bound:
            trainer.add_callback(peers.Clock(bound["seconds"]))
        trainer.train()
        took, took_cpu = time.perf_counter() - began, time.process_time() - began_cpu
    peak = peak_bytes(device)
    state, args = trainer.state, trainer.args
    windows = state.global_step * args.per_device_train_batch_size
    logs = [entry for entry in state.log_history if "loss" in entry]
    return model, {
        "seconds": round(took, 1),
        "cpu_seconds": round(took_cpu, 1),
        "peak_bytes": None if held is None or peak is None else peak - held,
        "steps": state.global_step,
        "epochs": round(state.epoch, 2),
        "train_tokens": windows * args.gradient_accumulation_steps * bench.train.ids.shape[1],
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in bench.measured.parameters()),
        "log": {n: [quality.short(e[n]) for e in logs if n in e] for n in LOGGED},
    }


def _fresh(options: argparse.Namespace, config: RoutingConfig, method: str) -> Any:
    """A frozen model with routers as the method begins. Weights that train are in float32: steps as
    short as theirs vanish in bfloat16.
    """
    dtype = "float32" if method in ALL_WEIGHTS else options.dtype
    model = load_model(options.model, dtype=dtype).requires_grad_(False)
    model.set_attn_implementation(options.attention)
    attach(model, config)
    if method in OFFICIAL:
        peers.without_bias(model)
    if method == "mod_topk":
        peers.weigh_by_routers(model)
    return model


def _trainer(
    bench: quality.Bench, model: Any, method: str, seed: int, bound: dict[str, Any], folder: str
) -> Any:
    told = _arguments(bench.options, method)
    shared = {
        "output_dir": folder,
        "max_steps": bound.get("max_steps", UNBOUNDED),
        "seed": seed,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1 if method in OFFICIAL else 10,
        "use_cpu": not torch.cuda.is_available(),
    }
    rows = _rows(bench, method, seed, bound)
    if method in OFFICIAL:
        hinge = {name: told.pop(name) for name in ("hinge_weight", "capacity")}
        args = TrainingArguments(**shared, **told)
        return peers.OfficialTrainer(model, args, train_dataset=rows, **hinge)
    if method == "routers":
        return RouterTrainer(model, RouterTrainingArguments(**shared, **told), train_dataset=rows)
    args = peers.AllWeightsArguments(**shared, **told, bf16=bench.options.dtype == "bfloat16")
    trainer = peers.TopKTrainer if method == "mod_topk" else peers.ThresholdTrainer
    return trainer(model, args, train_dataset=rows)


def _rows(bench: quality.Bench, method: str, seed: int, bound: dict[str, Any]) -> WindowDataset:
    """The windows that a training reads: all that there are, where its time ends it."""
    number = len(bench.train)
    if method in OFFICIAL:
        number = min(bench.options.samples, number)
    elif "seconds" not in bound:
        number = min(bench.options.steps * bench.options.batch_size, number)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    # The official code has no loss on prompts.
    return WindowDataset(bench.train.take(order), answers_only=method in OFFICIAL)


def _move_routers(trained: Any, measured: Any, config: RoutingConfig) -> None:
    """Put the trained routers on the model that losses are measured with."""
    attach(measured, config)
    for name, router in routers_of(trained).items():
        routers_of(measured)[name].load_state_dict(router.state_dict())


# ---- measuring ----


def _measures(bench: quality.Bench, dense: Run, model: Any, method: str) -> Run:
    """What a model loses on each text: with everything kept, by the rule of its training, and over
    the sweep.
    """
    names = list(routers_of(model))
    rule: Any = peers.Thresholds(dict.fromkeys(names, 0.0))
    if method == "mod_topk":
        rule = peers.TopK(bench.options.budget)
    whole = peers.Thresholds(dict.fromkeys(names, -math.inf))
    swept = {budget: _at(bench, model, method, budget) for budget in bench.options.budgets}
    found: Run = {"everything_kept": {}, "as_trained": {}, "routed": {}}
    for name, windows in bench.report.items():
        found["everything_kept"][name] = _row(model, windows, whole, dense[name])
        found["as_trained"][name] = _row(model, windows, rule, dense[name])
        found["routed"][name] = [
            {"budget": budget, **_row(model, windows, at, dense[name])}
            for budget, at in swept.items()
            if at is not None
        ]
    return found


def _row(model: Any, windows: Windows, decider: Any, dense: Run) -> Run:
    with decided_by(model, decider), record(model) as trace:
        losses = quality.losses_of(model, windows, budget=1.0)  # no budget decides
    kept = {"kept_fraction": trace.kept_fraction(), "kept_of_routed": trace.kept_of_routed()}
    over = {
        f"{name}_over_dense": losses[name] - dense[name]
        for name in ("loss", "answer_loss")
        if dense[name] is not None
    }
    return {**kept, **losses, **over}


def _at(bench: quality.Bench, model: Any, method: str, budget: float) -> Any:
    """Thresholds that keep about the budget, from the logits of held-back text; None where the
    routed layers cannot skip so much. What is kept is measured on the report.

    One threshold serves all units, as in their training; with top-k each unit was to keep its share
    whatever the size of its logits, and has its own.
    """
    routing = routing_of(model)
    share = 1 - (1 - budget) * routing.num_units_of_kind / len(routing.units)
    if share <= 0:
        return None
    if method == "mod_topk":
        with decided_by(model, peers.TopK(share)):
            logits = _logits(model, bench.held_back)
        return peers.Thresholds({name: _quantile([x_N], 1 - share) for name, x_N in logits.items()})
    logits = _logits(model, bench.held_back)
    return peers.Thresholds(dict.fromkeys(logits, _quantile(list(logits.values()), 1 - share)))


@torch.no_grad()
def _logits(model: Any, windows: Windows) -> dict[str, Tensor]:
    """Of each unit's router, at the decisions that are in force: (N,)."""
    seen: dict[str, list[Tensor]] = {name: [] for name in routers_of(model)}

    def hook(name: str) -> Any:
        return lambda router, args, logits_BT: seen[name].append(logits_BT.flatten())

    handles = [r.register_forward_hook(hook(name)) for name, r in routers_of(model).items()]
    try:
        for ids_BT in windows.ids.split(8):
            decoder_of(model)(input_ids=ids_BT.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _quantile(parts: Sequence[Tensor], share: float) -> float:
    """The logit that so large a share of all is below."""
    logits_N = torch.cat(list(parts)).float().sort().values
    return float(logits_N[min(int(share * len(logits_N)), len(logits_N) - 1)])


if __name__ == "__main__":
    main()
