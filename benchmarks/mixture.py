"""A mixture of experts from scratch, routed: loss against kept fraction beside controls, and which
experts run.

Trains a small OLMoE-shaped model (64 experts, 8 of them a token) on local text, routes its MLPs
token by token with quality.py, and counts what experts are assigned and execute. Of each text the
last tenth is for reporting, the twentieth before it for stopping the pretraining, for thresholds
and for static orders. Everything but the JSON and the figures stays in the folder `--work`; the
JSON is rewritten after every piece, and `--continue` goes on where it stopped. Example:

    python benchmarks/mixture.py --text shakespeare=tinyshakespeare.txt \\
        --text alpaca=alpaca_train.jsonl --work runs/mixture --json benchmarks/results/mixture.json
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import quality
import quality_figure
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from router_tuning import load_adapter
from router_tuning.cli.console import bar
from router_tuning.cli.records import write_json, write_text
from router_tuning.data import Example, WindowDataset, Windows, load_examples, make_windows
from router_tuning.embedded import load_model, load_tokenizer
from router_tuning.evaluation.expert_analysis import count_experts, experts_entry
from router_tuning.evaluation.routing_analysis import decide, read_text
from router_tuning.report.expert_figures import expert_figure

SETTING = "mlp_token"
PIECE = 2000
"""Most characters of a piece of text; pieces are shuffled."""
REPORTED, HELD_BACK = 0.1, 0.05
"""Parts of each text."""
FOLDERS = ("checkpoints", "model.part", "model", "adapters")
"""What `--work` holds beside the text."""
MADE = "pretraining.json"
"""Beside the dense model's weights: what it was made from, and how that went."""
PRETRAINING = (
    *("layers", "hidden", "expert_width", "experts", "experts_per_token", "vocabulary"),
    *("pretrain_steps", "pretrain_batch_size", "pretrain_learning_rate", "pretrain_seed"),
    "most_characters",
)
"""Options that decide the dense model."""


def main() -> None:
    options = _options()
    work, path = Path(options.work), Path(options.json)
    if not options.resume:
        path.unlink(missing_ok=True)
        for folder in FOLDERS:
            shutil.rmtree(work / folder, ignore_errors=True)
    torch.set_num_threads(options.threads)
    parts = _write_text(options, work)
    _check_same(work / "model" / MADE, options)
    if not (work / "model").exists():
        _pretrain(options, work, parts)
    made = json.loads((work / "model" / MADE).read_text())
    quality.update(path, lambda document: document.update(pretraining=made))
    quality.main(_quality(options, work, parts))
    document = quality.update(path, lambda document: None)
    asked = {"budget": options.expert_budget, "seeds": options.seeds, "steps": options.steps}
    if {name: document.get("experts", {}).get(name) for name in asked} != asked:
        experts = {**asked, **_experts(options, work, parts["report"])}
        document = quality.update(path, lambda document: document.update(experts=experts))
    figures = Path(options.figures)
    figures.mkdir(parents=True, exist_ok=True)
    expert_figure(document["experts"], figures / f"experts-{path.stem}.png", _title(document))
    panels = [(name, "loss", name) for name in document["dense"]]
    quality_figure.draw(path, figures / f"quality-{path.stem}.png", panels, random=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="append", required=True, metavar="[NAME=]FILE")
    parser.add_argument("--work", required=True, metavar="DIR", help="model, adapters, checkpoints")
    parser.add_argument("--json", required=True)
    parser.add_argument("--figures", default="docs/figures", metavar="DIR")
    parser.add_argument("--continue", dest="resume", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most-characters", type=int, default=1_200_000, help="of each text")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--expert-width", type=int, default=32)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--experts-per-token", type=int, default=8)
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--pretrain-batch-size", type=int, default=16)
    parser.add_argument("--pretrain-learning-rate", type=float, default=3e-3)
    parser.add_argument("--pretrain-seed", type=int, default=0)
    parser.add_argument("--seeds", type=_numbers(int), default=[0, 1, 2], help="of the routers")
    parser.add_argument("--steps", type=int, default=960, help="of the routers' tuning")
    parser.add_argument("--budget", type=float, default=0.7, help="that the routers train for")
    sweep = [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6]
    parser.add_argument("--budgets", type=_numbers(float), default=sweep)
    parser.add_argument("--static", type=_numbers(int), default=[1, 2, 3], help="MLPs to drop")
    parser.add_argument("--windows", type=int, default=64, help="of each part but pretraining")
    parser.add_argument("--expert-budget", type=float, default=0.75, help="kept while counting")
    return parser.parse_args()


