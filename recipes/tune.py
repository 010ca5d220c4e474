"""Train routers in several processes: `accelerate launch recipes/tune.py`, see README.md here.

All options of RouterTrainingArguments are options here, on the command line or, before it, in a
YAML file that is named first; the command line wins. What is saved under --output_dir is an
adapter without calibrated budgets; `router-tuning calibrate` adds them, in one process.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from peft import get_peft_model
from transformers import HfArgumentParser

from router_tuning import (
    RouterTrainer,
    RouterTrainingArguments,
    RouterTuningConfig,
    WindowDataset,
    load_examples,
    load_model,
    load_tokenizer,
    make_windows,
)


@dataclass
class Recipe:
    """What to tune, and on what."""

    model: str = field(metadata={"help": "An alias, a hub id or a folder."})
    data: str = field(metadata={"help": "A .jsonl or .txt file, or a hub id."})
    granularity: str = field(default="attn_token", metadata={"help": "Or several, with commas."})
    kv: str = field(default="kept", metadata={"help": "kept or all."})
    kv_sink: int = field(default=0, metadata={"help": "First tokens that stay visible."})
    kv_window: int = field(default=0, metadata={"help": "Latest tokens that stay visible."})
    length: int = field(default=256, metadata={"help": "Tokens of a window."})
    dtype: str = field(default="auto", metadata={"help": "Of the base model."})


def words(arguments: list[str]) -> list[str]:
    """The command line, with the options of a YAML file in front, where one is named first."""
    if not arguments or not arguments[0].endswith((".yaml", ".yml")):
        return arguments
    options = yaml.safe_load(Path(arguments[0]).read_text())
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return given + arguments[1:]


def main() -> None:
    """Read the options, train, and save once."""
    parser = HfArgumentParser((Recipe, RouterTrainingArguments))
    recipe, args = parser.parse_args_into_dataclasses(words(sys.argv[1:]))
    args.report_to = []
    base = load_model(recipe.model, dtype=recipe.dtype)
    config = RouterTuningConfig(
        granularity=recipe.granularity.split(","),
        kv=recipe.kv,
        kv_sink=recipe.kv_sink,
        kv_window=recipe.kv_window,
        budget=args.budget or 0.75,
    )
    windows = make_windows(
        load_tokenizer(recipe.model), load_examples(recipe.data), length=recipe.length
    )
    trainer = RouterTrainer(
        get_peft_model(base, config), args, train_dataset=WindowDataset(windows)
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # of all processes, the first writes


if __name__ == "__main__":
    main()
