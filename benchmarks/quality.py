"""Loss against kept fraction: tune, calibrate and sweep each setting over seeds, with controls in
the same run.

Writes one JSON, and rewrites it after every piece, so that an interrupted run keeps what it has and
`--continue` goes on where it stopped. Example:

    python benchmarks/quality.py --model smollm2-135m --train alpaca_train.jsonl \\
        --report alpaca=alpaca_report.jsonl --report wikitext=wikitext2_valid.txt \\
        --settings kept_window,all --seeds 0,1,2 --json benchmarks/results/quality-smollm2-135m.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel, get_peft_model
from places import shown
from safetensors import safe_open
from safetensors.torch import save_file

from router_tuning import RouterTuningConfig, average_adapters, save_adapter
from router_tuning.baselines import RandomMask, StaticDrop, cosine_order, greedy_order
from router_tuning.cli.records import device_name, peak_rss_mb, versions, write_json
from router_tuning.data import WindowDataset, Windows, interleaved, load_examples, make_windows
from router_tuning.embedded import load_model, load_tokenizer
from router_tuning.evaluation.perplexity import window_loss
from router_tuning.execution.context import decided_by, record, routers_of, routing_of
from router_tuning.training.optimizer import WHOLE_UNIT_STEP
from router_tuning.training.shared_prefix import Prefix
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.units import decoder_of

SETTINGS: dict[str, dict[str, Any]] = {
    "kept": {"granularity": "attn_token", "kv": "kept"},
    "kept_window": {"granularity": "attn_token", "kv": "kept", "kv_sink": 4, "kv_window": 16},
    "all": {"granularity": "attn_token", "kv": "all"},
    "sequence": {"granularity": "attn_sequence", "kv": "all"},
    "sequence_early": {"granularity": "attn_sequence", "kv": "all", "decide_after": 8},
    "learned_static": {"granularity": "attn_token", "kv": "all", "router": "bias"},
    "mlp_token": {"granularity": "mlp_token", "kv": "all"},
    "mlp_sequence": {"granularity": "mlp_sequence", "kv": "all"},
    "block_token": {"granularity": "block_token", "kv": "kept", "kv_sink": 4, "kv_window": 16},
    "both": {"granularity": ("attn_token", "mlp_token"), "kv": "all", "budget_in": "flops"},
    "block_sequence": {"granularity": "block_sequence", "kv": "all"},
}
SWEEP = [0.92, 0.87, 0.81, 0.76, 0.7]
TOLD = (
    "objective",
    "learning_rate",
    "bias_learning_rate",
    "lr_scheduler_type",
    "cooldown_fraction",
    "adam_beta2",
    "max_grad_norm",
    "budget_weight",
    "budget_momentum",
    "anneal_fraction",
    "threshold_range",
    "warm_start",
    "lm_weight",
)
"""Arguments of a training whose defaults a result names."""
LOGGED = ("step", "task_loss", "kept", "grad_norm")
"""What a result keeps of a training's log, a list each."""
LATER = {"lm_weight": 0.0, "own_text": 0.0, "adam_beta2": 0.999, "whole_unit_step": 1.0}
"""What older results do not name, since it was not there."""


