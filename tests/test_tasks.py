"""Tasks of lm-evaluation-harness on tiny models, from local files; no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from laws import calibrate_by_hand, randomize
from router_tuning import RoutingConfig, attach
from router_tuning.baselines import RandomMask, StaticDrop
from router_tuning.errors import BudgetError, ConfigError, DataError, UnsupportedCallError
from router_tuning.evaluation.harness_tasks import _among
from router_tuning.evaluation.tasks import Task, evaluate_tasks, load_tasks, static_orders
from router_tuning.evaluation.variants import DENSE, SHARES, Items, Ran, Variant
from router_tuning.execution.context import dense, record
from tiny import tiny_model, token_ids

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")

WORDS = ("sea", "a long river in the north", "two", "stone and sand", "it", "a red fox", "me")
CHOICES = ("choices", "context_options")
TOLERANCE = 2e-4
"""Nats, of float32 logits by another order of sums."""


def text(i: int, words: int) -> str:
    return " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(words))


def query(i: int, choices: int = 4) -> dict[str, Any]:
    """A row of a length of its own."""
    options = [text(i + 3 * k, 1 + (i + k) % 3) + f" {k}" for k in range(choices)]
    asked = f"Question: {text(i, 1 + i % 6)} {i}?"
    return {"query": asked, "choices": options, "gold": i % choices}


def winogrande(i: int) -> dict[str, Any]:
    contexts = [f"{text(i, 2 + i % 4)} {i} so {name}" for name in ("Ann", "Bob")]
    return {"context_options": contexts, "continuation": text(i + 1, 3), "gold": i % 2}


def worked(i: int) -> dict[str, Any]:
    return {"question": f"{text(i, 3)} {i}?", "answer": f"{text(i, 1 + i % 5)}\n#### {i}"}


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("arc_challenge", "hellaswag_first", "openbookqa"):
        write(folder / f"{name}.jsonl", [query(i) for i in range(30)])
    for name in ("boolq", "piqa", "rte"):
        write(folder / f"{name}.jsonl", [query(i, 2) for i in range(8)])
    write(folder / "winogrande.jsonl", [winogrande(i) for i in range(9)])
    write(folder / "gsm8k.jsonl", [worked(i) for i in range(7)])
    subjects = ("high_school_art", "law")
    write(folder / "mmlu_test.jsonl", [{**query(i), "subject": subjects[i // 4]} for i in range(8)])
    shown = [{**query(100 + i), "subject": subjects[i % 2]} for i in range(12)]
    write(folder / "mmlu_dev.jsonl", shown)
    return folder


def routed_model(granularity: str = "attn_token", kv: str = "kept") -> PreTrainedModel:
    model = tiny_model("llama", max_position_embeddings=4096)
    attach(model, RoutingConfig(granularity=granularity, kv=kv, decide_after=4))
    randomize(model)
    calibrate_by_hand(model)
    return model


@pytest.fixture
def routed() -> PreTrainedModel:
    return routed_model()


def ask(task: Task, variant: Variant = DENSE) -> tuple[Items, Ran]:
    return task.measure(variant, lambda done: None)


def prompts(task: Any) -> list[list[tuple[str, str]]]:
    """Of each row, context and continuation of its requests."""
    return [[request.args for request in requests] for _, requests in task.rows]


# --- What is asked ---


@pytest.mark.parametrize(
    ("name", "context", "continuation"),
    [
        ("arc_challenge", "Question: sea 0?\nAnswer:", " sea 0"),
        ("boolq", "Question: sea 0?\nAnswer:", " sea 0"),
        ("hellaswag", "Question: sea 0?", " sea 0"),
        ("openbookqa", "Question: sea 0?", " sea 0"),
        ("piqa", "Question: sea 0?\nAnswer:", " sea 0"),
        ("rte", "Question: sea 0?\nAnswer:", " sea 0"),
        ("winogrande", "sea a long river in the north 0 so Ann", " a red fox me sea"),
        ("gsm8k", "Question: sea a long river in the north two 0?\nAnswer:", " sea\n#### 0"),
    ],
)
def test_rows_are_written_as_the_harness_writes_them(
    folder: Path,
    routed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    context: str,
    continuation: str,
) -> None:
    (task,) = load_tasks([name], routed, tokenizer, folder=folder, shots=0, limit=2)
    first = prompts(task)[0][0]
    assert first[0] == context
    assert first[1].startswith(continuation)


def test_mmlu_asks_for_letters_and_shows_examples_of_the_subject(
    folder: Path, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (task,) = load_tasks(["mmlu"], routed, tokenizer, folder=folder)
    rows = prompts(task)
    assert len(rows) == 8
    context, letter = rows[0][1]
    assert letter == " B"
    about = "The following are multiple choice questions (with answers) about high school art.\n\n"
    assert context.startswith(f"{about}Question: {text(100, 5)} 100?\nA. ")
    assert [i for i in range(100, 112) if f" {i}?" in context] == [100, 102, 104, 106, 108]
    assert context.endswith("\nAnswer:")
    assert task.about() == {"kind": "choice", "metric": "acc", "shots": 5}


@pytest.mark.parametrize(("name", "shots"), [("arc_challenge", 25), ("winogrande", 5)])
def test_examples_are_other_rows_and_do_not_depend_on_the_limit(
    folder: Path, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, shots: int
) -> None:
    load = {"folder": folder}
    (some,) = load_tasks([name], routed, tokenizer, limit=3, **load)  # type: ignore[arg-type]
    (every,) = load_tasks([name], routed, tokenizer, **load)  # type: ignore[arg-type]
    assert all(row in prompts(every) for row in prompts(some))
    for number, row in enumerate(prompts(every)):
        *shown, asked = row[0][0].split("\n\n")
        assert len(shown) == shots
        assert len(set(shown)) == shots
        assert f" {number} " in f"{asked} ".replace("?", " ?").replace("?", " ")
        assert not any(one.startswith(asked) for one in shown)
    by_number = prompts(every)
    assert by_number[0][0][0].split("\n\n")[:-1] != by_number[1][0][0].split("\n\n")[:-1]


def test_a_limit_takes_rows_at_equal_distances(
    folder: Path, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (task,) = load_tasks(["openbookqa"], routed, tokenizer, folder=folder, limit=3)
    rows = [row[0][0].split("?")[0].split()[-1] for row in prompts(task)]
    assert rows == ["0", "10", "20"]


# --- The harness's own tasks ---

HUB = {
    "baber/piqa": [
        {"goal": f"{text(i, 2)} {i}?", "sol1": f"it {i}", "sol2": "me", "label": i % 2}
        for i in range(6)
    ],
    "openai/gsm8k": [worked(i) for i in range(6)],
    "EleutherAI/wikitext_document_level": [{"page": text(i, 9)} for i in range(3)],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands where the data sets of the hub are."""

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if path not in HUB:
            raise ConnectionError(f"no way to {path}\nmore lines")
        rows = datasets.Dataset.from_list(HUB[path])
        return {"train": rows, "validation": rows, "test": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_the_harness_s_own_tasks_take_the_paper_s_shots_or_ours(
    hub: None, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (piqa,) = load_tasks(["piqa"], routed, tokenizer)
    assert piqa.about() == {"kind": "choice", "metric": "acc_norm", "shots": 0}
    assert prompts(piqa)[1][0] == (f"Question: {text(1, 2)} 1?\nAnswer:", " it 1")
    (shown,) = load_tasks(["piqa"], routed, tokenizer, shots=2, limit=3)
    assert shown.about()["shots"] == 2
    assert prompts(shown)[0][0][0].count("\nAnswer:") == 3
    report = evaluate_tasks(routed, [piqa], [0.5])
    assert report["piqa"]["dense"]["rows"] == 6


def test_worked_answers_of_the_hub_are_a_loss(
    hub: None, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (task,) = load_tasks(["gsm8k"], routed, tokenizer, shots=1)
    context, answer = prompts(task)[0][0]
    assert context.endswith("\nAnswer:")
    assert "Answer: " in context
    assert "Answer:  " not in context
    assert answer.startswith(" ")
    assert task.about()["kind"] == "loss"


def test_names_and_data_that_the_harness_has_not(
    hub: None, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'hellaswagg' of the harness.*hellaswag"):
        load_tasks(["hellaswagg"], routed, tokenizer)
    with pytest.raises(DataError, match=r"the task boolq .*no way to aps/super_glue.*--task-data"):
        load_tasks(["boolq"], routed, tokenizer)
    with pytest.raises(ConfigError, match="of the kind loglikelihood_rolling"):
        load_tasks(["wikitext"], routed, tokenizer)


# --- What is measured ---


@pytest.mark.parametrize("name", ["arc_challenge", "winogrande", "mmlu", "piqa"])
def test_dense_accuracy_is_the_harness_s_own(
    folder: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    (task,) = load_tasks([name], routed_model(), tokenizer, folder=folder, shots=0)
    mine = task.summary(ask(task)[0])
    plain = tiny_model("llama", max_position_embeddings=4096)
    parts = {part.task_name: part for part in task.parts}  # type: ignore[attr-defined]
    found = evaluate(
        HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=3),
        {"tasks": parts, "groups": {}, "group_map": {}},
        bootstrap_iters=0,
    )
    metric = f"{task.about()['metric']},none"
    sizes = {part: len(found["samples"][part]) for part in parts}
    right = sum(found["results"][part][metric] * size for part, size in sizes.items())
    assert mine["rows"] == sum(sizes.values())
    assert mine["accuracy"] == pytest.approx(right / mine["rows"])
    golds = [
        sample["resps"][sample["doc"]["gold"]][0][0]
        for part in parts
        for sample in found["samples"][part]
    ]
    assert mine["gold_log_likelihood"] == pytest.approx(sum(golds) / len(golds), abs=TOLERANCE)


@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence", "block_sequence"])
def test_batch_size_and_padding_side_change_nothing(
    folder: Path, tokenizer: PreTrainedTokenizerFast, granularity: str, kv: str
) -> None:
    """Requests of unequal length, which HFLM pads on the right and without a mask."""
    names = ("piqa", "winogrande", "gsm8k")
    alone = None
    for batch_size, side in ((1, "left"), (3, "right"), (64, "left")):
        tokenizer.padding_side = side
        model = routed_model(granularity, kv)
        tasks = load_tasks(names, model, tokenizer, folder=folder, shots=0, batch_size=batch_size)
        found = [ask(task, Variant(0.5)) for task in tasks]
        alone = alone or found
        for (items, ran), (wanted, wanted_ran) in zip(found, alone, strict=True):
            for item, other in zip(items, wanted, strict=True):
                assert item == pytest.approx(other, abs=TOLERANCE)
            assert ran.shares() == pytest.approx(wanted_ran.shares(), abs=1e-9)
        assert all(0.2 < ran.shares()["kept_fraction"] < 0.98 for _, ran in found)
    tokenizer.padding_side = "left"


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_likelihoods_are_those_of_a_row_alone(
    folder: Path, tokenizer: PreTrainedTokenizerFast, granularity: str
) -> None:
    model = routed_model(granularity)
    (task,) = load_tasks(["gsm8k"], model, tokenizer, folder=folder)
    items, ran = ask(task, Variant(0.5))
    kept = tokens = 0.0
    for item, ((context, answer),) in zip(items, prompts(task), strict=True):
        prompt = tokenizer(context)["input_ids"]
        ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
        with torch.no_grad(), record(model) as trace:
            logits = model(ids[:, :-1], budget=0.5).logits[0, len(prompt) - 1 :]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
        assert item["loss"] == pytest.approx(float(losses), abs=TOLERANCE)
        assert item["tokens"] == ids.shape[1] - len(prompt)
        kept += trace.kept_fraction() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert ran.shares()["kept_fraction"] == pytest.approx(kept / tokens)


def test_a_model_without_room_for_logits_gets_one_row_a_forward(
    folder: Path,
    routed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (task,) = load_tasks(["gsm8k"], routed, tokenizer, folder=folder)
    rows = []
    forward = routed.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        rows.append(kwargs["input_ids"].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(routed, "forward", spy)
    wide, _ = ask(task)
    assert max(rows) > 1
    rows.clear()
    monkeypatch.setattr("router_tuning.evaluation.harness.LOGIT_BYTES", 1)
    narrow, _ = ask(task)
    assert set(rows) == {1}
    assert [item["loss"] for item in narrow] == pytest.approx([item["loss"] for item in wide])


# --- What is reported ---


def test_routers_that_keep_everything_are_dense(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("llama")
    attach(model, RoutingConfig())
    tasks = load_tasks(["piqa", "gsm8k"], model, tokenizer, folder=folder)
    found = evaluate_tasks(model, tasks, [1.0])
    row = found["piqa"]["routed"][0]
    assert row["gold_difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert row["accuracy_difference"]["mean"] == 0.0
    assert [row[share] for share in SHARES] == pytest.approx([1.0, 1.0, 1.0], abs=1e-2)
    assert found["gsm8k"]["routed"][0]["loss_difference"]["mean"] == 0.0


def test_a_report_holds_paired_differences(
    folder: Path, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (task,) = load_tasks(["piqa"], routed, tokenizer, folder=folder)
    report = evaluate_tasks(routed, [task], [0.7, 0.4])["piqa"]
    base, _ = ask(task)
    for row, budget in zip(report["routed"], (0.7, 0.4), strict=True):
        items, ran = ask(task, Variant(budget))
        gold = [a["gold"] - b["gold"] for a, b in zip(items, base, strict=True)]
        per_char = [d / len(query(i, 2)["choices"][i % 2]) for i, d in enumerate(gold)]
        assert row["gold_difference"]["mean"] == pytest.approx(sum(gold) / 8)
        assert row["gold_difference_per_char"]["mean"] == pytest.approx(sum(per_char) / 8)
        among = [a["among"] - b["among"] for a, b in zip(items, base, strict=True)]
        assert row["among_choices_difference"]["mean"] == pytest.approx(sum(among) / 8)
        assert row["gold_difference"]["low"] < row["gold_difference"]["mean"]
        assert row["accuracy"] == sum(item["score"] for item in items) / 8
        assert row["above_chance"] == row["accuracy"] - 0.5
        assert row["share_above_chance"] is None  # 8 rows say nothing
        assert {name: row[name] for name in SHARES} == ran.shares()
    assert report["dense"]["rows"] == 8
    assert report["metric"] == "acc_norm"


def test_among_choices_is_a_log_softmax() -> None:
    said = [-3.0, -1.0, -200.0]
    wanted = torch.tensor(said).log_softmax(0)
    assert [_among(said, gold) for gold in range(3)] == pytest.approx(wanted.tolist())


def test_controls_skip_as_much(
    folder: Path, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (task,) = load_tasks(["piqa"], routed, tokenizer, folder=folder)
    order = ["layers.1.attn", "layers.3.attn", "layers.0.attn", "layers.2.attn"]
    calls: list[tuple[int, int]] = []
    report = evaluate_tasks(
        routed,
        [task],
        [0.9, 0.5],
        orders={"static_cosine": order},
        seeds=(3, 4),
        progress=lambda done, total: calls.append((done, total)),
    )["piqa"]
    assert calls[-1][0] == calls[-1][1] == task.size * (1 + 2 + 2 * 2 + 2 * 2)
    golds = [ask(task, Variant(1.0, StaticDrop(order[:n])))[0] for n in range(5)]
    mean = [sum(item["gold"] for item in items) / 8 for items in golds]
    for row, beside in zip(report["static_cosine"], report["routed"], strict=True):
        assert row["kept_fraction"] == pytest.approx(beside["kept_fraction"])  # not the budget
        dropped = 4 * (1 - beside["kept_fraction"])
        low = int(dropped)
        share = dropped - low
        wanted = (1 - share) * mean[low] + share * mean[low + 1]
        assert row["gold_log_likelihood"] == pytest.approx(wanted)
        assert row["units"] == [order[:low], order[: low + 1]]
    rates = ask(task, Variant(0.5))[1].kept_per_unit()
    runs = [ask(task, Variant(0.5, RandomMask(rates, seed)))[0] for seed in (3, 4)]
    random = sum(item["gold"] for items in runs for item in items) / 16
    assert report["random"][1]["gold_log_likelihood"] == pytest.approx(random)
    assert report["random"][1]["seeds"] == [3, 4]


def test_static_dropping_ends_with_its_order(
    folder: Path, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    (task,) = load_tasks(["piqa"], routed, tokenizer, folder=folder)
    order = {"static_cosine": ["layers.1.attn"]}
    row = evaluate_tasks(routed, [task], [0.3], orders=order)["piqa"]["static_cosine"][0]
    assert row["kept_fraction"] == 0.75
    assert row["units"] == [["layers.1.attn"]]


def test_orders_are_chosen_by_both_criteria(routed: PreTrainedModel) -> None:
    from router_tuning.data import Windows

    ids = token_ids(4, 12)
    orders = static_orders(routed, Windows(ids, torch.zeros_like(ids).bool()), [0.9, 0.6])
    assert len(orders["static_cosine"]) == 4
    assert len(orders["static_greedy"]) == 2


# --- What is refused ---


def load(folder: Path, name: str, **options: Any) -> None:
    load_tasks([name], routed_model(), None, folder=folder, **options)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", 'line 2: wanted {"query", "choices", "gold"}, got a list'),
        ('{"query": "a", "gold": 0}', "line 2: missing 'choices'; wanted"),
        ('{"query": "a", "choices": ["x"], "gold": 0}', "choices must be a list of 2 to 6 texts"),
        ('{"query": "a", "choices": "xy", "gold": 0}', "choices must be a list of 2 to 6 texts"),
        ('{"query": "a", "choices": ["x", "y"], "gold": 2}', "from 0 to 1, got 2"),
        ('{"query": "a", "choices": ["x", "y"], "gold": true}', "from 0 to 1, got True"),
        ('{"query": " ", "choices": ["x", "y"], "gold": 1}', "query must be a text"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: str, words: str) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text(json.dumps(query(0, 2)) + "\n" + row + "\n")
    with pytest.raises(DataError) as caught:
        load(tmp_path, "piqa")
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wanted mmlu.jsonl or mmlu_test.jsonl or mmlu_val"):
        load(tmp_path, "mmlu")
    with pytest.raises(ConfigError, match=r"unknown task 'pica'.*piqa"):
        load(tmp_path, "pica")
    with pytest.raises(ConfigError, match="is no folder"):
        load(tmp_path / "none", "piqa")
    (tmp_path / "piqa.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        load(tmp_path, "piqa")


def test_too_few_rows_for_the_shots(folder: Path) -> None:
    with pytest.raises(DataError, match=r"wants 8 few-shot examples.*and has 7.*--shots"):
        load(folder, "piqa", shots=8)
    with pytest.raises(
        DataError, match=r"mmlu_high_school_art wants 7 few-shot examples.*and has 6"
    ):
        load(folder, "mmlu", shots=7)


def test_without_lm_eval(
    folder: Path, routed: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r'pip install "router-tuning\[eval\]"'):
        load_tasks(["piqa"], routed, None, folder=folder)


def test_budgets_are_checked_first(
    folder: Path, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    tasks = load_tasks(["piqa"], routed, tokenizer, folder=folder)
    with pytest.raises(BudgetError, match="outside the calibrated range"):
        evaluate_tasks(routed, tasks, [0.05])


def test_pooling_over_prompts_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    attach(model, RoutingConfig(granularity="attn_sequence", pooling="prompt"))
    with pytest.raises(UnsupportedCallError, match="prompt"):
        load_tasks(["piqa"], model, tokenizer)


def test_the_users_tokenizer_and_mode_stay_as_they_were(
    folder: Path, routed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    routed.train()
    tokenizer.pad_token = None
    (task,) = load_tasks(["piqa"], routed, tokenizer, folder=folder)
    ask(task)
    assert routed.training
    assert tokenizer.pad_token is None
    with dense(routed):
        assert routed(token_ids()).logits is not None
    tokenizer.pad_token = "<pad>"
