"""What LoRA wins back: routers alone, LoRA alone, both in one adapter, and routers on the model
that LoRA was merged into, all tuned with TRL.

All learn the text of the same conversations. What is routed is calibrated on rows that
nothing was trained on, and measured on other text beside the untouched model, static drop and
random masks. Then both, resumed in the middle, is compared with the run that was not interrupted.
Every piece is written as soon as it is there, and `--continue` goes on where it stopped. Example:

    python benchmarks/recovery.py --train alpaca_train.jsonl --report alpaca_report.jsonl \\
        --json benchmarks/results/recovery-smollm2-135m.json
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import quality
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from places import shown
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from router_tuning import RouterTuningConfig, load_examples
from router_tuning.calibration import calibrate_windows
from router_tuning.cli.records import device_name, versions
from router_tuning.data import Windows, make_windows
from router_tuning.embedded import load_model, load_tokenizer
from router_tuning.evaluation.perplexity import evaluate, window_loss
from router_tuning.training.trl import RouterSFTConfig, RouterSFTTrainer

ROUTERS, LORA, BOTH = "routers", "LoRA", "routers and LoRA"
AFTER = "LoRA, then routers"
VARIANTS = (ROUTERS, LORA, BOTH, AFTER)


def main() -> None:
    options = _options()
    path = Path(options.json)
    if not options.resume:
        path.unlink(missing_ok=True)
    torch.set_num_threads(options.threads)
    work = Path(options.work or tempfile.mkdtemp())
    document = quality.update(path, lambda document: document.update(run=_run_record(options)))
    for seed in options.seeds:
        for variant in VARIANTS:
            if (variant, seed) not in {(run["variant"], run["seed"]) for run in document["runs"]}:
                run = _run(options, work, variant, seed)
                document = quality.add_runs(path, run)
    if "resumed" not in document:
        found = _resumed(options, work)
        document = quality.update(path, lambda document: document.update(resumed=found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True, help="a .jsonl file of conversations")
    parser.add_argument("--report", required=True, help="a .jsonl file of others")
    parser.add_argument("--kv", default="all", choices=["all", "kept"])
    parser.add_argument("--budget", type=float, default=0.75)
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--lora-targets", type=lambda s: s.split(","), default=["q_proj", "v_proj"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of a packed row")
    parser.add_argument("--seeds", type=lambda s: [int(n) for n in s.split(",")], default=[0])
    parser.add_argument("--held-out", type=int, default=600, help="first rows, for thresholds")
    parser.add_argument("--windows", type=int, default=32, help="to calibrate, and to report on")
    parser.add_argument("--dtype", default="bfloat16", help="of the training; losses are float32")
    parser.add_argument("--attention", default="eager", help="implementation, in training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", metavar="DIR", help="for checkpoints")
    parser.add_argument("--json", required=True)
    parser.add_argument("--continue", dest="resume", action="store_true")
    return parser.parse_args()


def _run_record(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *map(shown, sys.argv)]),
        "model": options.model,
        "budget": options.budget,
        "kv": options.kv,
        "lora_r": options.lora_r,
        "lora_targets": options.lora_targets,
        "steps": options.steps,
        "train_tokens": options.steps * options.batch_size * options.length,
        "seeds": options.seeds,
        "objective": "lm",
        "dtype": options.dtype,
        "device": device_name(torch.device("cpu")),
        "threads": options.threads,
        "versions": versions(),
    }


def _run(options: argparse.Namespace, work: Path, variant: str, seed: int) -> dict[str, Any]:
    """Train one variant and measure what it loses."""
    started = time.time()
    trainer = _trainer(options, work / f"{variant}-{seed}", variant, seed)
    trainer.train()
    trained = time.time()
    # Losses are of float32 weights: what bfloat16 rounds is as large as what is measured.
    model = trainer.model.float().eval()
    model.set_attn_implementation("sdpa")
    held_back, report = _windows(options)
    run = {"variant": variant, "seed": seed, "seconds": round(trained - started, 1)}
    if variant == LORA:
        with model.disable_adapter():
            untouched = _losses(model, report)
        return run | {"dense": untouched, "tuned": _losses(model, report)}
    calibrate_windows(model, held_back, [options.budget])
    measured = evaluate(
        model, report, [options.budget], compare=True, selection=held_back, greedy_windows=1
    )
    if variant == AFTER:  # evaluated beside what LoRA made of the untouched model
        untouched = _losses(_base(options).float(), report)
        return run | {**measured, "dense": untouched, "tuned": measured["dense"]}
    return run | measured


def _base(options: argparse.Namespace) -> Any:
    return load_model(options.model, dtype=getattr(torch, options.dtype))


def _losses(model: Any, windows: Windows) -> dict[str, float | None]:
    found = window_loss(model, windows)
    return {"loss": found.loss, "answer_loss": found.answer_loss}


def _trainer(options: argparse.Namespace, folder: Path, variant: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = _base(options)
    model.set_attn_implementation(options.attention)
    if variant == AFTER:
        tuned = folder.with_name(f"{LORA}-{seed}") / f"checkpoint-{options.steps}"
        if not tuned.is_dir():
            sys.exit(f"{tuned} is not there; give --continue the --work of the run it continues")
        model = PeftModel.from_pretrained(model, tuned).merge_and_unload()
    rows = load_dataset("json", data_files=options.train, split="train")
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": rows.select(range(options.held_out, len(rows))).shuffle(seed=0),
        "processing_class": load_tokenizer(options.model),
    }
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "max_length": options.length,
        "packing": True,
        "seed": seed,
        "save_steps": options.steps // 2,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
    }
    lora = {"r": options.lora_r, "target_modules": options.lora_targets}
    if variant == LORA:  # as the adapter's own LoRA is trained
        same = RouterSFTConfig(objective="lm", **fields)
        args = SFTConfig(
            learning_rate=same.lora_learning_rate,
            lr_scheduler_type=same.lr_scheduler_type,
            lr_scheduler_kwargs=same.scheduler_kwargs(options.steps),
            max_grad_norm=same.max_grad_norm,
            adam_beta2=same.adam_beta2,
            logging_steps=10,
            **fields,
        )
        config = LoraConfig(task_type="CAUSAL_LM", **lora)
        return SFTTrainer(args=args, peft_config=config, **common)
    routers = RouterTuningConfig(
        granularity="attn_token",
        kv=options.kv,
        budget=options.budget,
        lora=lora if variant == BOTH else None,
    )
    args = RouterSFTConfig(objective="lm", **fields)
    return RouterSFTTrainer(args=args, peft_config=routers, **common)


def _windows(options: argparse.Namespace) -> tuple[Windows, Windows]:
    """To calibrate and choose on, and to report on."""
    tokenizer = load_tokenizer(options.model)
    held_back = load_examples(options.train, limit=options.held_out)
    return (
        make_windows(tokenizer, held_back, limit=options.windows),
        make_windows(tokenizer, load_examples(options.report), limit=options.windows),
    )


def _resumed(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Whether the second half of the steps, from a checkpoint, gives the very same weights."""
    variant, seed = BOTH, options.seeds[0]
    middle, last = (f"checkpoint-{n}" for n in (options.steps // 2, options.steps))
    whole, part = work / f"{variant}-{seed}", work / "resumed"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(whole / middle, part / middle)
    _trainer(options, part, variant, seed).train(resume_from_checkpoint=str(part / middle))
    name = "adapter_model.safetensors"
    ours, theirs = load_file(part / last / name), load_file(whole / last / name)
    return {
        "from_step": options.steps // 2,
        "tensors": len(theirs),
        "equal_to_the_bit": sum(torch.equal(ours[key], theirs[key]) for key in theirs),
    }


if __name__ == "__main__":
    main()