@dataclass(frozen=True)
class Bench:
    """What all runs share: one frozen model to train on and one to measure with, and the text."""

    options: argparse.Namespace
    trained: Any
    """In the training dtype."""
    measured: Any
    """In float32; the same object where training is in float32 too."""
    train: Windows
    held_back: Windows
    report: dict[str, Windows]
    teacher: dict[bytes, torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments ask for; None takes those of the command line."""
    options = _options(arguments)
    path = opened(options)
    bench = prepare(options)
    document = begin(path, bench)
    done = [_identity(run) for run in document["runs"]]
    for seed in options.seeds:
        for setting in options.settings:
            wanted = {"setting": setting, "seed": seed, "tuning": tuning_of(options, setting)}
            if _identity(wanted) not in done:
                run = _run(bench, setting, seed)
                add_runs(path, run)
            elif options.widen:
                at = done.index(_identity(wanted))
                _add_rows(path, at, _widened(bench, setting, seed))
    for setting in options.settings if options.average else []:
        run = _mean_run(bench, setting)
        if _identity(run) not in done:
            run["routed"] = _mean_swept(bench, setting)
            add_runs(path, run)
        elif options.widen:
            _add_rows(path, done.index(_identity(run)), _mean_swept(bench, setting))


def _identity(run: dict[str, Any]) -> tuple[Any, ...]:
    """What no two runs of a file share."""
    return run["setting"], run["seed"], {**LATER, **run["tuning"]}


def begin(path: Path, bench: Bench) -> dict[str, Any]:
    """The result file with what runs are compared with: measured now, unless it is there."""
    options = bench.options
    document = update(path, lambda document: _describe(document, bench))
    if "dense" not in document:
        dense = {name: losses_of(bench.measured, windows) for name, windows in bench.report.items()}
        say("dense", dense)
        document = update(path, lambda document: document.update(dense=dense))
    static = _static(bench, document.get("static", {}))
    if static != document.get("static", {}):
        document = update(path, lambda document: document.update(static=static))
    if options.random and "random" not in document:
        found = _random(bench)
        document = update(path, lambda document: document.update(random=found))
    return document


def opened(options: argparse.Namespace) -> Path:
    """The result file, empty unless it is continued; sets as many threads as were asked for."""
    path = Path(options.json)
    if not options.resume:
        path.unlink(missing_ok=True)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    return path


def update(path: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Change the result file; other processes may be adding to it too."""
    with FileLock(f"{path}.lock"):
        document = json.loads(path.read_text()) if path.exists() else {"runs": []}
        change(document)
        write_json(path, document)
    return dict(document)


def add_runs(path: Path, *runs: dict[str, Any]) -> dict[str, Any]:
    """Put runs at the end of the result file."""
    return update(path, lambda document: document["runs"].extend(runs))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--settings", type=lambda s: [n for n in s.split(",") if n], default=[])
    parser.add_argument(
        "--own-text",
        metavar="FILE",
        help="some of the training windows are of this text, which sample_texts made",
    )
    parser.add_argument("--own-share", type=float, default=0.5, help="how many of them, of 1")
    parser.add_argument(
        "--static-of", default="attn_token", help="what controls drop: a granularity, or a setting"
    )
    parser.add_argument("--random", type=numbers(float), default=[], help="rates of random masks")
    parser.add_argument("--teacher", metavar="FILE", help="keep the dense model's hidden states")
    parser.add_argument("--save", metavar="DIR", help="keep the adapters there")
    parser.add_argument(
        "--widen",
        action="store_true",
        help="sweep the adapters of --save, tuned before, over these budgets too",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="sweep the mean of the adapters of --save too, over the seeds of each setting",
    )
    return parsed(parser, arguments)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark that tunes on some text and reports on other is told."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True)
    parser.add_argument("--report", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--seeds", type=numbers(int), default=[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--budget", type=float, default=0.75)
    parser.add_argument("--budgets", type=numbers(float), default=SWEEP)
    parser.add_argument("--positions", type=float, default=0.25)
    parser.add_argument("--dtype", default="float32", help="of the training; losses are float32")
    parser.add_argument("--attention", default="sdpa", help="implementation, in training")
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="an argument of RouterTrainingArguments that is not the default's",
    )
    parser.add_argument(
        "--held-back", metavar="FILE", help="text for thresholds and orders: else some of --train"
    )
    parser.add_argument("--held-back-windows", type=int, default=16, help="for thresholds, orders")
    parser.add_argument("--report-windows", type=int, default=32)
    parser.add_argument("--static", type=numbers(int), default=[], help="numbers of units to drop")
    parser.add_argument("--greedy-windows", type=int, default=4, help="0 leaves it out: slow")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", required=True)
    parser.add_argument("--continue", dest="resume", action="store_true")


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options, with --argument as a dict; None takes those of the command line."""
    options = parser.parse_args(arguments)
    given = (item.partition("=") for item in options.argument)
    options.argument = {name: json.loads(value) for name, _, value in given}
    return options


def numbers(kind: type) -> Any:
    """Reads a list of numbers with commas between."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def prepare(options: argparse.Namespace) -> Bench:
    """Windows to train on, to calibrate and choose on, and to report on: never the same text."""
    measured = load_model(options.model, dtype=torch.float32).requires_grad_(False)
    trained = measured
    if options.dtype != "float32" or options.attention != "sdpa":
        dtype = getattr(torch, options.dtype)
        trained = load_model(options.model, dtype=dtype).requires_grad_(False)
        trained.set_attn_implementation(options.attention)
    tokenizer = load_tokenizer(options.model)
    needed = options.steps * options.batch_size if options.settings else 1
    train, held_back, report = read_windows(options, tokenizer, needed)
    train = _mixed(train, tokenizer, options)
    return Bench(
        options,
        trained,
        measured,
        train,
        held_back,
        report,
        _teach(trained, options.model, train, options.teacher) if options.settings else {},
    )


