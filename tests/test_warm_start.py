"""Warm start: what the model owes to each unit, and what fresh routers make of it."""

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
from router_tuning.errors import TrainingError
from router_tuning.execution.context import dense, routers_of, routing_of
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.routers import scalar_bias
from router_tuning.training.optimizer import input_spread
from router_tuning.training.sensitivity import fit_log_mean, sensitivities
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.training.warm_start import is_fresh, warm_start
from router_tuning.units import decoder_layers, decoder_of
from tiny import FAMILIES, tiny_model, token_ids


def routed(family: str = "llama", **config: Any) -> Any:
    model = tiny_model(family)
    model.requires_grad_(False)
    attach(model, RoutingConfig(**{"kv": "all", **config}))
    return model


def inputs(rows: int = 2) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids} for ids in token_ids(rows, 16).split(1)]


def biases(model: Any) -> list[float]:
    found = [scalar_bias(router) for router in routers_of(model).values()]
    return [bias.item() for bias in found if bias is not None]


def unit_weight_information(model: Any, ids: Tensor, name: str, token: int) -> float:
    """The second derivative of KL(dense || with one unit's output at one token weighed w), at
    w = 1, by finite differences in float64.
    """
    unit = next(u for u in routing_of(model).units if u.name == name)
    module = decoder_layers(decoder_of(model))[unit.layer_idx].self_attn

    def logits(weight: float) -> Tensor:
        def weigh(module: Any, args: Any, output: Any) -> Any:
            weighed = output[0].clone()
            weighed[:, token] *= weight
            return (weighed, *output[1:])

        handle = module.register_forward_hook(weigh)  # type: ignore[union-attr]
        with torch.no_grad(), dense(model):
            found: Tensor = model(ids).logits.log_softmax(-1)
        handle.remove()
        return found

    plain, step = logits(1.0), 1e-3
    kl = [(plain.exp() * (plain - logits(1.0 + e))).sum() for e in (step, -step)]
    return float(sum(kl)) / step**2


def test_the_mean_square_is_the_curvature_of_the_divergence() -> None:
    model = routed(layers=[1, 2]).double()
    ids = token_ids(1, 6)
    draws = 400
    seen = sensitivities(model, [{"input_ids": ids}] * draws)
    for name, of_unit in seen.items():
        square_NT = torch.stack(of_unit.squares)
        for token in (0, 3):
            wanted = unit_weight_information(model, ids, name, token)
            spread = float(square_NT[:, token].std()) / math.sqrt(draws)
            assert float(square_NT[:, token].mean()) == pytest.approx(wanted, abs=5 * spread)
            assert 5 * spread < 0.6 * wanted  # else the comparison says nothing


def test_a_token_whose_key_would_be_lost_matters_more() -> None:
    kept, windowed, alike = (
        sensitivities(routed(**config), inputs(8))
        for config in ({"kv": "kept"}, {"kv": "kept", "kv_window": 16}, {"kv": "all"})
    )
    for name in alike:
        torch.testing.assert_close(
            torch.cat(windowed[name].squares),
            torch.cat(alike[name].squares),
            rtol=1e-2,
            atol=1e-5,
        )
        squares = [torch.cat(seen[name].squares) for seen in (kept, alike)]
        assert ((squares[0] / squares[1]).log().abs() > 0.1).float().mean() > 0.5
    # A first token sees itself only, but every later one sees its key.
    first = [torch.stack(seen["layers.0.attn"].squares)[:, 0].mean() for seen in (kept, alike)]
    assert first[0] > 2 * first[1]


def test_a_sink_keeps_its_keys_whatever_is_decided() -> None:
    kept, sink = (sensitivities(routed(kv="kept", kv_sink=n), inputs()) for n in (0, 2))
    last = list(kept)[-1]  # above it nothing differs
    squares = [torch.stack(seen[last].squares) for seen in (kept, sink)]
    assert (squares[0] != squares[1])[:, :2].all()
    assert torch.equal(squares[0][:, 2:], squares[1][:, 2:])


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_padding_says_nothing(granularity: str) -> None:
    pad = torch.nn.functional.pad
    rows, padded = inputs(), []
    for given in rows:
        ids = given["input_ids"]
        mask = pad(torch.ones_like(ids), (3, 2))
        padded.append({"input_ids": pad(ids, (3, 2)), "attention_mask": mask})
    seen = [
        sensitivities(routed(granularity=granularity, decide_after=5), batches)
        for batches in (rows, padded)
    ]
    for name, alone in seen[0].items():
        torch.testing.assert_close(torch.cat(seen[1][name].inputs), torch.cat(alone.inputs))
        torch.testing.assert_close(
            torch.cat(seen[1][name].squares), torch.cat(alone.squares), rtol=1e-3, atol=1e-6
        )


def test_a_sequence_shares_its_sensitivity_among_the_tokens_it_decides_for() -> None:
    model = routed(granularity="attn_sequence", decide_after=6)
    seen = sensitivities(model, [*inputs(3), {"input_ids": token_ids(1, 6)}])
    for of_unit in seen.values():  # the last row is over before anything is decided
        assert [len(x) for x in of_unit.inputs] == [1, 1, 1]
    one = routed(granularity="attn_token")
    tokens = sensitivities(one, inputs(3))
    for name in seen:
        # The square of a sum is not the sum of squares, but has much the same size.
        ratio = seen[name].mean() / tokens[name].mean()
        assert 0.02 < ratio < 50


