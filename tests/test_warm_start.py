"""Warm start: what the model loses without each unit, and what fresh routers make of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import IterableDataset

from laws import batch
from router_tuning import RoutingConfig, attach, record
from router_tuning.baselines import StaticDrop
from router_tuning.errors import TrainingError
from router_tuning.execution.context import decided_by, routers_of, routing_of
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.routers import scalar_bias
from router_tuning.training.optimizer import input_spread
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.training.warm_start import harm_without, is_fresh, warm_start
from router_tuning.units import decoder_layers, decoder_of
from tiny import FAMILIES, tiny_model, token_ids


def routed(family: str = "llama", **config: Any) -> Any:
    model = tiny_model(family)
    model.requires_grad_(False)
    # Every key stays visible, so the first token is nothing special, but where a test says so.
    attach(model, RoutingConfig(**{"kv": "all", **config}))
    return model


def inputs(rows: int = 2) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids} for ids in token_ids(rows, 16).split(1)]


def biases(model: Any) -> list[float]:
    found = [scalar_bias(router) for router in routers_of(model).values()]
    return [bias.item() for bias in found if bias is not None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_harm_is_the_divergence_of_a_model_without_the_unit(family: str, granularity: str) -> None:
    model, given = routed(family, granularity=granularity, layers=[1, 3]), batch(padded=True)
    batches = [
        {"input_ids": given.ids[:1], "attention_mask": given.mask[:1]},
        {"input_ids": given.ids[1:], "attention_mask": given.mask[1:], "labels": given.ids[1:]},
    ]
    harm = harm_without(model, batches)
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
    # Two rows: dense, then without layers 0..3 in turn.
    assert ran == [2 * times for times in (2, 3, 4, 5)]


@pytest.mark.parametrize("router", ["linear", "bottleneck", "bias"])
def test_routers_stay_neutral_and_are_ordered_by_harm(router: str) -> None:
    model = routed(router=router, init_bias=0.7)  # which float32 holds no better than float64
    seen: list[tuple[int, int]] = []
    assert is_fresh(model)
    harm = warm_start(model, inputs(), lambda *n: seen.append(n))
    assert not is_fresh(model)
    assert seen == [(done, 8) for done in range(1, 9)]
    raised = biases(model)
    assert min(raised) == pytest.approx(0.7)
    by_harm = sorted(range(4), key=list(harm.values()).__getitem__)
    assert by_harm == sorted(range(4), key=lambda i: (raised[i], list(harm.values())[i]))
    high, low = max(harm.values()), torch.tensor(list(harm.values())).log().quantile(0.1).exp()
    assert max(raised) - 0.7 == pytest.approx(float(torch.log(high / low)), rel=1e-3)
    ids = token_ids(1, 8)
    with torch.no_grad(), record(model) as trace:
        assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)
    assert trace.kept_fraction() == 1.0


@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_where_its_key_would_be_lost_the_first_token_is_favoured(
    granularity: str, padding: str
) -> None:
    model, alike = (routed(granularity=granularity, kv=kv) for kv in ("kept", "all"))
    batches = inputs()
    if padding == "left":
        pad = torch.nn.functional.pad
        real = pad(torch.ones(1, 16, dtype=torch.long), (3, 0))
        batches = [
            {"input_ids": pad(given["input_ids"], (3, 0)), "attention_mask": real}
            for given in batches
        ]
    for one in (model, alike):
        warm_start(one, batches)
    logits = []
    for one in (model, alike):
        with torch.no_grad(), record(one) as trace:
            for given in batches:
                one(**given)
        assert trace.kept_fraction() > 0.8
        parts = [f.units[n].logits_BT[f.real_BT] for f in trace.forwards for n in trace.unit_names]
        logits.append(torch.stack(parts).view(len(batches), 4, 16))
    risen = logits[0] - logits[1]
    first, others = risen[:, :, 0].mean(0), risen[:, :, 1:]
    assert first.min() > 0.5  # 4 in a wide model, where the others do not scatter
    assert first.max() < 4.001
    torch.testing.assert_close(others.mean((0, 2)), torch.zeros(4), rtol=0, atol=1e-3)
    assert (others.transpose(0, 1).flatten(1).std(1, correction=0) < 0.5001).all()


@pytest.mark.parametrize(
    "config", [{"kv": "kept", "kv_sink": 1}, {"granularity": "mlp_token", "kv": "kept"}]
)
def test_where_its_key_is_not_lost_the_first_token_is_as_any(config: dict[str, Any]) -> None:
    model = routed(**config)
    warm_start(model, inputs())
    for router in routers_of(model).values():
        assert not router.score.weight.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("router", ["bias", "bottleneck"])
def test_routers_that_are_not_linear_cannot_favour_the_first_token(router: str) -> None:
    model, alike = (routed(router=router, kv=kv) for kv in ("kept", "all"))
    for one in (model, alike):
        warm_start(one, inputs())
    assert biases(model) == pytest.approx(biases(alike))


def trainer(folder: Path, model: Any, data: Any = None, **options: Any) -> RouterTrainer:
    """A quiet trainer whose steps are too short to be seen."""
    defaults: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.0,
        "bias_learning_rate": 1e-9,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = RouterTrainingArguments(str(folder), **{**defaults, **options})
    rows = [{"input_ids": ids} for ids in token_ids(4, 16)]
    data = rows if data is None else data
    return RouterTrainer(model, arguments, train_dataset=data, eval_dataset=rows)


def peft_model(**config: Any) -> Any:
    return get_peft_model(tiny_model("llama"), RouterTuningConfig(**config))


def test_a_trainer_warms_fresh_routers_only(tmp_path: Path) -> None:
    model = peft_model()
    wanted = routed(kv="kept")
    warm_start(wanted, inputs(2))
    trainer(tmp_path, model, warm_start=2).train()
    assert biases(model) == pytest.approx(biases(wanted), abs=1e-5)
    trainer(tmp_path, model, warm_start=2).train()  # they have learned something now
    assert biases(model) == pytest.approx(biases(wanted), abs=1e-5)


def test_a_warm_start_can_be_left_out(tmp_path: Path) -> None:
    model = peft_model()
    trainer(tmp_path, model, warm_start=0).train()
    assert biases(model) == pytest.approx([1.0] * 4, abs=1e-5)


def test_rows_of_different_lengths_are_looked_at_one_by_one(tmp_path: Path) -> None:
    rows = [{"input_ids": ids} for n in (5, 9, 7) for ids in token_ids(1, n)]
    model = peft_model()
    trainer(tmp_path, model, rows, per_device_train_batch_size=1).train()
    assert max(biases(model)) > 1.1


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([{"input_ids": ids} for ids in token_ids(4, 16)])


def test_a_stream_warms_too(tmp_path: Path) -> None:
    model, plain = peft_model(), peft_model()
    trainer(tmp_path, model, Stream()).train()
    trainer(tmp_path, plain).train()
    assert biases(model) == pytest.approx(biases(plain), abs=1e-5)


def test_columns_that_the_trainer_drops_are_dropped(tmp_path: Path) -> None:
    rows = [
        {"input_ids": ids, "note": torch.zeros(n)}
        for n, ids in enumerate(token_ids(4, 16), start=1)
    ]
    model = routed()
    trainer(tmp_path, model, rows, remove_unused_columns=True).train()
    assert max(biases(model)) > 1.1


def test_without_token_ids_there_is_no_warm_start(tmp_path: Path) -> None:
    model = peft_model()
    embedded = model.get_input_embeddings()(token_ids(4, 16)).detach()
    rows = [{"inputs_embeds": x, "attention_mask": torch.ones(16).long()} for x in embedded]
    trainer(tmp_path, model, rows).train()
    assert biases(model) == pytest.approx([1.0] * 4, abs=1e-5)


def test_without_data_the_trainer_says_so(tmp_path: Path) -> None:
    made = trainer(tmp_path, peft_model())
    made.train_dataset = None
    with pytest.raises(ValueError, match="requires a train_dataset"):
        made.train()


def test_frozen_biases_are_left_alone(tmp_path: Path) -> None:
    model = peft_model()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(False)
    trainer(tmp_path, model).train()
    assert all(p.item() == 1.0 for n, p in model.named_parameters() if n.endswith("score.bias"))


def test_what_overflows_without_a_unit_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed()
    harms = [1.0, math.nan, 2.0, math.inf]
    names = [unit.name for unit in routing_of(model).units]
    monkeypatch.setattr(
        "router_tuning.training.warm_start.harm_without",
        lambda *args: dict(zip(names, harms, strict=True)),
    )
    warm_start(model, inputs())
    assert biases(model)[1] == biases(model)[2] == biases(model)[3] > biases(model)[0] == 1.0
    harms[:] = [math.nan] * 4
    with pytest.raises(TrainingError, match="first training rows"):
        warm_start(model, inputs())


# ---- the spread of inputs ----


def test_the_spread_is_that_of_the_real_tokens() -> None:
    model, given = routed(), batch(padded=True)
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            seen[index] = output

        return hook

    for index, layer in enumerate(decoder_layers(decoder_of(model))):
        layer.input_layernorm.register_forward_hook(keep(index))  # type: ignore[union-attr]
    found = input_spread(model, [{"input_ids": given.ids, "attention_mask": given.mask}])
    for index, spread in enumerate(found.values()):
        x_ND = seen[index][given.real]
        assert spread == pytest.approx(float((x_ND - x_ND.mean(0)).square().mean().sqrt()))
    assert len(found) == 4


def test_one_and_the_same_token_gives_no_endless_steps() -> None:
    same = [{"input_ids": torch.full((1, 16), 5)}]
    rows = [*same, *inputs(1)]
    assert min(input_spread(routed(), rows).values()) > 0.05
    model = routed()
    norm = decoder_layers(decoder_of(model))[1].input_layernorm
    norm.weight.data.zero_()  # type: ignore[union-attr, operator]
    found = list(input_spread(model, inputs()).values())
    assert found[1] == pytest.approx(0.01 * statistics.median([found[0], *found[2:]]), rel=0.2)
    assert input_spread(routed(), []) == {}


@pytest.mark.parametrize(
    ("config", "options", "shown"),
    [
        ({}, {"learning_rate": 1e-3}, 1e-3),
        ({}, {"learning_rate": 0.0}, 0.0),
        ({"router": "bias"}, {"bias_learning_rate": 0.05}, 0.05),
        (
            {},
            {
                "learning_rate": 1e-3,
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "eval_strategy": "steps",
            },
            1e-3,
        ),
    ],
)
def test_the_log_shows_the_learning_rate_of_the_arguments(
    config: dict[str, Any], options: dict[str, Any], shown: float, tmp_path: Path
) -> None:
    made = trainer(tmp_path, peft_model(**config), cooldown_fraction=0.0, **options)
    made.train()
    assert made.state.log_history[0]["learning_rate"] == pytest.approx(shown)


def test_an_optimizer_of_ones_own_is_logged_as_it_is(tmp_path: Path) -> None:
    model = peft_model()
    made = trainer(tmp_path, model, cooldown_fraction=0.0)
    made.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    made.train()
    assert made.state.log_history[0]["learning_rate"] == pytest.approx(1e-4)