def read_windows(
    options: argparse.Namespace, tokenizer: Any, needed: int
) -> tuple[Windows, Windows, dict[str, Windows]]:
    """Windows to train on (`needed`, if there are so many), to calibrate and choose on, and of each
    text to report on.
    """
    rest = load_examples(options.train)
    if options.held_back is None:
        last = max(len(rest) // 20, 1)  # as training grows, they stay
        rest, held = rest[:-last], rest[-last:]
    else:
        held = load_examples(options.held_back)
    random.Random(0).shuffle(rest)  # files are sorted by subject, more or less
    report = {}
    for item in options.report:
        name, _, file = item.partition("=")
        report[name] = make_windows(tokenizer, load_examples(file), limit=options.report_windows)
    train = make_windows(tokenizer, rest, limit=needed)
    return train, make_windows(tokenizer, held, limit=options.held_back_windows), report


def _mixed(train: Windows, tokenizer: Any, options: argparse.Namespace) -> Windows:
    """As many windows, a share of them of the model's own text, over and over if it is short."""
    if options.own_text is None:
        return train
    own = make_windows(tokenizer, load_examples(options.own_text))
    return interleaved(train, own, len(train), round(options.own_share * len(train)))


def _describe(document: dict[str, Any], bench: Bench) -> None:
    """Who runs what on what; refuses to mix runs that were measured differently."""
    options, before = bench.options, document.get("run", {})
    measured = {
        "model": shown(options.model),
        "report_windows": options.report_windows,
        "held_back_windows": options.held_back_windows,
        "dtype": "float32",
        "device": device_name(next(bench.measured.parameters()).device),
        "versions": versions(),
    }
    changed = [name for name in measured if name in before and before[name] != measured[name]]
    if changed:
        sys.exit(f"--continue: {', '.join(changed)} differ from the runs that are in the file")
    command = shlex.join(["python", *map(shown, sys.argv)])
    document["run"] = {"commands": [*before.get("commands", []), command], **measured}


def _run(bench: Bench, setting: str, seed: int) -> dict[str, Any]:
    """Tune one adapter and sweep it over thresholds."""
    torch.manual_seed(seed)
    started = time.time()
    options, config = bench.options, SETTINGS[setting]
    tuned = get_peft_model(bench.trained, RouterTuningConfig(budget=options.budget, **config))
    log = train(bench, tuned, seed)
    trained = time.time()
    routed = _in_float32(bench, tuned, config)
    run = {
        "setting": setting,
        "config": config,
        "seed": seed,
        "tuning": tuning_of(options, setting),
        "tuning_seconds": round(trained - started, 1),
        "threads": torch.get_num_threads(),
        "trainable": sum(p.numel() for p in routed.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in bench.measured.parameters()),
        "log": log,
        "routed": swept(bench, routed),
        "peak_rss_mb": peak_rss_mb(),
    }
    if options.save:
        routing_of(routed).config.calibration = []
        save_adapter(routed, Path(options.save) / f"{setting}-{seed}")
    routed.unload()
    say(f"{setting} seed {seed}", run["routed"])
    return run


def swept(bench: Bench, routed: Any) -> dict[str, list[dict[str, Any]]]:
    """What an adapter loses on each text, at each budget."""
    set_thresholds(routed, bench.held_back, bench.options.budgets)
    return {
        name: [_row(routed, windows, budget) for budget in bench.options.budgets]
        for name, windows in bench.report.items()
    }


def _widened(bench: Bench, setting: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The same of an adapter that was tuned and saved before."""
    folder = Path(bench.options.save) / f"{setting}-{seed}"
    routed = PeftModel.from_pretrained(bench.measured, folder)
    rows = swept(bench, routed)
    routed.unload()
    say(f"{setting} seed {seed}", rows)
    return rows


def _mean_run(bench: Bench, setting: str) -> dict[str, Any]:
    """Who the mean of a setting's adapters is: its seed are theirs."""
    seeds = bench.options.seeds
    tuning = {**tuning_of(bench.options, setting), "averaged": len(seeds)}
    return {"setting": setting, "config": SETTINGS[setting], "seed": seeds, "tuning": tuning}


def _mean_swept(bench: Bench, setting: str) -> dict[str, list[dict[str, Any]]]:
    folders = [Path(bench.options.save) / f"{setting}-{seed}" for seed in bench.options.seeds]
    routed = average_adapters(folders, bench.measured).eval()
    rows = swept(bench, routed)
    routed.unload()
    say(f"{setting} mean", rows)
    return rows


def _add_rows(path: Path, at: int, rows: dict[str, list[dict[str, Any]]]) -> None:
    def add(document: dict[str, Any]) -> None:
        for name, swept in document["runs"][at]["routed"].items():
            known = {row["kept_fraction"] for row in swept}
            swept.extend(row for row in rows[name] if row["kept_fraction"] not in known)

    update(path, add)


def tuning_of(options: argparse.Namespace, setting: str) -> dict[str, Any]:
    """What decides a tuning, beside its setting and its seed."""
    whole = "sequence" in setting or setting == "learned_static"
    return {
        "steps": options.steps,
        "train_tokens": options.steps * options.batch_size * 256,
        "batch_size": options.batch_size,
        "budget": options.budget,
        "distill_positions": options.positions,
        "dtype": options.dtype,
        "attention": options.attention,
        **{
            field.name: field.default
            for field in fields(RouterTrainingArguments)
            if field.name in TOLD
        },
        **({"whole_unit_step": WHOLE_UNIT_STEP} if whole else {}),
        **options.argument,
        "own_text": 0.0 if options.own_text is None else options.own_share,
    }


def train(
    bench: Bench, routed: Any, seed: int, trainer_class: type[TaughtFromMemory] | None = None
) -> dict[str, list[float]]:
    """Tune the routers; what was logged."""
    options = bench.options
    with tempfile.TemporaryDirectory() as folder:
        arguments = RouterTrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            distill_positions=options.positions,
            seed=seed,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            **options.argument,
        )
        # A seed sets which rows the warm start looks at, too: the first.
        order = torch.randperm(len(bench.train), generator=torch.Generator().manual_seed(seed))
        rows = WindowDataset(bench.train.take(order))
        trainer = (trainer_class or TaughtFromMemory)(routed, arguments, train_dataset=rows)
        trainer.known = bench.teacher
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "kept" in entry]
    return {name: [short(entry[name]) for entry in entries] for name in LOGGED}


