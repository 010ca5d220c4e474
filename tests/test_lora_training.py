"""LoRA trains with the routers of its adapter: towards the base model, and exactly resumed."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from router_tuning.adapter_folder import load_adapter
from router_tuning.errors import ConfigError
from router_tuning.execution.context import dense, record, replay, routers_of
from router_tuning.lora import lora_layers, lora_parameters
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.training.arguments import RouterTrainingArguments
from router_tuning.training.shared_prefix import capture_prefix, reuse_prefix, shared_layers
from router_tuning.training.warm_start import warm_start
from router_tuning.units import decoder_layers, decoder_of
from test_trainer import (
    SAME,
    batch_of,
    gradients,
    logged,
    rows,
    trainable,
    trainer_of,
)
from tiny import checkpoint_activations, tiny_model, token_ids

# PEFT 0.21 asks transformers 5.24 for it whenever a PeftModel is made.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def fresh(family: str = "llama", **fields: Any) -> PeftModel:
    """A model with a fresh adapter: LoRA that adds nothing yet."""
    torch.manual_seed(0)
    lora = {"r": 4, "target_modules": TARGETS, **fields.pop("lora", {})}
    return get_peft_model(
        tiny_model(family), RouterTuningConfig(**{"budget": 0.7, "lora": lora, **fields})
    )


def stirred(model: PeftModel) -> PeftModel:
    """Give LoRA random weights; the routers stay fresh."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


@torch.no_grad()
def log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids).logits
    return logits.log_softmax(-1)


@pytest.mark.parametrize("objective", ["distill", "lm"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_routers_and_lora_move_and_the_base_does_not(
    family: str, objective: str, tmp_path: Path
) -> None:
    targets = ["query_key_value", "dense"] if family == "gpt_neox" else TARGETS
    model = fresh(family, lora={"target_modules": targets, "lora_dropout": 0.1})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = set(trainable(model))
    trainer_of(model, tmp_path, rows(labels=True), objective=objective, save_strategy="no").train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names
    assert {n.split(".")[-3] for n in names} == {"lora_A", "lora_B", "default"}
    with model.disable_adapter(), torch.no_grad():
        expected = tiny_model(family)(token_ids()).logits
        assert torch.equal(model.eval()(token_ids()).logits, expected)


def test_lora_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    model = fresh()
    trainer = trainer_of(model, tmp_path, lora_learning_rate=3e-4, weight_decay=0.1)
    *_, group = trainer.create_optimizer().param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in lora_parameters(model)}
    assert len(group["params"]) == 2 * len(lora_layers(model))
    assert (group["lr"], group["weight_decay"], group["eps"]) == (3e-4, 0.0, 1e-8)
    assert RouterTrainingArguments(output_dir=str(tmp_path)).lora_learning_rate == 2e-4
    with pytest.raises(ConfigError, match="lora_learning_rate must be above 0"):
        RouterTrainingArguments(output_dir=str(tmp_path), lora_learning_rate=0.0)


def test_a_base_that_would_train_beside_lora_is_refused(tmp_path: Path) -> None:
    model = fresh()
    model.get_base_model().lm_head.requires_grad_(True)
    with pytest.raises(ConfigError, match="1 tensors of the base model would train"):
        trainer_of(model, tmp_path)


def test_the_teacher_is_the_base_model_without_lora(tmp_path: Path) -> None:
    model, batch = stirred(fresh()), batch_of(rows(4))
    trainer = trainer_of(model, tmp_path, save_strategy="no")
    metrics = trainer.evaluate(rows(4))
    with record(model) as trace:
        student = log_probs(model, batch["input_ids"])
    assert trace.kept_fraction() == 1.0
    teacher = log_probs(tiny_model(), batch["input_ids"])
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
    assert metrics["eval_loss"] == pytest.approx(divergence, rel=1e-4)
    assert divergence > 0.1


def test_lm_trains_lora_on_the_labels(tmp_path: Path) -> None:
    model, held_out = stirred(fresh()), rows(4, seed=9, labels=True)
    metrics = trainer_of(model, tmp_path, objective="lm", save_strategy="no").evaluate(held_out)
    with torch.no_grad():
        loss = model(**batch_of(held_out)).loss.item()
        with dense(model):
            assert abs(model(**batch_of(held_out)).loss.item() - loss) > 0.01
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_lora_makes_up_for_what_is_skipped(tmp_path: Path) -> None:
    """The loss at the same budget is lower than that of routers alone."""
    losses = {}
    for lora in ({"r": 4, "target_modules": TARGETS}, None):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), RouterTuningConfig(budget=0.7, lora=lora))
        folder, steps = tmp_path / str(lora is None), {"max_steps": 60, "lora_learning_rate": 1e-2}
        trainer = trainer_of(model, folder, rows(16, 24), save_strategy="no", **steps)
        trainer.train()
        last = logged(trainer, "task_loss", "kept")[-10:]
        assert sum(kept for _, kept in last) / 10 == pytest.approx(0.7, abs=0.05)
        losses[lora is None] = sum(loss for loss, _ in last) / 10
    assert losses[False] < 0.8 * losses[True]


