"""Training moves the routers and nothing else, meets its budget, and survives what stops it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from laws import FIRST_FIVE
from router_tuning.attach import attach
from router_tuning.config import RoutingConfig
from router_tuning.errors import BudgetError, ConfigError, TrainingError, UnsupportedCallError
from router_tuning.execution.context import (
    CONTEXT_KEY,
    dense,
    record,
    routing_of,
)
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.training.safety import last_complete_checkpoint
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.units import decoder_layers, decoder_of, unwrap
from tiny import VOCAB_SIZE, checkpoint_activations, tiny_model, token_ids

CHECKPOINTING = (  # its name since transformers 5.24, and before
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)

Rows = list[dict[str, Tensor]]


def rows(number: int = 16, length: int = 12, seed: int = 0, labels: bool = False) -> Rows:
    """Token ids; with labels, a growing part of each row has none."""
    examples = [{"input_ids": ids} for ids in token_ids(number, length, seed=seed)]
    for i, example in enumerate(examples if labels else []):
        example["labels"] = example["input_ids"].clone()
        example["labels"][: i % (length - 2)] = -100
    return examples


def routed(family: str = "llama", **config: Any) -> PeftModel:
    """A PEFT model with fresh routers."""
    return get_peft_model(tiny_model(family), RouterTuningConfig(**{"budget": 0.7, **config}))


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give the routers weights, so that they keep some tokens and skip others."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * (0.3 if parameter.numel() > 1 else 0.1)
    return model


class InOrder(RouterTrainer):
    """Takes the rows in their order, epoch by epoch."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trainer_of(
    model: nn.Module,
    folder: Path,
    data: Rows | None = None,
    held_out: Rows | None = None,
    **fields: Any,
) -> RouterTrainer:
    """A quiet trainer on the CPU that logs every step: eight steps of four rows, large ones from an
    even start, so that the routers learn to skip within them.
    """
    callbacks = fields.pop("callbacks", None)
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 4,
        "warm_start": 0,
        "bias_learning_rate": 0.1,
        "learning_rate": 1e-2,
        "anneal_fraction": 0.5,
        "threshold_range": 0.0,  # all rows alike, so that every loss can be worked out again
        "lm_weight": 0.0,
    }
    given = {**defaults, "use_cpu": True, "disable_tqdm": True, **fields}
    args = RouterTrainingArguments(output_dir=str(folder), **given)
    trainer = InOrder(
        model, args, train_dataset=data or rows(), eval_dataset=held_out, callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def logged(trainer: RouterTrainer, *names: str) -> list[tuple[float, ...]]:
    """The named values of each training log."""
    return [tuple(x[n] for n in names) for x in trainer.state.log_history if "task_loss" in x]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def gradients(trainer: RouterTrainer, batch: dict[str, Tensor], step: int = 6) -> dict[str, Tensor]:
    """Gradients of one loss in the middle of a training."""
    model = trainer.routed
    trainer.state.max_steps, trainer.state.global_step = 8, step
    model.train()
    model.zero_grad()
    trainer.compute_loss(model, dict(batch)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == trainable(model).keys()
    return found


def batch_of(data: Rows) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


# ---- what training does ----


@pytest.mark.parametrize("objective", ["distill", "lm"])
@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
@pytest.mark.parametrize("family", FIRST_FIVE)
def test_routers_move_and_the_base_does_not(
    family: str, granularity: str, objective: str, tmp_path: Path
) -> None:
    model = routed(family, granularity=granularity, decide_after=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = set(trainable(model))
    assert names
    trainer_of(model, tmp_path, rows(labels=True), objective=objective, save_strategy="no").train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names
    assert all("skip_router_attn" in name for name in names)


@pytest.mark.parametrize(
    "granularity", ["attn_token", "attn_sequence", "mlp_token", ["attn_token", "mlp_sequence"]]
)
@pytest.mark.parametrize("start", ["all kept", "much skipped"])
def test_kept_meets_the_budget_from_both_sides(
    granularity: str | list[str], start: str, tmp_path: Path
) -> None:
    model = routed(granularity=granularity, decide_after=4)
    if start == "much skipped":
        for name, parameter in awake(model).named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.data.fill_(-1.0)
    trainer = trainer_of(
        model,
        tmp_path,
        rows(32, 24),
        per_device_train_batch_size=16,
        max_steps=120,
        save_strategy="no",
    )
    trainer.train()
    kept = [k for (k,) in logged(trainer, "kept")]
    assert kept[0] == 1.0 if start == "all kept" else kept[0] < 0.7
    assert sum(kept[-10:]) / 10 == pytest.approx(0.7, abs=0.05)


def test_every_second_row_learns_a_larger_budget(tmp_path: Path) -> None:
    model = awake(routed())
    trainer = trainer_of(model, tmp_path, threshold_range=2.0, save_strategy="no")
    trainer.state.max_steps = 8
    seen: list[Tensor] = []

    def look(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if CONTEXT_KEY in kwargs:  # the teacher's forward has none
            seen.append(kwargs[CONTEXT_KEY].context.threshold_B1[:, 0])

    decoder_layers(decoder_of(model))[0].register_forward_pre_hook(look, with_kwargs=True)
    for step in (5, 5, 6):
        trainer.state.global_step, trainer._micro_batch = step, 0
        trainer.compute_loss(model, batch_of(rows(5)))
    with torch.no_grad():
        trainer.compute_loss(model, batch_of(rows(5)))
    first_B, again_B, later_B, evaluated_B = seen
    assert first_B[::2].tolist() == [0.0] * 3
    assert all(-2 <= threshold < 0 for threshold in first_B[1::2])
    assert torch.equal(first_B, again_B)  # as a resumed training would draw
    assert not torch.equal(first_B, later_B)
    assert not evaluated_B.any()


def test_rows_of_larger_budgets_do_not_count_as_kept(tmp_path: Path) -> None:
    def kept(model: nn.Module, data: Rows) -> float:
        with torch.no_grad(), record(model) as trace:
            model(**batch_of(data), use_cache=False)
        return trace.kept_fraction()

    model, data = awake(routed()), rows(4, 24)
    trainer = trainer_of(model, tmp_path, threshold_range=2.0, save_strategy="no")
    trainer.state.max_steps = 8
    trainer.compute_loss(model, batch_of(data))
    assert trainer._sums["kept"] == pytest.approx(kept(model, data[::2]))
    assert kept(model, data[::2]) != pytest.approx(kept(model, data))


def test_the_logs_say_what_was_trained(tmp_path: Path) -> None:
    trainer = trainer_of(
        routed(), tmp_path, held_out=rows(6, seed=9), eval_strategy="steps", eval_steps=4
    )
    trainer.train()
    log = logged(trainer, "loss", "task_loss", "budget_loss", "kept", "target")
    assert log[0] == (0.0, 0.0, 0.0, 1.0, 1.0)  # fresh routers are the teacher
    assert [x[-1] for x in log] == pytest.approx([1.0, 0.925, 0.85, 0.775, 0.7, 0.7, 0.7, 0.7])
    for loss, task, budget, kept, target in log:
        assert loss == pytest.approx(task + budget, abs=1e-4)
        assert budget == pytest.approx(20 * (kept - target) ** 2, abs=1e-4)
    held_out = [x for x in trainer.state.log_history if "eval_loss" in x]
    assert len(held_out) == 2
    assert all(0 < x["eval_kept"] <= 1 for x in held_out)


def test_a_log_gives_means_since_the_last(tmp_path: Path) -> None:
    every, third = (
        trainer_of(routed(), tmp_path, logging_steps=n, save_strategy="no") for n in (1, 3)
    )
    every.train()
    third.train()
    kept = [k for (k,) in logged(every, "kept")]
    assert [k for (k,) in logged(third, "kept")] == pytest.approx(
        [sum(kept[:3]) / 3, sum(kept[3:6]) / 3]
    )


def test_held_out_loss_and_kept_are_those_of_the_routed_model(tmp_path: Path) -> None:
    model, held_out = awake(routed()), rows(6, seed=9)
    metrics = trainer_of(model, tmp_path, held_out=held_out).evaluate()
    ids = batch_of(held_out)["input_ids"]
    with torch.no_grad():
        with dense(model):
            teacher = model(ids).logits.log_softmax(-1)
        with record(model) as trace:
            student = model(ids).logits.log_softmax(-1)
    assert metrics["eval_loss"] == pytest.approx(
        (teacher.exp() * (teacher - student)).sum(-1).mean().item(), rel=1e-4
    )
    assert metrics["eval_kept"] == pytest.approx(trace.kept_fraction())
    assert 0.2 < metrics["eval_kept"] < 0.9


def test_held_out_lm_loss_is_the_models_own(tmp_path: Path) -> None:
    model, held_out = awake(routed()), rows(4, seed=9, labels=True)
    metrics = trainer_of(model, tmp_path, held_out=held_out, objective="lm").evaluate()
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(
            model(**batch_of(held_out)).loss.item(), rel=1e-5
        )


def test_distilling_may_add_the_cross_entropy_to_the_text(tmp_path: Path) -> None:
    model, batch = awake(routed()), batch_of(rows(4, labels=True))

    def loss(lm_weight: float) -> float:
        trainer = trainer_of(model, tmp_path, lm_weight=lm_weight, save_strategy="no")
        trainer.state.max_steps, trainer.state.global_step = 8, 6
        found: Tensor = trainer.compute_loss(model, dict(batch))
        return found.item()

    with torch.no_grad():
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    entropy = float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
    # A mean over all positions that are compared, also those that have no label.
    assert entropy > 1
    assert loss(0.5) - loss(0.0) == pytest.approx(0.5 * entropy / batch["labels"].numel(), rel=1e-4)


def test_padding_takes_no_part(tmp_path: Path) -> None:
    trainer = trainer_of(awake(routed()), tmp_path, objective="distill")
    ids = token_ids(2, 10)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    plain = gradients(trainer, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with_pads = gradients(trainer, {"input_ids": padded, "attention_mask": mask})
    for name, gradient in plain.items():
        torch.testing.assert_close(with_pads[name], gradient, rtol=1e-3, atol=1e-5)


# ---- the budget's gradient ----


def test_the_budget_gradient_is_that_of_the_square(tmp_path: Path) -> None:
    model = awake(routed(layers=[1, 3]))
    batch = batch_of(rows(4))
    with_budget = gradients(trainer_of(model, tmp_path, budget_weight=20.0), batch)
    without = gradients(trainer_of(model, tmp_path, budget_weight=0.0), batch)
    model.zero_grad()
    with record(model) as trace:
        model(**batch)
    gates = [unit.soft_BT for unit in trace.forwards[-1].units.values()]
    kept = (2 + sum(gate.mean() for gate in gates)) / 4  # type: ignore[union-attr]
    (20 * (kept - 0.7) ** 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = parameter.grad + without[name]
            torch.testing.assert_close(with_budget[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["distill", "lm"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_checkpointing_changes_no_gradient(
    family: str, kv: str, objective: str, tmp_path: Path
) -> None:
    batch, found = batch_of(rows(4, labels=True)), []
    for checkpointing in (False, True):
        model = awake(routed(family, kv=kv, layers=[1, 3]))
        if checkpointing:
            checkpoint_activations(model)
        found.append(gradients(trainer_of(model, tmp_path, objective=objective), batch))
    for name, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", ["attn_token", "mlp_token"]])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_training_with_checkpointing_equals_training_without(
    family: str, granularity: str | list[str], tmp_path: Path
) -> None:
    def model() -> nn.Module:
        return awake(routed(family, granularity=granularity))

    fields = {"save_strategy": "no", "max_steps": 5, "anneal_fraction": 0.2}
    plain = trainer_of(model(), tmp_path, **fields)
    plain.train()
    saving = trainer_of(model(), tmp_path, **{CHECKPOINTING: True}, **fields)
    saving.train()
    assert all(x.gradient_checkpointing for x in decoder_layers(decoder_of(saving.routed)))
    for expected, got in zip(
        logged(plain, "loss", "kept"), logged(saving, "loss", "kept"), strict=True
    ):
        assert got == pytest.approx(expected, rel=1e-4)


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_reentrant"):
        trainer_of(routed(), tmp_path, **{CHECKPOINTING + "_kwargs": {"use_reentrant": True}})
    model = routed()
    checkpoint_activations(model, {"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        trainer_of(model, tmp_path).train()


@pytest.mark.parametrize("objective", ["distill", "lm"])
def test_accumulation_counts_each_part_once(objective: str, tmp_path: Path) -> None:
    """A step of two equal micro-batches is a step of one of them: task and budget alike."""
    fields = {"objective": objective, "save_strategy": "no", "anneal_fraction": 0.0}
    once, twice = rows(4, labels=True), 2 * rows(4, labels=True)
    one = trainer_of(awake(routed()), tmp_path, once, **fields)
    two = trainer_of(awake(routed()), tmp_path, twice, gradient_accumulation_steps=2, **fields)
    one.train()
    two.train()
    names = ("loss", "task_loss", "budget_loss", "kept", "grad_norm")
    for expected, got in zip(logged(one, *names), logged(two, *names), strict=True):
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("objective", ["distill", "lm"])
def test_accumulation_equals_a_larger_batch(objective: str, tmp_path: Path) -> None:
    """Also where the micro-batches have different numbers of labels."""
    fields = {"objective": objective, "save_strategy": "no", "budget_weight": 0.0, "max_steps": 3}
    data = rows(8, labels=True)
    large = trainer_of(awake(routed()), tmp_path, data, per_device_train_batch_size=8, **fields)
    parts = trainer_of(awake(routed()), tmp_path, data, gradient_accumulation_steps=2, **fields)
    large.train()
    parts.train()
    for expected, got in zip(
        logged(large, "loss", "grad_norm"), logged(parts, "loss", "grad_norm"), strict=True
    ):
        assert got == pytest.approx(expected, rel=1e-3)


# ---- speed ----


def test_lower_layers_run_once_a_step_with_the_same_gradient(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(awake(routed(family, layers=[2, 3])), tmp_path)
    runs: list[int] = []
    for i, layer in enumerate(decoder_layers(decoder_of(trainer.routed))):
        layer.mlp.register_forward_hook(lambda *_, i=i: runs.append(i))  # type: ignore[union-attr]
    batch = batch_of(rows(4))
    shared = gradients(trainer, batch)
    assert sorted(runs) == [0, 1, 2, 2, 3, 3]
    monkeypatch.setattr("router_tuning.training.shared_prefix.shared_layers", lambda model: [])
    runs.clear()
    alone = gradients(trainer, batch)
    assert sorted(runs) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(torch.equal(shared[name], alone[name]) for name in alone)


def test_the_output_embedding_is_never_given_a_slice_of_rows(tmp_path: Path) -> None:
    """PyTorch copies the embedding once a row for that; see `last_columns`."""
    model = routed()
    slices: list[bool] = []
    head: Any = unwrap(model).get_output_embeddings()  # type: ignore[operator]
    head.register_forward_pre_hook(
        lambda _, args: slices.append(args[0].dim() == 3 and not args[0].is_contiguous())
    )
    trainer = trainer_of(model, tmp_path, rows(4), per_device_train_batch_size=4, max_steps=1)
    trainer.train()
    trainer.evaluate(rows(4))  # type: ignore[arg-type]
    assert len(slices) > 4
    assert not any(slices)


def test_a_part_of_the_positions_is_a_seeded_choice(tmp_path: Path) -> None:
    batch = batch_of(rows(4, 50))
    model = awake(routed())
    part = trainer_of(model, tmp_path, distill_positions=0.25, budget_weight=0.0)
    again = trainer_of(model, tmp_path, distill_positions=0.25, budget_weight=0.0)
    other = trainer_of(model, tmp_path, distill_positions=0.25, budget_weight=0.0, seed=1)
    real = torch.ones(4, 50, dtype=torch.bool)
    real[0, :10] = False
    chosen = part._choose(real)
    assert int(chosen.sum()) == round(0.25 * 190)
    assert not chosen[0, :10].any()
    assert torch.equal(chosen, again._choose(real))
    assert not torch.equal(chosen, other._choose(real))
    first = gradients(part, batch)
    assert all(torch.equal(g, first[n]) for n, g in gradients(again, batch).items())
    assert not all(torch.equal(g, first[n]) for n, g in gradients(other, batch).items())


def test_dropout_does_not_blur_the_teacher(tmp_path: Path) -> None:
    model = awake(routed())
    model.config.attention_dropout = 0.5
    for layer in decoder_layers(decoder_of(model)):
        layer.self_attn.attention_dropout = 0.5  # type: ignore[union-attr]
    trainer = trainer_of(model, tmp_path)
    model.train()
    ids = {"input_ids": token_ids()}
    first, second = (trainer.teacher(ids)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert not torch.equal(
        model(**ids).logits, model(**ids).logits
    )  # while the student has dropout


# ---- dtypes, optimizer, schedule ----


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("objective", ["distill", "lm"])
@pytest.mark.parametrize("mode", ["bf16 model", "autocast"])
def test_half_precision_trains_fp32_routers(
    mode: str, objective: str, family: str, tmp_path: Path
) -> None:
    base = tiny_model(family)
    base = base.bfloat16() if mode == "bf16 model" else base
    model = get_peft_model(base, RouterTuningConfig(budget=0.6))
    trainer = trainer_of(
        model,
        tmp_path,
        rows(labels=True),
        rows(4, labels=True),
        bf16=mode == "autocast",
        objective=objective,
        max_steps=16,
        save_strategy="no",
        anneal_fraction=0.1,
    )
    trainer.train()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert logged(trainer, "kept")[-1][0] < 0.95
    assert trainer.evaluate()["eval_loss"] > 0


def test_biases_and_inner_weights_have_their_own_learning_rates(tmp_path: Path) -> None:
    model = routed(router="bottleneck", router_hidden=4)
    trainer = trainer_of(
        model, tmp_path, learning_rate=1e-3, bias_learning_rate=5e-2, weight_decay=0.1
    )
    *first, inner, biases = trainer.create_optimizer().param_groups
    assert [tuple(group["params"][0].shape) for group in first] == [(4, 32)] * 4
    assert {group["weight_decay"] for group in first} == {0.1}
    assert (inner["lr"], inner["weight_decay"]) == (1e-3, 0.1)
    assert (biases["lr"], biases["weight_decay"]) == (5e-2, 0.0)
    assert [p.numel() for p in biases["params"]] == [
        1
    ] * 4  # the last bias of each, not the hidden ones
    groups = (*first, inner, biases)
    assert sum(len(group["params"]) for group in groups) == len(trainable(model))


def test_a_router_learns_the_slower_the_wider_its_input_spreads(tmp_path: Path) -> None:
    model = routed()
    norm = decoder_layers(decoder_of(model))[1].input_layernorm
    norm.weight.data *= 50  # type: ignore[union-attr, operator]
    rates = [g["lr"] for g in trainer_of(model, tmp_path).create_optimizer().param_groups[:4]]
    plain = trainer_of(routed(), tmp_path).create_optimizer().param_groups[:4]
    assert rates[1] == pytest.approx(plain[1]["lr"] / 50, rel=1e-3)
    assert rates[0] == plain[0]["lr"]


def test_routers_of_biases_only_train(tmp_path: Path) -> None:
    model = routed(router="bias")
    before = trainable(model)
    trainer_of(model, tmp_path, save_strategy="no").train()
    assert not any(torch.equal(p, before[n]) for n, p in trainable(model).items())


def test_the_learning_rate_stays_and_then_cools_down(tmp_path: Path) -> None:
    trainer = trainer_of(routed(), tmp_path, save_strategy="no", cooldown_fraction=0.5)
    trainer.train()
    rates = [rate for (rate,) in logged(trainer, "learning_rate")]
    assert rates == pytest.approx([0.01] * 5 + [0.0075, 0.005, 0.0025])
    other = trainer_of(routed(), tmp_path, save_strategy="no", lr_scheduler_type="cosine")
    other.train()
    assert logged(other, "learning_rate")[4][0] == pytest.approx(0.005)


# ---- stopping and going on ----

SAME = ("loss", "task_loss", "kept", "grad_norm", "learning_rate")


@pytest.mark.parametrize("fields", [
    {},
    {
        "gradient_accumulation_steps": 2,
        "budget_momentum": 0.5,
        "distill_positions": 0.5,
        "threshold_range": 2.0,
    },
    {"objective": "lm", "gradient_accumulation_steps": 3, "budget_momentum": 0.9},
])  # fmt: skip
def test_resuming_gives_the_losses_of_an_uninterrupted_run(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    data = rows(20, labels=True)  # five micro-batches an epoch: the break falls inside one
    whole = trainer_of(routed(), tmp_path / "whole", data, **fields)
    whole.train()
    assert any(kept < 1 for (kept,) in logged(whole, "kept")[5:])
    # The folder of the whole run stands for a run that ended after step 4.
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    part = trainer_of(routed(), tmp_path / "part", data, **fields)
    part.train(resume_from_checkpoint=True)
    assert part.state.global_step == 8
    # To the last bit: the same operations on the same numbers, on one CPU.
    assert logged(part, *SAME) == logged(whole, *SAME)
    ours, theirs = trainable(part.routed), trainable(whole.routed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class At(TrainerCallback):
    """Does something at one event of one step (from 1)."""

    def __init__(self, event: str, step: int, action: Any) -> None:
        def happen(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == step:
                action()

        setattr(self, event, happen)


@pytest.fixture
def interactive() -> Iterator[None]:
    """Python's own handler: a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def press_ctrl_c_twice() -> None:
    press_ctrl_c()
    press_ctrl_c()


@pytest.mark.usefixtures("interactive")
@pytest.mark.parametrize(("press", "good_step"), [(press_ctrl_c, 3), (press_ctrl_c_twice, 2)])
def test_ctrl_c_saves_and_resuming_goes_on(press: Any, good_step: int, tmp_path: Path) -> None:
    fields = {"budget_momentum": 0.5, "gradient_accumulation_steps": 2, "save_steps": 100}
    whole = trainer_of(routed(), tmp_path / "whole", **fields)
    whole.train()
    # Inside step 3, after its first micro-batch: one press ends the step, two drop it.
    stopped = trainer_of(
        routed(), tmp_path / "part", callbacks=[At("on_substep_end", 3, press)], **fields
    )
    with pytest.raises(
        KeyboardInterrupt, match=f"step {good_step} is saved in .*checkpoint-{good_step}"
    ):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = trainer_of(routed(), tmp_path / "part", **fields)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, *SAME)[-5:] == logged(whole, *SAME)[-5:]


def test_ctrl_c_while_the_routers_change_saves_nothing_half_done(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    stopped = trainer_of(
        routed(), tmp_path, save_steps=2, callbacks=[At("on_optimizer_step", 4, interrupt)]
    )
    with pytest.raises(KeyboardInterrupt, match="cut short"):
        stopped.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.usefixtures("interactive")
def test_ctrl_c_before_the_first_step_ends_saves_nothing(tmp_path: Path) -> None:
    stopped = trainer_of(routed(), tmp_path, callbacks=[At("on_step_begin", 1, press_ctrl_c_twice)])
    with pytest.raises(KeyboardInterrupt, match="nothing was saved"):
        stopped.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_handler_of_the_application_is_left_alone(tmp_path: Path) -> None:
    def mine(signum: int, frame: Any) -> None: ...

    seen: list[Any] = []
    before = signal.signal(signal.SIGINT, mine)
    try:
        look = At("on_step_begin", 1, lambda: seen.append(signal.getsignal(signal.SIGINT)))
        trainer_of(routed(), tmp_path, max_steps=1, save_strategy="no", callbacks=[look]).train()
        assert seen == [mine]
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def saved_routers(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def test_a_loss_that_is_not_finite_keeps_the_last_good_step(tmp_path: Path) -> None:
    model, data = routed(), rows(16)
    for row in data:
        row["input_ids"][row["input_ids"] == VOCAB_SIZE - 1] = 5
    data[9]["input_ids"][3] = VOCAB_SIZE - 1  # in the third batch
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB_SIZE - 1] = float("nan")  # type: ignore[operator, union-attr]
    trainer = trainer_of(model, tmp_path, data, save_steps=100)
    with pytest.raises(
        TrainingError, match=r"loss became nan .* in step 3; step 2 is saved in .*learning_rate"
    ):
        trainer.train()
    saved = saved_routers(tmp_path / "checkpoint-2")
    assert saved
    now = {name.replace(".default", ""): p for name, p in trainable(model).items()}
    assert all(torch.equal(saved[name], now[name]) for name in saved)
    assert all(p.isfinite().all() for p in saved.values())
    assert last_complete_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-2"


def test_a_gradient_that_is_not_finite_never_reaches_the_routers(tmp_path: Path) -> None:
    model = routed()
    trainer = trainer_of(model, tmp_path, save_steps=100)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda g: g * float("nan") if trainer.state.global_step == 4 else g)
    with pytest.raises(TrainingError, match=r"gradient is not finite in step 5; step 4 is saved"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainable(model).values())
    assert all(p.isfinite().all() for p in saved_routers(tmp_path / "checkpoint-4").values())


# ---- checkpoints ----


def test_a_checkpoint_holds_the_routers_only(tmp_path: Path) -> None:
    model = routed()
    trainer_of(model, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-8"
    assert sum(p.numel() for p in saved_routers(checkpoint).values()) == 4 * (32 + 1)
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 60_000
    state = json.loads((checkpoint / "router_trainer_state.json").read_text())["running_kept"]
    assert state["possible"] == 4 * 4 * 12  # of the last step: layers, rows, tokens
    assert not list(checkpoint.glob("*.tmp"))


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    trainer_of(routed(), tmp_path).train()
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    begun: list[int] = []
    watch = [At("on_step_begin", step, partial(begun.append, step)) for step in range(1, 9)]
    trainer_of(routed(), tmp_path, callbacks=watch).train(resume_from_checkpoint=True)
    assert begun == [5, 6, 7, 8]


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        trainer_of(routed(), tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        trainer_of(routed(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "elsewhere"))


def test_a_damaged_running_mean_is_said(tmp_path: Path) -> None:
    trainer_of(routed(), tmp_path).train()
    (tmp_path / "checkpoint-8" / "router_trainer_state.json").write_text("{")
    with pytest.raises(TrainingError, match=r"router_trainer_state.json cannot be read"):
        trainer_of(routed(), tmp_path).train(resume_from_checkpoint=True)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing more than so many bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10, 300, 3000])
def test_a_full_disk_is_said_and_leaves_no_half_checkpoint(size: int, tmp_path: Path) -> None:
    trainer = trainer_of(routed(), tmp_path)
    with (
        no_file_above(size),
        pytest.raises(TrainingError, match=r"checkpoint of step 4 cannot be written .* free space"),
    ):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_folder_that_takes_no_files_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot write to the output folder"):
        trainer_of(routed(), tmp_path / "file" / "out")


# ---- what is refused ----


def test_a_plain_model_trains_without_checkpoints_only(tmp_path: Path) -> None:
    model = tiny_model().requires_grad_(False)
    attach(model, RoutingConfig(budget=0.7))
    with pytest.raises(ConfigError, match="get_peft_model"):
        trainer_of(model, tmp_path)
    before = trainable(model)
    trainer_of(model, tmp_path, save_strategy="no").train()
    assert not any(torch.equal(p, before[name]) for name, p in trainable(model).items())


def test_a_base_that_would_train_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    attach(model, RoutingConfig())
    with pytest.raises(ConfigError, match="freeze it"):
        trainer_of(model, tmp_path, save_strategy="no")


def test_routers_that_do_not_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no parameter trains"):
        trainer_of(routed().requires_grad_(False), tmp_path)


def test_a_model_without_routers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCallError, match="no routers"):
        trainer_of(tiny_model(), tmp_path)


def test_routers_that_are_off_are_said(tmp_path: Path) -> None:
    trainer = trainer_of(routed(), tmp_path)
    with trainer.routed.disable_adapter(), pytest.raises(TrainingError, match="switched off"):  # type: ignore[operator]
        trainer.train()


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match="RouterTrainingArguments, got TrainingArguments"):
        RouterTrainer(routed(), args, train_dataset=rows())


def test_lm_without_labels_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"needs labels, but the batch has only input_ids"):
        trainer_of(routed(), tmp_path, objective="lm").train()


@pytest.mark.parametrize(("field", "value"), [
    ("objective", "kl"), ("budget_weight", -1.0), ("budget_momentum", 1.0),
    ("anneal_fraction", 1.5), ("distill_positions", 0.0), ("bias_learning_rate", 0.0),
    ("cooldown_fraction", -0.1), ("warm_start", -1), ("threshold_range", -0.5),
    ("threshold_range", float("inf")), ("lm_weight", -0.1), ("lm_weight", float("nan")),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=field):
        RouterTrainingArguments(str(tmp_path), use_cpu=True, **{field: value})


@pytest.mark.parametrize("budget", [0.0, 1.2, float("nan")])
def test_budgets_out_of_range_are_refused(budget: float, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        RouterTrainingArguments(str(tmp_path), use_cpu=True, budget=budget)


def test_the_budget_is_the_arguments_or_the_configs(tmp_path: Path) -> None:
    assert trainer_of(routed(), tmp_path).budget == 0.7
    assert trainer_of(routed(), tmp_path, budget=0.5).budget == 0.5


# ---- what training leaves behind ----


def test_thresholds_of_the_old_routers_are_forgotten(tmp_path: Path) -> None:
    model = routed()
    config = routing_of(model).config
    config.calibration = [{"budget": 0.8, "threshold": 0.5}]
    config.default_budget = 0.8
    trainer_of(model, tmp_path, max_steps=1, save_strategy="no").train()
    assert (config.calibration, config.default_budget) == ([], None)


def test_the_models_use_of_a_cache_comes_back(tmp_path: Path) -> None:
    model = routed()
    assert model.config.use_cache is True
    trainer_of(model, tmp_path, max_steps=1, save_strategy="no").train()
    assert model.config.use_cache is True