def short(value: float) -> float:
    """Five digits of it."""
    return float(f"{value:.5g}")


def _in_float32(bench: Bench, tuned: Any, config: dict[str, Any]) -> Any:
    """The tuned routers on the model that losses are measured with."""
    if bench.trained is bench.measured:
        return tuned
    routed = get_peft_model(bench.measured, RouterTuningConfig(**config))
    for name, router in routers_of(tuned).items():
        routers_of(routed)[name].load_state_dict(router.state_dict())
    tuned.unload()
    return routed


def set_thresholds(routed: Any, windows: Windows, budgets: list[float]) -> None:
    """Spread thresholds over the logits of held-back text. What is kept is measured on the report,
    where losses are interpolated, so budgets need not be met as after a calibration.
    """
    routed.eval()
    device = next(routed.parameters()).device
    with torch.no_grad(), record(routed) as trace:
        for ids in windows.ids.split(8):
            decoder_of(routed)(input_ids=ids.to(device), use_cache=False)
    units = [unit for forward in trace.forwards for unit in forward.units.values()]
    free = [
        unit.logits_BT.flatten() if unit.always_BT is None else unit.logits_BT[~unit.always_BT]
        for unit in units
        if unit.logits_BT is not None
    ]
    logits = torch.cat(free).float().sort().values
    routing_of(routed).config.calibration = [
        {"budget": b, "threshold": float(logits[int((1 - b) * len(logits))])}
        for b in sorted(budgets)
    ]


class TaughtFromMemory(RouterTrainer):
    """Every run distils the same frozen model on the same windows: it has passed over them once."""

    known: dict[bytes, torch.Tensor]

    def teacher(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Prefix]:
        """Last hidden states of these windows."""
        rows = [self.known[_key(ids_L)] for ids_L in inputs["input_ids"]]
        return torch.stack(rows).to(inputs["input_ids"].device), Prefix([])


def _teach(model: Any, name: str, windows: Windows, file: str | None) -> dict[bytes, torch.Tensor]:
    """Last hidden states of the untouched model: window -> (L, D).

    They are kept in the file, if one is given, for the next run on the same text.
    """
    path, known = Path(file) if file else None, {}
    if path is not None and path.exists():
        with safe_open(path, "pt") as stored:
            if (stored.metadata() or {}).get("model") != name:
                sys.exit(f"--teacher {path} is of another model than {name}; give another file")
            known = _by_window(stored.get_tensor("ids"), stored.get_tensor("hidden"))
    new = [index for index, ids_L in enumerate(windows.ids) if _key(ids_L) not in known]
    if new:
        unknown = windows.take(new)
        known |= _by_window(unknown.ids, _last_hidden(model, unknown))
        if path is not None:
            _keep(known, path, name)
    return known


