"""Tasks from local JSONL files: their forms, their prompts, and the configs lm-eval builds them of.

Three forms of rows:
- `{"query", "choices", "gold"}`: the query is given, each choice scored behind it; MMLU's rows also
  have a `"subject"`.
- `{"context_options", "continuation", "gold"}`: one continuation is scored behind each context.
- `{"question", "answer"}`: the loss of the answer.

Prompts are those of the harness's own tasks. Few-shot examples are other rows of the same file;
MMLU's come from its dev file where that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_tuning.data import json_rows
from router_tuning.errors import DataError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz")
LETTERS = ("A", "B", "C", "D", "E", "F")
QUERY, CONTEXT, WORKED = (
    ("query", "choices", "gold"),
    ("context_options", "continuation", "gold"),
    ("question", "answer"),
)


@dataclass(frozen=True)
class Setting:
    """How the paper measures a task."""

    shots: int
    normalised: bool = False
    """Whether choices are compared by log-likelihood a character."""


PAPER = {
    "arc_challenge": Setting(25, normalised=True),
    "boolq": Setting(0),
    "hellaswag": Setting(10, normalised=True),
    "mmlu": Setting(5),
    "openbookqa": Setting(0, normalised=True),
    "piqa": Setting(0, normalised=True),
    "rte": Setting(0),
    "winogrande": Setting(5),
    "gsm8k": Setting(0),  # loss on the worked answers, which is ours, not the paper's
}


def _plain(row: Row) -> str:
    return str(row["query"])


def _asked(row: Row) -> str:
    query = str(row["query"]).rstrip()
    return query if query.endswith("Answer:") else f"{query}\nAnswer:"


def _lettered(row: Row) -> str:
    choices = zip(LETTERS, row["choices"], strict=False)
    lines = [f"{letter}. {choice}" for letter, choice in choices]
    return "\n".join([str(row["query"]).strip(), *lines, "Answer:"])


def _letters(row: Row) -> list[str]:
    return list(LETTERS[: len(row["choices"])])


def _worked_question(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _worked_answer(row: Row) -> str:
    return f" {row['answer']}"  # a loglikelihood task of lm-eval takes its target as it is


@dataclass(frozen=True)
class LocalTask:
    """Where a task's rows lie, their form, and how they are written."""

    files: tuple[str, ...]
    """Names without suffix; the first that is there is taken."""
    fields: tuple[str, ...]
    config: Mapping[str, Any]
    """Of lm-eval's ConfigurableTask: how a row is written."""


def _choice(files: tuple[str, ...], text: Callable[[Row], str], **config: Any) -> LocalTask:
    written = {"doc_to_text": text, "doc_to_choice": "choices", "doc_to_target": "gold", **config}
    return LocalTask(files, QUERY, {"output_type": "multiple_choice", **written})


WORKED_CONFIG: Mapping[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_text": _worked_question,
    "doc_to_target": _worked_answer,
    "fewshot_config": {"target_delimiter": ""},
}
LOCAL = {
    "arc_challenge": _choice(("arc_challenge",), _asked),
    "boolq": _choice(("boolq",), _asked),
    "hellaswag": _choice(("hellaswag", "hellaswag_first"), _plain),
    "mmlu": _choice(("mmlu", "mmlu_test", "mmlu_val"), _lettered, doc_to_choice=_letters),
    "openbookqa": _choice(("openbookqa",), _plain),
    "piqa": _choice(("piqa",), _asked),
    "rte": _choice(("rte",), _asked),
    "winogrande": LocalTask(
        ("winogrande",),
        CONTEXT,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",  # which context; lm-eval's way to say that contexts vary
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
        },
    ),
    "gsm8k": LocalTask(("gsm8k",), WORKED, WORKED_CONFIG),
}
MMLU_EXAMPLES = ("mmlu_dev",)