@pytest.mark.parametrize(
    "fields",
    [{}, {"objective": "lm", "gradient_accumulation_steps": 2}, {"threshold_range": 2.0}],
    ids=["distill", "lm", "ranges"],
)
def test_resuming_gives_the_losses_of_an_uninterrupted_run(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    """Dropout and all, to the last bit."""

    def trainer(folder: str) -> Any:
        model = fresh(lora={"lora_dropout": 0.2})
        return trainer_of(
            model, tmp_path / folder, rows(20, labels=True), lora_learning_rate=1e-2, **fields
        )

    whole = trainer("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    part = trainer("part")
    stirred(part.routed)  # what the checkpoint does not bring back would show
    part.train(resume_from_checkpoint=True)
    assert part.state.global_step == 8
    assert logged(part, *SAME) == logged(whole, *SAME)
    ours, theirs = trainable(part.routed), trainable(whole.routed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    loaded = load_adapter(tmp_path / "whole" / "checkpoint-8", tiny_model())
    with torch.no_grad():
        whole.routed.eval()
        assert torch.equal(loaded(token_ids()).logits, whole.routed(token_ids()).logits)


def test_a_checkpoint_holds_routers_and_lora_only(tmp_path: Path) -> None:
    trainer_of(fresh(), tmp_path).train()
    saved = load_file(tmp_path / "checkpoint-8" / "adapter_model.safetensors")
    assert len(saved) == 4 * 2 + 4 * len(TARGETS) * 2


def test_checkpointing_activations_changes_no_gradient(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = stirred(fresh(lora={"lora_dropout": 0.0}))
        if checkpointing:
            checkpoint_activations(model.get_base_model(), {"use_reentrant": False})
        found.append(gradients(trainer_of(model, tmp_path), batch_of(rows(4))))
    assert any("lora_A" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_routers_start_from_what_the_model_with_lora_needs() -> None:
    batches = [{"input_ids": ids[None]} for ids in token_ids(4, 24)]
    plain, model = fresh(lora={"lora_dropout": 0.5}), stirred(fresh(lora={"lora_dropout": 0.5}))
    before = [p.clone() for p in lora_parameters(model)]
    means, plain_means = warm_start(model.train(), batches), warm_start(plain.train(), batches)
    assert all(mean > 0 for mean in means.values())
    assert means != plain_means
    assert warm_start(stirred(fresh()), batches) == means  # there is no dropout in it
    assert all(torch.equal(p, old) for p, old in zip(lora_parameters(model), before, strict=True))
    assert all(p.requires_grad and p.grad is None for p in lora_parameters(model))
    weights = [router.keep_logits["default"].score.weight for router in routers_of(model).values()]  # type: ignore[union-attr, index]
    assert all(weight.any() for weight in weights)


@pytest.mark.parametrize(("lora_layer", "shared"), [(3, 2), (1, 1), (0, 0)])
def test_layers_are_shared_below_routers_and_lora(lora_layer: int, shared: int) -> None:
    """Frozen LoRA too: it is off in the first of the two passes."""
    model = stirred(fresh(layers=[2, 3], lora={"layers_to_transform": [lora_layer]})).eval()
    model.requires_grad_(False)
    ids = token_ids()
    expected = log_probs(model, ids)
    assert shared_layers(model) == decoder_layers(decoder_of(model))[:shared]
    with dense(model), capture_prefix(model) as prefix:
        log_probs(model, ids)
    with reuse_prefix(prefix):
        assert torch.equal(log_probs(model, ids), expected)


def test_a_gradient_of_the_budget_and_the_task_reaches_lora(tmp_path: Path) -> None:
    model = stirred(fresh())
    found = gradients(trainer_of(model, tmp_path), batch_of(rows(4)))
    assert all(g.any() for name, g in found.items() if ".lora_" in name)


def test_hidden_keys_of_training_give_no_gradient_to_lora() -> None:
    """The second call, which weighs skipped keys, is for the routers' decisions alone."""

    def of_lora(decisions: Any) -> list[Tensor]:
        with record(model) as trace, contextlib.ExitStack() as stack:
            if decisions is not None:
                stack.enter_context(replay(model, decisions))
            model(ids, use_cache=False).logits.square().mean().backward()
        traces.append(trace)
        found = [p.grad for p in lora_parameters(model)]
        model.zero_grad()
        return [gradient for gradient in found if gradient is not None]

    # The one router reads what its own layer's LoRA has no part in, so its gradient adds nothing.
    layer = {"layers_to_transform": [1], "target_modules": ["q_proj", "k_proj", "v_proj"]}
    model = stirred(fresh(kv="kept", layers=[1], lora=layer))
    (router,) = routers_of(model).values()
    for name, parameter in router.named_parameters():
        torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    ids, traces = token_ids(2, 12), []
    deciding = of_lora(None)
    assert 0.1 < traces[0].kept_of_routed() < 0.9
    replayed = of_lora(traces[0].decisions())
    assert len(deciding) == len(replayed) == 6
    assert all(gradient.any() for gradient in deciding)
    for ours, theirs in zip(deciding, replayed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert all(p.requires_grad for p in lora_parameters(model))
