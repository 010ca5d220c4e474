"""Greedy answers beside dense ones."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from laws import calibrate_by_hand, randomize
from router_tuning import RoutingConfig, attach
from router_tuning.evaluation.generation_check import GenerationCheck, _repetition, _same, _until
from router_tuning.evaluation.tasks import evaluate_tasks
from router_tuning.evaluation.variants import DENSE, Variant
from tiny import tiny_model


def check(tokenizer: PreTrainedTokenizerFast, *, fresh: bool, batch_size: int) -> GenerationCheck:
    model = tiny_model("llama", seed=2)
    attach(model, RoutingConfig(kv="kept"))
    calibrate_by_hand(model)
    if not fresh:
        randomize(model)
    return GenerationCheck(model, tokenizer, limit=3, batch_size=batch_size, max_new_tokens=12)


def test_routers_that_keep_everything_say_what_dense_says(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    one = check(tokenizer, fresh=True, batch_size=2)
    task = evaluate_tasks(one.model, [one], [1.0])["generation"]
    row = task["routed"][0]
    assert row["agreement"]["mean"] == row["same_beginning"] == 1.0
    assert row["loss_of_dense"] == task["dense"]["loss_of_dense"]
    assert row["repetition_difference"]["mean"] == 0.0
    assert row["kept_fraction"] == 1.0


def test_routers_that_skip_are_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    one = check(tokenizer, fresh=False, batch_size=2)
    task = evaluate_tasks(one.model, [one], [0.5])["generation"]
    row = task["routed"][0]
    assert row["same_beginning"] < 1
    assert row["agreement"]["mean"] < 1
    assert row["loss_of_dense"] > task["dense"]["loss_of_dense"]  # dense picks what it likes most
    assert 0.3 < row["kept_fraction"] < 0.7


def test_the_batch_size_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    found = []
    for batch_size in (1, 3):
        one = check(tokenizer, fresh=False, batch_size=batch_size)
        found.append([one.measure(variant, lambda done: None) for variant in (DENSE, Variant(0.5))])
    for (items, _), (others, _) in zip(*found, strict=True):
        for item, other in zip(items, others, strict=True):
            assert item == pytest.approx(other, abs=1e-3)
    assert found[0][1][1].shares() == pytest.approx(found[1][1][1].shares())


def test_loss_is_that_of_the_dense_model_on_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    one = check(tokenizer, fresh=False, batch_size=3)
    one.measure(DENSE, lambda done: None)
    items, _ = one.measure(Variant(0.5), lambda done: None)
    answers, _ = one._answers(Variant(0.5), lambda done: None)
    plain = tiny_model("llama", seed=2)
    for item, prompt, answer in zip(items, one.inputs, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        logits = plain(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = -logits.gather(1, torch.tensor(answer)[:, None]).sum()
        assert item["loss"] == pytest.approx(float(wanted.detach()), rel=1e-4)
        assert item["tokens"] == len(answer)


def test_an_answer_ends_with_its_first_end_token() -> None:
    assert _until([5, 6, 2, 0, 0], {2}) == [5, 6, 2]
    assert _until([5, 6, 7], {2}) == [5, 6, 7]


def test_the_same_beginning_ends_at_the_first_difference() -> None:
    assert _same([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert _same([1, 2], [1, 2, 3]) == 2


def test_repetition_counts_runs_of_four_tokens_seen_before() -> None:
    assert _repetition([1, 2, 3, 4, 5, 6]) == 0
    assert _repetition([7] * 8) == pytest.approx(1 - 1 / 5)
    assert _repetition([1, 2]) == 0