def test_more_tokens_than_are_held_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_tuning.training.sensitivity.STORED_BYTES", 4 * 32 * 4 * 20)
    seen = sensitivities(routed(), inputs(4))  # 64 tokens of 4 units
    assert {sum(map(len, of_unit.inputs)) for of_unit in seen.values()} == {16}


def test_nothing_of_the_model_is_changed_or_left_behind() -> None:
    model = routed(kv="kept").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    sensitivities(model, inputs())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_the_fit_finds_a_mean_that_depends_on_the_input() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(4000, 6, generator=generator) * 3 + 1
    weights = torch.tensor([0.3, -0.2, 0.0, 0.0, 0.1, 0.0])
    square_N = torch.randn(4000, generator=generator).square() * (x_ND @ weights - 2).exp()
    found, bias = fit_log_mean(x_ND, square_N, ridge=1e-4)
    torch.testing.assert_close(found, weights, rtol=0, atol=0.03)
    assert bias == pytest.approx(-2, abs=0.1)
    shrunk, _ = fit_log_mean(x_ND, square_N)
    assert 0 < shrunk.norm() < found.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", ["all", "kept"])
def test_routers_start_in_the_order_of_their_units(family: str, kv: str) -> None:
    model = routed(family, kv=kv)
    seen: list[tuple[int, int]] = []
    assert is_fresh(model)
    means = warm_start(model, inputs(8), lambda *n: seen.append(n))
    assert not is_fresh(model)
    assert seen == [(done, 8) for done in range(1, 9)]
    with torch.no_grad(), record(model) as trace:
        for given in inputs(8):
            model(**given)
    assert trace.kept_fraction() > 0.75
    logits = [
        torch.cat([f.units[name].logits_BT.flatten() for f in trace.forwards]) for name in means
    ]
    # The log of a mean is above the mean of logs, by less than units differ here.
    wanted = [math.log(mean) for mean in means.values()]
    found = [float(part.mean()) for part in logits]
    spread = max(wanted) - min(wanted)
    for one in range(4):
        for other in range(4):
            if wanted[one] - wanted[other] > 0.5 * spread:
                assert found[one] > found[other]
    assert any(float(part.std()) > 0.01 for part in logits)  # tokens are told apart


@pytest.mark.parametrize("router", ["bottleneck", "bias"])
def test_routers_that_are_not_linear_get_their_units_mean(router: str) -> None:
    model = routed(router=router, init_bias=0.7)
    means = warm_start(model, inputs())
    rises = [bias - 0.7 for bias in biases(model)]
    logs = [math.log(mean) for mean in means.values()]
    assert min(rises) == pytest.approx(0.0, abs=1e-5)
    assert [r - rises[0] for r in rises] == pytest.approx([x - logs[0] for x in logs], abs=1e-4)
    ids = token_ids(1, 8)
    with torch.no_grad(), record(model) as trace:
        assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)
    assert trace.kept_fraction() == 1.0


@pytest.mark.parametrize("granularity", ["mlp_token", "block_token", "block_sequence"])
def test_units_of_every_kind_are_told_apart(granularity: str) -> None:
    model = routed(granularity=granularity, kv="kept", decide_after=4)
    means = warm_start(model, inputs(4))
    assert len(set(means.values())) == 4
    assert len(set(biases(model))) == 4


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
    warm_start(wanted, inputs(2), seed=42)
    trainer(tmp_path, model, warm_start=2).train()  # seed 42
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


def test_a_unit_that_overflows_matters_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed()
    seen = sensitivities(model, inputs())
    names = list(seen)
    for name in names[1:3]:
        seen[name].squares = [torch.full_like(part, math.inf) for part in seen[name].squares]
    monkeypatch.setattr(
        "router_tuning.training.warm_start.sensitivities", lambda *args, **options: seen
    )
    warm_start(model, inputs())
    assert biases(model)[1] == biases(model)[2] >= max(biases(model)[0], biases(model)[3])
    for of_unit in seen.values():
        of_unit.squares = [torch.full_like(part, math.nan) for part in of_unit.squares]
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


# ---- the steps of settled routers ----


def steps_of(optim: str, folder: Path) -> tuple[float, float]:
    """How far one step moves the weights of a router with a large gradient, and with a small one,
    for inputs of the same spread.
    """
    model = peft_model()
    made = trainer(folder, model, optim=optim, learning_rate=1e-2, lr_scheduler_type="constant")
    optimizer = made.create_optimizer()
    groups = [group for group in optimizer.param_groups if "divided_by" in group][:2]
    moved = []
    for group, size in zip(groups, (0.3, 3e-4), strict=True):
        (weight,) = group["params"]
        weight.grad = torch.full_like(weight, size * group["divided_by"])
        moved.append((weight, weight.detach().clone(), group["divided_by"]))
    optimizer.step()
    found = [
        float((weight - before).detach().abs().mean()) * spread for weight, before, spread in moved
    ]
    return found[0], found[1]


def test_a_router_whose_gradients_are_noise_stays_where_it_is(tmp_path: Path) -> None:
    unsettled, settled = steps_of("adamw_torch", tmp_path)
    assert unsettled == pytest.approx(1e-2, rel=0.15)
    assert settled == pytest.approx(1e-2 * 3e-4 / 0.03, rel=0.05)


def test_an_optimizer_without_an_epsilon_is_left_as_it_is(tmp_path: Path) -> None:
    unsettled, settled = steps_of("sgd", tmp_path)
    assert unsettled == pytest.approx(1000 * settled, rel=0.2)  # the spreads differ a little
