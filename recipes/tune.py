"""Train routers in several processes: `accelerate launch recipes/tune.py`, see README.md here.

All options of RouterTrainingArguments are options here. What is saved under --output_dir is an
adapter without calibrated budgets; `router-tuning calibrate` adds them, in one process.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    length: int = field(default=256, metadata={"help": "Tokens of a window."})
    dtype: str = field(default="auto", metadata={"help": "Of the base model."})


def main() -> None:
    """Read the options, train, and save once."""
    recipe, args = HfArgumentParser((Recipe, RouterTrainingArguments)).parse_args_into_dataclasses()
    args.report_to = []
    base = load_model(recipe.model, dtype=recipe.dtype)
    config = RouterTuningConfig(
        granularity=recipe.granularity.split(","), kv=recipe.kv, budget=args.budget or 0.75
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
