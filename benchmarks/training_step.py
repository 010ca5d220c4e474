"""What a training step costs: routers alone by either objective, LoRA, and full fine-tuning.

Every variant trains on the same batches of the same text in a process of its own, since a process
gives its peak memory back to nobody; processes take turns over rounds. Example:

    python benchmarks/training_step.py --train alpaca_train.jsonl \\
        --json benchmarks/results/training-step-smollm2-135m.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from places import shown
from transformers import Trainer, TrainerCallback, TrainingArguments

from router_tuning import RouterTuningConfig
from router_tuning.cli.records import device_name, versions, write_json
from router_tuning.data import WindowDataset, load_examples, make_windows
from router_tuning.embedded import load_model, load_tokenizer
from router_tuning.execution.context import record, routers_of
from router_tuning.memory import held_bytes, peak_bytes
from router_tuning.processor import cpu_instructions
from router_tuning.routers import input_weight, scalar_bias
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.units import decoder_of

KV = {"routers": "kept", "routers kv=all": "all"}
VARIANTS = (*(f"{name}, {of}" for name in KV for of in ("lm", "distill")), "LoRA r=8", "full")


def main() -> None:
    options = _options()
    if options.variant:
        print(json.dumps(_measure(options)))
        return
    took: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for number in range(options.rounds):
        turn = number % len(VARIANTS)
        for name in [*VARIANTS[turn:], *VARIANTS[:turn]]:
            command = [sys.executable, *sys.argv, "--variant", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            took[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, took[name][-1], flush=True)
    write_json(Path(options.json), _result(options, took))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--steps", type=int, default=4, help="of a process; the first does not count"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", required=True)
    return parser.parse_args()


def _result(options: argparse.Namespace, took: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    tokens = options.batch_size * options.length
    variants = {}
    for name, rounds in took.items():
        seconds = [s for one in rounds for s in one["seconds"]]
        peaks = [one["peak_bytes"] for one in rounds if one["peak_bytes"] is not None]
        variants[name] = {
            "step_seconds": statistics.median(seconds),
            "all_step_seconds": seconds,
            "tokens_per_second": tokens / statistics.median(seconds),
            "peak_bytes": statistics.median(peaks) if peaks else None,
            "trainable": rounds[0]["trainable"],
        }
    whole = variants["full"]
    over = {
        name: {
            "time": v["step_seconds"] / whole["step_seconds"],
            "memory": v["peak_bytes"] / whole["peak_bytes"] if whole["peak_bytes"] else None,
        }
        for name, v in variants.items()
    }
    command = shlex.join(["python", *map(shown, sys.argv)])
    return {
        "variants": variants,
        "over_full": over,
        "run": {
            "command": command,
            "seeds": [0],
            "model": options.model,
            "batch_size": options.batch_size,
            "length": options.length,
            "versions": versions(),
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "dtype": options.dtype,
            "threads": options.threads,
            "instructions": cpu_instructions(),
        },
    }


class _Clock(TrainerCallback):
    """When steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process: seconds of each step but the first, and peak memory with the
    weights.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = load_examples(options.train)[:4000]
    number = options.steps * options.batch_size
    windows = make_windows(
        load_tokenizer(options.model), examples, length=options.length, limit=number
    )
    before = held_bytes(device)
    model = load_model(options.model, dtype=getattr(torch, options.dtype), device=device)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, options, folder, WindowDataset(windows))
        trainer.add_callback(clock)
        trainer.train()
    after = peak_bytes(device)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
        "peak_bytes": None if before is None or after is None else after - before,
        "trainable": trained,
    }


def _trainer(model: Any, options: argparse.Namespace, folder: str, data: WindowDataset) -> Any:
    shared: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "save_strategy": "no",
        "report_to": [],
        "logging_strategy": "no",
        "seed": 0,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    name = options.variant
    if name.startswith("routers"):
        routers, objective = name.split(", ")
        routed = get_peft_model(model, RouterTuningConfig(kv=KV[routers], budget=0.75))
        _wake(routed, data)
        # What is done once before the first step is no part of a step.
        arguments = RouterTrainingArguments(**shared, objective=objective, warm_start=0)
        return RouterTrainer(routed, arguments, train_dataset=data)
    if name.startswith("LoRA"):
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    return Trainer(model, TrainingArguments(**shared), train_dataset=data)


@torch.no_grad()
def _wake(routed: Any, windows: WindowDataset) -> None:
    """Random routers that keep three quarters: fresh ones hide no key, and their steps cost less
    than those of a training under way.
    """
    torch.manual_seed(0)
    for router in routers_of(routed).values():
        drawn = input_weight(router)
        assert drawn is not None
        torch.nn.init.normal_(drawn)
    with record(routed) as trace:
        decoder_of(routed)(input_ids=windows[0]["input_ids"][None], use_cache=False)
    units = trace.forwards[-1].units
    for name, router in routers_of(routed).items():
        bias, logits_BT = scalar_bias(router), units[name].logits_BT
        assert bias is not None
        assert logits_BT is not None
        bias.sub_(logits_BT.float().quantile(0.25))


if __name__ == "__main__":
    main()
