"""Warm start: what the model loses without each unit, and what fresh routers make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from laws import batch
from router_tuning import RoutingConfig, attach, record
from router_tuning.baselines import StaticDrop
from router_tuning.execution.context import decided_by, routers_of
from router_tuning.peft_tuner import RouterTuningConfig
from router_tuning.routers import scalar_bias
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.training.warm_start import harm_without, is_fresh, warm_start
from router_tuning.units import decoder_layers, decoder_of
from tiny import FAMILIES, tiny_model, token_ids


def routed(family: str = "llama", **config: Any) -> Any:
    model = tiny_model(family)
    model.requires_grad_(False)
    attach(model, RoutingConfig(**config))
    return model


def inputs(rows: int = 2) -> dict[str, Tensor]:
    return {"input_ids": token_ids(rows, 16)}


def biases(model: Any) -> list[float]:
    return [scalar_bias(router).item() for router in routers_of(model).values()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_harm_is_the_divergence_of_a_model_without_the_unit(family: str, granularity: str) -> None:
    model, given = routed(family, granularity=granularity, layers=[1, 3]), batch(padded=True)
    harm = harm_without(model, {"input_ids": given.ids, "attention_mask": given.mask})
    dense = tiny_model(family)
    for name, found in harm.items():
        with torch.no_grad():
            teacher = dense(given.ids, attention_mask=given.mask).logits.log_softmax(-1)
            with decided_by(model, StaticDrop([name])):
                student = model(given.ids, attention_mask=given.mask).logits.log_softmax(-1)
        kl_BT = (teacher.exp() * (teacher - student)).sum(-1)
        assert found == pytest.approx(float(kl_BT[given.real].mean()), rel=1e-3)
    assert list(harm) == ["layers.1.attn", "layers.3.attn"]


def test_layers_below_a_unit_run_once() -> None:
    model = routed()
    ran = [0] * 4

    def count(index: int) -> Any:
        def hook(*args: Any) -> None:
            ran[index] += 1

        return hook

    for index, layer in enumerate(decoder_layers(decoder_of(model))):
        layer.mlp.register_forward_hook(count(index))  # type: ignore[union-attr]
    harm_without(model, inputs())
    # Dense and entering states in two forwards, then without layers 0..3 in turn.
    assert ran == [3, 4, 5, 6]


@pytest.mark.parametrize("router", ["linear", "bottleneck", "bias"])
def test_routers_stay_neutral_and_are_ordered_by_harm(router: str) -> None:
    model = routed(router=router, init_bias=0.5)
    seen: list[tuple[int, int]] = []
    assert is_fresh(model)
    harm = warm_start(model, inputs(), lambda *n: seen.append(n))
    assert not is_fresh(model)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    raised = biases(model)
    assert min(raised) == pytest.approx(0.5)
    by_harm = sorted(range(4), key=list(harm.values()).__getitem__)
    assert by_harm == sorted(range(4), key=lambda i: (raised[i], list(harm.values())[i]))
    high, low = max(harm.values()), torch.tensor(list(harm.values())).log().quantile(0.1).exp()
    assert max(raised) - 0.5 == pytest.approx(float(torch.log(high / low)), rel=1e-3)
    ids = token_ids(1, 8)
    with torch.no_grad(), record(model) as trace:
        assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)
    assert trace.kept_fraction() == 1.0


def trainer(folder: Path, model: Any, **options: Any) -> RouterTrainer:
    arguments = RouterTrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        learning_rate=0.0,
        bias_learning_rate=1e-9,
        save_strategy="no",
        **options,
    )
    rows = [{"input_ids": ids} for ids in token_ids(4, 16)]
    return RouterTrainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]


def test_a_trainer_warms_fresh_routers_only(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), RouterTuningConfig())
    wanted = routed()
    warm_start(wanted, inputs(2))
    trainer(tmp_path, model, warm_start=2).train()
    assert biases(model) == pytest.approx(biases(wanted), abs=1e-5)
    trainer(tmp_path, model, warm_start=2).train()  # they have learned something now
    assert biases(model) == pytest.approx(biases(wanted), abs=1e-5)


def test_a_warm_start_can_be_left_out(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), RouterTuningConfig())
    trainer(tmp_path, model, warm_start=0).train()
    assert biases(model) == pytest.approx([1.0] * 4, abs=1e-5)
