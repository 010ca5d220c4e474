"""The text of a tuning: what trains, and what is held back for calibration and the held-out loss.

What is held back depends on the source and the seed alone, so that `calibrate` and `eval` find it
again from the record that `tune` leaves beside an adapter. Imports torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from router_tuning.cli.console import bar
from router_tuning.cli.records import write_text
from router_tuning.data import (
    Example,
    Windows,
    default_prompts,
    interleaved,
    load_examples,
    make_windows,
)
from router_tuning.errors import DataError
from router_tuning.sampling import sample_answers, sample_texts

FEW_EXAMPLES = 10
"""With fewer, whole texts cannot be held back; then windows are."""
OWN_TEXT = "own_text.jsonl"
OWN_ROUNDS = 2
"""How often a text of the model's own is trained on: drawing it takes longer than training."""
OWN_PROMPTS = "prompts shipped with router-tuning, answered by the model"


@dataclass(frozen=True)
class Recipe:
    """Where the text comes from."""

    data: str | None
    """A file or a hub id; None: shipped prompts, answers sampled from the frozen model."""
    length: int
    """Tokens of a window."""
    windows: int
    """Training windows, at most; there may be fewer."""
    held_out: int
    """Windows held back, at most."""
    prompts: int
    """Without data: how many of the shipped prompts are used."""
    answer_tokens: int
    """Without data: length of an answer, at most."""
    seed: int
    held_out_share: float = 0.1
    """Examples (prompts) held back, of all; of the windows of a plain text, at most."""
    own_text: float = 0.0
    """Share of the training windows that are of texts which the model writes from nothing."""

    @property
    def name(self) -> str:
        """Of the data, for people and records."""
        return self.data or OWN_PROMPTS

    @property
    def own_windows(self) -> int:
        """How many training windows are of the model's own text."""
        return round(self.own_text * self.windows)


@dataclass(frozen=True)
class Material:
    """Windows that train, and windows that never do."""

    train: Windows
    held_out: Windows


def prepare(recipe: Recipe, model: Any, tokenizer: Any, *, answers: Path | None = None) -> Material:
    """Read or sample the text and cut it.

    Args:
        recipe: where it comes from.
        model: the frozen model, which answers prompts where there is no data.
        tokenizer: the model's own.
        answers: a file that keeps sampled answers, and gives them the next time.

    Raises:
        DataError: missing, malformed, or too short.
    """
    held, rest = _split(recipe, model, tokenizer, answers)
    if not held:
        material = _split_windows(recipe, tokenizer, rest)
    else:
        material = Material(
            _cut(recipe, tokenizer, rest, max(recipe.windows - recipe.own_windows, 1)),
            _cut(recipe, tokenizer, held, recipe.held_out),
        )
    if not recipe.own_windows:
        return material
    file = None if answers is None else answers.with_name(OWN_TEXT)
    own = _own(recipe, model, tokenizer, file, material.train.ids.shape[1])
    train = interleaved(material.train, own, recipe.windows, recipe.own_windows)
    return Material(train, material.held_out)


def held_back(recipe: Recipe, model: Any, tokenizer: Any, *, answers: Path) -> Windows:
    """Only what `prepare` held back; sampled answers are sampled again where their file is gone."""
    if recipe.data is None and not answers.is_file():
        held_prompts, _ = _split_prompts(recipe)
        held = _sampled(model, tokenizer, held_prompts, recipe)
    else:
        held, rest = _split(recipe, model, tokenizer, answers)
        if not held:
            return _split_windows(recipe, tokenizer, rest).held_out
    return _cut(recipe, tokenizer, held, recipe.held_out)


def _split_windows(recipe: Recipe, tokenizer: Any, examples: Sequence[Example]) -> Material:
    cut = _cut(recipe, tokenizer, examples, recipe.windows + recipe.held_out)
    return Material(*cut.split(min(recipe.held_out_share, recipe.held_out / len(cut)), recipe.seed))


def _own(recipe: Recipe, model: Any, tokenizer: Any, file: Path | None, length: int) -> Windows:
    """Windows of what the model writes from nothing, which is kept in the file. They are as long as
    those of the data, which has too little for a whole one sometimes.
    """
    if file is not None and file.is_file():
        texts = load_examples(file)
    else:
        with bar("Writing text of the model's own") as progress:
            texts = sample_texts(
                model,
                tokenizer,
                -(-recipe.own_windows // OWN_ROUNDS) * recipe.length,
                max_new_tokens=recipe.length,
                seed=recipe.seed,
                progress=progress,
            )
        if file is not None:
            _keep(texts, file)
    return make_windows(tokenizer, texts, length=length)


def _split(
    recipe: Recipe, model: Any, tokenizer: Any, answers: Path | None
) -> tuple[list[Example], list[Example]]:
    """Examples held back, and the others; nothing held back where there are few."""
    if recipe.data is None:
        held_prompts, _ = _split_prompts(recipe)
        examples = _answered(recipe, model, tokenizer, answers)
        held = [e for e in examples if _prompt(e) in held_prompts]
        return held, [e for e in examples if _prompt(e) not in held_prompts]
    examples = load_examples(recipe.data)
    if len(examples) < FEW_EXAMPLES:
        return [], examples
    random.Random(recipe.seed).shuffle(examples)
    number = max(round(recipe.held_out_share * len(examples)), 1)
    return examples[:number], examples[number:]


def _split_prompts(recipe: Recipe) -> tuple[list[str], list[str]]:
    prompts = default_prompts()
    random.Random(recipe.seed).shuffle(prompts)
    prompts = prompts[: recipe.prompts]
    number = max(round(recipe.held_out_share * len(prompts)), 1)
    return prompts[:number], prompts[number:]


def _answered(recipe: Recipe, model: Any, tokenizer: Any, answers: Path | None) -> list[Example]:
    if answers is not None and answers.is_file():
        return load_examples(answers)
    held, rest = _split_prompts(recipe)
    examples = _sampled(model, tokenizer, held + rest, recipe)
    if answers is not None:
        _keep(examples, answers)
    return examples


def _sampled(model: Any, tokenizer: Any, prompts: Sequence[str], recipe: Recipe) -> list[Example]:
    with bar(f"Sampling answers to {len(prompts)} prompts") as progress:
        examples = sample_answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=recipe.answer_tokens,
            seed=recipe.seed,
            progress=progress,
        )
    if not examples:
        raise DataError(
            "the model answered none of the shipped prompts (it may be no language model for "
            "chat); give text of your own with --data"
        )
    return examples


def _keep(examples: Sequence[Example], path: Path) -> None:
    rows = [{k: v for k, v in asdict(e).items() if v is not None} for e in examples]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _prompt(example: Example) -> str:
    return example.messages[0]["content"] if example.messages else ""


def _cut(recipe: Recipe, tokenizer: Any, examples: Sequence[Example], limit: int) -> Windows:
    try:
        return make_windows(tokenizer, examples, length=recipe.length, limit=limit)
    except DataError as error:
        raise DataError(f"{recipe.name}: {error}") from error