def _keep(known: dict[bytes, torch.Tensor], path: Path, model: str) -> None:
    ids = torch.stack([torch.frombuffer(bytearray(key), dtype=torch.int64) for key in known])
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    stored = {"hidden": torch.stack(list(known.values())), "ids": ids}
    save_file(stored, temporary, metadata={"model": model})
    temporary.replace(path)


@torch.no_grad()
def _last_hidden(model: Any, windows: Windows) -> torch.Tensor:
    decoder = decoder_of(model).eval()
    device = next(decoder.parameters()).device
    parts = windows.ids.split(8)
    return torch.cat([decoder(input_ids=ids.to(device), use_cache=False)[0].cpu() for ids in parts])


def _by_window(ids_NL: torch.Tensor, hidden_NLD: torch.Tensor) -> dict[bytes, torch.Tensor]:
    return {_key(ids_L): x_LD for ids_L, x_LD in zip(ids_NL, hidden_NLD, strict=True)}


def _key(ids_L: torch.Tensor) -> bytes:
    return bytes(ids_L.cpu().numpy().tobytes())


def losses_of(model: Any, windows: Windows, budget: float | None = None) -> dict[str, Any]:
    """What a result says of the loss of some windows."""
    result = window_loss(model, windows, budget=budget)
    return {"loss": result.loss, "answer_loss": result.answer_loss, "tokens": result.tokens}


def _row(model: Any, windows: Windows, budget: float) -> dict[str, Any]:
    with record(model) as trace:
        losses = losses_of(model, windows, budget)
    return {"budget": budget, "kept_fraction": trace.kept_fraction(), **losses}


def _static(bench: Bench, before: dict[str, Any]) -> dict[str, Any]:
    """Both static controls, at whole numbers of dropped units; what is there already stays."""
    options = bench.options
    wanted = set(options.static)
    if not wanted - {
        row["units"] for row in before.get(next(iter(bench.report)), {}).get("cosine", [])
    }:
        return before
    routed = _controlled(bench)
    orders = before.get("orders") or _orders(bench, routed)
    found: dict[str, Any] = {"orders": orders, "greedy_windows": options.greedy_windows, **before}
    for name, windows in bench.report.items():
        found[name] = {
            kind: _dropped(routed, windows, order, wanted, before.get(name, {}).get(kind, []))
            for kind, order in orders.items()
        }
        say(f"static, {name}", found[name])
    routed.unload()
    return found


def _orders(bench: Bench, routed: Any) -> dict[str, list[str]]:
    """Which units either control drops first."""
    options, held = bench.options, bench.held_back
    orders = {"cosine": cosine_order(routed, held)}
    if options.greedy_windows:
        few = held.take(range(min(options.greedy_windows, len(held))))
        orders["greedy"] = greedy_order(routed, few, max(options.static))
    return orders


def _dropped(
    routed: Any,
    windows: Windows,
    order: list[str],
    numbers: set[int],
    before: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """A row for each number of dropped units, beside those that are there, in order. Of an order
    that ends before, one for all of it: greedy dropping has chosen no more units, and where these
    have prices, as much may be fewer of them.
    """
    rows = {row["units"]: row for row in before}
    for number in sorted({min(n, len(order)) for n in numbers} - set(rows)):
        with decided_by(routed, StaticDrop(order[:number])), record(routed) as trace:
            losses = losses_of(routed, windows, budget=1.0)
        rows[number] = {"units": number, "kept_fraction": trace.kept_fraction(), **losses}
    return [rows[number] for number in sorted(rows)]


def _random(bench: Bench) -> dict[str, Any]:
    """Random masks of one seed, at the rates asked for, with the same rate in every unit."""
    routed = _controlled(bench)
    found: dict[str, Any] = {}
    for name, windows in bench.report.items():
        found[name] = []
        for rate in bench.options.random:
            with decided_by(routed, RandomMask(rate, seed=0)), record(routed) as trace:
                losses = losses_of(routed, windows, budget=1.0)
            found[name].append({"rate": rate, "kept_fraction": trace.kept_fraction(), **losses})
    say("random", found)
    routed.unload()
    return found


def _controlled(bench: Bench) -> Any:
    """The model with the controls' units, for which something else decides."""
    of = bench.options.static_of
    config = SETTINGS.get(of, {"granularity": of, "kv": "all"})
    return get_peft_model(bench.measured, RouterTuningConfig(**config))


def say(what: str, rows: Any) -> None:
    """Tell who watches what was measured."""
    print(what, json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