def local_configs(name: str, folder: Path, shots: int) -> list[dict[str, Any]]:
    """The configs of a task's parts: one, or of MMLU one for each subject.

    Raises:
        DataError: there is no such file, a row is malformed, or there are too few rows for the
            shots.
    """
    task = LOCAL[name]
    path = _found(folder, task.files)
    if path is None:
        wanted = " or ".join(f"{file}{SUFFIXES[0]}" for file in task.files)
        raise DataError(f"no file for the task {name} in {folder}; wanted {wanted} (or with .gz)")
    rows = read_rows(path, task.fields)
    if name != "mmlu":
        return [_config(name, task, rows, None, shots, path)]
    beside = _found(folder, MMLU_EXAMPLES)
    examples = None if beside is None else read_rows(beside, task.fields)
    configs = []
    for subject in sorted({_subject(row) for row in rows}):
        of_it = [row for row in rows if _subject(row) == subject]
        shown = None if examples is None else [r for r in examples if _subject(r) == subject]
        config = _config(f"{name}_{subject}", task, of_it, shown, shots, beside or path)
        topic = subject.replace("_", " ")
        about = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        configs.append({**config, "description": about})
    return configs


def _subject(row: Row) -> str:
    return str(row.get("subject", "everything"))


def _config(
    name: str, task: LocalTask, rows: list[Row], examples: list[Row] | None, shots: int, path: Path
) -> dict[str, Any]:
    """Rows are shown as examples of each other, or those given in their order."""
    enough = len(rows) - 1 if examples is None else len(examples)
    if shots > enough:
        raise DataError(
            f"{path}: {name} wants {shots} few-shot examples beside the row that is asked, and has "
            f"{enough}; ask for fewer with --shots, or give more rows"
        )
    from datasets import Dataset  # slow to import

    splits = {"test": rows} if examples is None else {"test": rows, "dev": examples}
    made = {
        split: Dataset.from_list([{key: row[key] for key in task.fields} for row in content])
        for split, content in splits.items()
    }
    fewshot = dict(task.config.get("fewshot_config", {}))
    if examples is not None:
        fewshot["sampler"] = "first_n"
    return {
        **task.config,
        "task": name,
        "custom_dataset": lambda **_: made,
        "test_split": "test",
        "fewshot_split": "test" if examples is None else "dev",
        "fewshot_config": fewshot,
        "num_fewshot": shots,
        "metric_list": metrics_of(task.config["output_type"]),
    }


def metrics_of(output_type: str) -> list[dict[str, Any]]:
    """lm-eval's metrics for a kind of task."""
    names = ["acc", "acc_norm"] if output_type == "multiple_choice" else ["acc"]
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]


def _found(folder: Path, names: Iterable[str]) -> Path | None:
    paths = (folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def read_rows(path: Path, fields: tuple[str, ...]) -> list[Row]:
    """The rows of a task's file.

    Raises:
        DataError: unreadable, empty, or a row that is not of the form; its line is named.
    """
    rows = [_checked(row, fields, where) for where, row in json_rows(path)]
    if not rows:
        raise DataError(f"{path} is empty: it holds no row; wanted {_form(fields)}")
    return rows


def _checked(row: object, fields: tuple[str, ...], where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: wanted {_form(fields)}, got a {type(row).__name__}")
    missing = [name for name in fields if row.get(name) is None]
    if missing:
        got = ", ".join(map(repr, row)) or "none"
        raise DataError(
            f"{where}: missing {', '.join(map(repr, missing))}; wanted {_form(fields)}, got the "
            f"fields {got}"
        )
    lists = [name for name in ("choices", "context_options") if name in fields]
    for name in fields:
        value = row[name]
        if name == "gold":
            _check_gold(value, len(row[lists[0]]), where)
        elif name in lists:
            _check_choices(value, name, where)
        elif not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {name} must be a text, got {value!r:.80}")
    return row


def _check_choices(value: object, name: str, where: str) -> None:
    texts = isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)
    if not texts or not 2 <= len(value) <= len(LETTERS):  # type: ignore[arg-type]
        raise DataError(
            f"{where}: {name} must be a list of 2 to {len(LETTERS)} texts, got {value!r:.80}"
        )


def _check_gold(value: object, choices: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < choices:
        raise DataError(
            f"{where}: gold must be the index of a choice, from 0 to {choices - 1}, got {value!r}"
        )


def _form(fields: tuple[str, ...]) -> str:
    return "{" + ", ".join(f'"{name}"' for name in fields) + "}"