def _numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",") if part]


# ---- text ----


def _write_text(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Split the texts and write the parts: {"train", "held_back", "all", "report": {name: file}},
    where "all" is of the report.
    """
    train: list[Example] = []
    held: list[Example] = []
    reported: list[Example] = []
    report = {}
    for item in options.text:
        name, _, file = item.rpartition("=")
        name = name or Path(file).stem
        pieces = list(_pieces(load_examples(file), options.most_characters))
        kept = round((1 - REPORTED) * len(pieces))
        first = round((1 - REPORTED - HELD_BACK) * len(pieces))
        train, held = [*train, *pieces[:first]], [*held, *pieces[first:kept]]
        reported += pieces[kept:]
        report[name] = _write(work / f"report-{name}.jsonl", pieces[kept:])
    for part in (train, held, reported):
        random.Random(0).shuffle(part)
    return {
        "train": _write(work / "train.jsonl", train),
        "held_back": _write(work / "held-back.jsonl", held),
        "all": _write(work / "report.jsonl", reported),
        "report": report,
    }


def _pieces(examples: list[Example], most: int) -> Iterator[Example]:
    """Conversations as they are, texts cut at line ends; all together so many characters."""
    for example in examples:
        if example.text is None:
            pieces = [example]
        else:
            pieces = [Example(text=text) for text in _cut(example.text)]
        for piece in pieces:
            if most <= 0:
                return
            most -= len(_characters(piece))
            yield piece


def _cut(text: str) -> Iterator[str]:
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > PIECE:
            yield piece
            piece = ""
        piece += line
    if piece.strip():
        yield piece


def _characters(example: Example) -> str:
    return example.text or "\n".join(turn["content"] for turn in example.messages or ())


def _write(path: Path, examples: list[Example]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"text": e.text} if e.messages is None else {"messages": e.messages} for e in examples)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- the dense model ----


def _check_same(made: Path, options: argparse.Namespace) -> None:
    """Refuse to go on with a model that was made otherwise."""
    before = json.loads(made.read_text()) if made.exists() else {}
    changed = [n for n, value in _made_from(options).items() if before.get(n, value) != value]
    if changed:
        sys.exit(f"--continue: {', '.join(changed)} differ from what the dense model was made with")


def _made_from(options: argparse.Namespace) -> dict[str, Any]:
    texts = [Path(item.rpartition("=")[2]).name for item in options.text]
    return {"text": texts, **{name: getattr(options, name) for name in PRETRAINING}}


def _pretrain(options: argparse.Namespace, work: Path, parts: dict[str, Any]) -> None:
    """Train the mixture and leave it, whole or not at all, in the folder `model`."""
    examples = load_examples(parts["train"])
    tokenizer = _tokenizer(options, examples)
    train = make_windows(tokenizer, examples)
    held = make_windows(tokenizer, load_examples(parts["held_back"]), limit=options.windows)
    torch.manual_seed(options.pretrain_seed)
    model = OlmoeForCausalLM(_config(options, tokenizer))
    trainer = _Pretraining(
        model,
        _arguments(options, work / "checkpoints"),
        train_dataset=WindowDataset(train),
        eval_dataset=WindowDataset(held),
    )
    checkpoints = work / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None  # type: ignore[no-untyped-call]
    began, began_cpu = time.time(), time.process_time()
    trainer.train(resume_from_checkpoint=last)
    took, took_cpu = time.time() - began, time.process_time() - began_cpu
    model.config.output_router_logits = False  # it is frozen from here on
    entry = {
        **_made_from(options),
        **_sizes(model),
        "train_windows": len(train),
        "tokens": options.pretrain_steps * options.pretrain_batch_size * train.ids.shape[1],
        "seconds": round(took, 1),
        "cpu_seconds": round(took_cpu, 1),
        "resumed": last is not None,
        "best_step": trainer.state.best_global_step,
        "log": trainer.state.log_history,
    }
    made = work / "model.part"
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    write_json(made / MADE, entry)
    made.rename(work / "model")
    shutil.rmtree(checkpoints)


class _Pretraining(Trainer):
    """Trainer whose checkpoints it can load again: transformers writes each expert apart, as on the
    hub, and its Trainer then finds none of them.
    """

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        model: Any = self.model
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)


def _tokenizer(options: argparse.Namespace, examples: list[Example]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the text of the pretraining."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_characters, examples), trainer)
    fast: type[Any] = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _config(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.expert_width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        num_experts=options.experts,
        num_experts_per_tok=options.experts_per_token,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # With OLMoE's own choice of these, narrow MLPs hardly begin to learn in a short training.
        norm_topk_prob=True,
        initializer_range=0.05,
        output_router_logits=True,  # with the load-balancing loss
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )


def _arguments(options: argparse.Namespace, folder: Path) -> TrainingArguments:
    every = max(options.pretrain_steps // 10, 1)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.pretrain_steps,
        per_device_train_batch_size=options.pretrain_batch_size,
        learning_rate=options.pretrain_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(options.pretrain_steps // 20, 1),
        weight_decay=0.1,
        adam_beta2=0.95,
        seed=options.pretrain_seed,
        logging_steps=every,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        load_best_model_at_end=True,  # a small text is soon learned by heart
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )


def _sizes(model: OlmoeForCausalLM) -> dict[str, int]:
    """Numbers of parameters, and of those that a token meets."""
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    idle = 1 - model.config.num_experts_per_tok / model.config.num_experts
    return {"parameters": total, "active_parameters": total - round(idle * experts)}


# ---- routers, controls, experts ----


def _quality(options: argparse.Namespace, work: Path, parts: dict[str, Any]) -> list[str]:
    """The arguments of quality.py: tuning, sweep and controls."""
    report = (
        parts["report"] if len(parts["report"]) == 1 else {"all": parts["all"], **parts["report"]}
    )

    def listed(values: list[Any]) -> str:
        return ",".join(map(str, values))

    return [
        *("--model", str(work / "model"), "--train", str(parts["train"])),
        *("--held-back", str(parts["held_back"])),
        *(part for name, file in report.items() for part in ("--report", f"{name}={file}")),
        *("--settings", SETTING, "--seeds", listed(options.seeds)),
        *("--steps", str(options.steps), "--batch-size", "2", "--positions", "1"),
        *("--budget", str(options.budget), "--budgets", listed(options.budgets)),
        *("--static-of", SETTING, "--static", listed(options.static)),
        *("--random", listed(options.budgets)),
        *("--report-windows", str(options.windows), "--held-back-windows", str(options.windows)),
        *("--threads", str(options.threads), "--save", str(work / "adapters")),
        *("--json", options.json, "--continue"),
    ]


def _experts(options: argparse.Namespace, work: Path, report: dict[str, Path]) -> dict[str, Any]:
    """What the experts are assigned and execute on the text of the report, dense and by each
    adapter.
    """
    model, tokenizer = load_model(str(work / "model")), load_tokenizer(str(work / "model"))
    domains: dict[str, Windows] = {
        name: make_windows(tokenizer, load_examples(file), limit=options.windows)
        for name, file in report.items()
    }
    text = read_text(model, tokenizer, domains)
    with bar("Counting tokens of experts, dense") as progress:
        dense = count_experts(model, text, progress=progress)
    routed = {}
    for seed in options.seeds:
        adapter = load_adapter(work / "adapters" / f"{SETTING}-{seed}", model).eval()
        with bar(f"Counting tokens of experts, seed {seed}") as progress:
            decisions = decide(adapter, text, options.expert_budget)
            routed[f"seed {seed}"] = count_experts(adapter, text, decisions, progress=progress)
        adapter.unload()
    tokens = {name: windows.num_tokens for name, windows in domains.items()}
    return {"tokens": tokens, **experts_entry(dense, routed)}


def _title(document: dict[str, Any]) -> str:
    number, made = len(document["experts"]["seeds"]), document["pretraining"]
    return (
        f"{made['experts']} experts, {made['experts_per_token']} a token; MLPs kept "
        f"{document['experts']['budget']:g}" + (f", mean of {number} seeds" if number > 1 else "")
    )


if __name__ == "__main__":
    main()
