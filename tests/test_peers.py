"""How others train routers (benchmarks/peers.py), and the benchmark that measures it."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peers
import peers_quality
import pytest
import quality
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from router_tuning import RoutingConfig, attach, decided_by, dense, record
from router_tuning.data import Windows
from router_tuning.execution.context import routers_of
from router_tuning.record import ForwardRecord, UnitRecord
from router_tuning.routers import input_weight
from tiny import SENTENCES, tiny_model, tiny_tokenizer, token_ids

ROOT = Path(__file__).parents[1]
Rows = list[dict[str, Tensor]]


def routed(family: str = "llama", **config: Any) -> Any:
    """A frozen model with fresh routers."""
    model = tiny_model(family).requires_grad_(False)
    attach(model, RoutingConfig(**{"kv": "all", **config}))
    return model


def ranked(family: str = "llama", **config: Any) -> Any:
    torch.manual_seed(0)
    model = routed(family, **config)
    peers.weigh_by_routers(model)
    return model


def rows(number: int = 8, length: int = 12) -> Rows:
    return [{"input_ids": ids, "labels": ids} for ids in token_ids(number, length)]


def told(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        **more,
    }


def mixture(trainer: type, model: Any, folder: Path, **more: Any) -> Any:
    given = told(folder, **{"objective": "lm", "budget": 0.5, "anneal_fraction": 0.0, **more})
    return trainer(model, peers.AllWeightsArguments(**given), train_dataset=rows())


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, bool]:
    return {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}


# Who decides


@pytest.mark.parametrize("unit", ["attn_token", "block_token"])
def test_top_k_keeps_exactly_k_tokens_of_each_sequence_those_with_the_largest_logits(
    unit: str,
) -> None:
    model, ids = ranked(granularity=unit).train(), token_ids(3, 20)
    logits: dict[str, Tensor] = {}
    for name, router in routers_of(model).items():
        router.register_forward_hook(lambda r, a, out, name=name: logits.update({name: out}))
    with decided_by(model, peers.TopK(0.35)), record(model) as trace:
        model(ids, labels=ids).loss.backward()
    for name, keep_BT in trace.decisions().items():
        assert keep_BT.sum(1).tolist() == [7, 7, 7]
        for keep_T, logits_T in zip(keep_BT, logits[name], strict=True):
            assert logits_T[keep_T].min() > logits_T[~keep_T].max()
    for router in routers_of(model).values():
        assert input_weight(router).grad.any()


@pytest.mark.parametrize("kv", ["all", "kept"])
def test_thresholds_at_the_routers_own_decide_as_the_routers_do(kv: str) -> None:
    model, ids = ranked(kv=kv), token_ids(3, 20)
    with torch.no_grad(), record(model) as own:
        logits = model(ids).logits
    at = peers.Thresholds(dict.fromkeys(routers_of(model), 0.0))
    with torch.no_grad(), decided_by(model, at), record(model) as given:
        assert torch.equal(model(ids).logits, logits)
    assert 0.2 < own.kept_fraction() < 0.8
    assert given.kept_fraction() == own.kept_fraction()


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("unit", ["attn_token", "block_token"])
def test_what_a_unit_gives_is_weighed_with_twice_the_sigmoid_of_its_logits(
    family: str, unit: str
) -> None:
    model, ids = ranked(family, granularity=unit, layers=[1]), token_ids(2, 8)
    (router,) = routers_of(model).values()
    nn.init.zeros_(input_weight(router))

    def logits(of_router: float, threshold: float) -> Tensor:
        router.score.bias.data.fill_(of_router)
        at = peers.Thresholds(dict.fromkeys(routers_of(model), threshold))
        with torch.no_grad(), decided_by(model, at):
            return model(ids).logits

    with torch.no_grad(), dense(model):
        untouched = model(ids).logits
    assert torch.equal(logits(0.0, threshold=-1.0), untouched)
    skipped = logits(0.0, threshold=1.0)
    assert not torch.allclose(skipped, untouched, atol=1e-2)
    torch.testing.assert_close(logits(-50.0, threshold=-60.0), skipped)
    assert not torch.allclose(logits(1.0, threshold=-1.0), untouched, atol=1e-2)


# Mixture of depths


def test_top_k_keeps_its_share_in_every_step_and_moves_all_weights(tmp_path: Path) -> None:
    model = ranked()
    before = copied(model)
    trainer = mixture(
        peers.TopKTrainer, model, tmp_path, warm_start=0, threshold_range=0.0, budget_weight=0.0
    )
    trainer.train()
    assert [entry["kept"] for entry in trainer.state.log_history if "kept" in entry] == [0.5] * 4
    changed = moved(model, before)
    still = {name for name, was_moved in changed.items() if not was_moved}
    assert still == {name for name in changed if name.endswith("score.bias")}


def test_top_k_begins_with_everything_and_comes_down_to_its_budget(tmp_path: Path) -> None:
    more = {"warm_start": 0, "threshold_range": 0.0, "budget_weight": 0.0, "anneal_fraction": 0.5}
    trainer = mixture(peers.TopKTrainer, ranked(), tmp_path, **more)
    trainer.train()
    kept = [entry["kept"] for entry in trainer.state.log_history if "kept" in entry]
    assert kept == [1.0, 0.75, 0.5, 0.5]


def test_a_mixture_by_threshold_moves_all_weights_and_keeps_less(tmp_path: Path) -> None:
    model = routed()
    before = copied(model)
    trainer = mixture(peers.ThresholdTrainer, model, tmp_path, max_steps=12)
    trainer.train()
    assert all(moved(model, before).values())
    kept = [entry["kept"] for entry in trainer.state.log_history if "kept" in entry]
    assert kept[-1] < kept[0]
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0}  # cooled down


def test_weights_have_one_learning_rate_of_their_own(tmp_path: Path) -> None:
    model = routed()
    before = copied(model)
    mixture(peers.ThresholdTrainer, model, tmp_path, weights_learning_rate=0.0).train()
    changed = {name for name, was_moved in moved(model, before).items() if was_moved}
    assert changed == {name for name in before if "skip_router" in name}


def test_what_was_trained_under_autocast_is_measured_in_float32(tmp_path: Path) -> None:
    ids = token_ids(2, 16)
    windows = Windows(ids, torch.ones_like(ids, dtype=torch.bool))
    dense_loss = quality.losses_of(tiny_model(), windows)
    model = routed()
    mixture(peers.ThresholdTrainer, model, tmp_path, weights_learning_rate=0.0, bf16=True).train()
    everything = peers.Thresholds(dict.fromkeys(routers_of(model), -math.inf))
    row = peers_quality._row(model.eval(), windows, everything, dense_loss)
    assert row["loss_over_dense"] == row["answer_loss_over_dense"] == 0


def test_a_clock_ends_a_training_and_foresees_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(peers, "perf_counter", lambda: now)
    clock = peers.Clock(10.0)
    now = 2.0  # a warm start
    state = SimpleNamespace(global_step=0, max_steps=10**9)
    control = SimpleNamespace(should_training_stop=False)
    clock.on_train_begin(None, state, control)
    foreseen = []
    while not control.should_training_stop:
        now += 1.5 if state.global_step < 2 else 1.0  # the first steps are slow
        state.global_step += 1
        clock.on_step_end(None, state, control)
        foreseen.append(state.max_steps)
        assert state.max_steps > state.global_step + 1  # else the Trainer would stop
    assert now == 10.0
    assert foreseen[0] == 5
    assert foreseen[-3] == state.global_step == 7


def test_a_training_with_a_clock_cools_down_by_what_is_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()  # a second a step
    monkeypatch.setattr(peers, "perf_counter", lambda: float(next(ticks)))
    more = {"max_steps": 10**9, "warm_start": 0, "learning_rate": 1.0, "cooldown_fraction": 0.25}
    trainer = mixture(peers.ThresholdTrainer, routed(), tmp_path, **more)
    trainer.add_callback(peers.Clock(9.0))  # and one second before the first
    trainer.train()
    assert trainer.state.global_step == 8
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == pytest.approx([1.0] * 7 + [0.5])


# The official recipe


def test_the_official_recipe_moves_routers_alone_which_have_no_bias(tmp_path: Path) -> None:
    layers = peers.official_layers(4)
    model = routed(layers=layers)
    peers.without_bias(model)
    with record(model) as trace, torch.no_grad():
        model(token_ids())
    assert trace.kept_fraction() == 1.0  # a logit of 0 is kept: sigmoid 0.5
    before = copied(model)
    args = TrainingArguments(**told(tmp_path), **{**OFFICIAL, "warmup_steps": 0})
    peers.OfficialTrainer(model, args, train_dataset=rows()).train()
    changed = {name for name, was_moved in moved(model, before).items() if was_moved}
    assert changed == {f"model.layers.{i}.skip_router_attn.score.weight" for i in layers}


OFFICIAL = {
    name: value
    for name, value in peers.OFFICIAL.items()
    if name not in ("per_device_train_batch_size", "gradient_accumulation_steps")
}


def test_the_official_layers_are_the_deepest_but_the_last() -> None:
    assert peers.official_layers(32) == list(range(15, 31))
    assert peers.official_layers(4) == [0, 1, 2]


def test_the_hinge_has_no_gradient_below_its_capacity() -> None:
    gates = {
        "below": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        "above": torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
    }
    real_BT = torch.ones(1, 4, dtype=torch.bool)
    forward = ForwardRecord(0, real_BT, False)
    for name, gate_BT in gates.items():
        gate_BT.requires_grad_()
        forward.units[name] = UnitRecord(gate_BT > 0.5, None, soft_BT=gate_BT)
    loss = peers.hinge(forward, capacity=0.5)
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    assert not gates["below"].grad.any()
    assert torch.equal(gates["above"].grad, torch.full((1, 4), 0.25))


def test_the_hinge_is_added_to_the_loss_of_the_labels(tmp_path: Path) -> None:
    model, batch = routed(), {"input_ids": token_ids(), "labels": token_ids()}
    losses = []
    for weight in (0.0, 0.1):
        args = TrainingArguments(**told(tmp_path))
        trainer = peers.OfficialTrainer(model, args, train_dataset=rows(), hinge_weight=weight)
        losses.append(trainer.compute_loss(model, batch).item())
    with torch.no_grad(), dense(model):
        assert losses[0] == pytest.approx(model(**batch).loss.item())
    assert losses[1] - losses[0] == pytest.approx(0.1 * 4 * (1 - 0.5), abs=1e-5)


# The benchmark


def files(folder: Path) -> list[str]:
    """A tiny model and texts, and the options that name them."""
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name, words, number in (("train", 0, 650), ("report", 3, 30)):
        said = [SENTENCES[(i + words) % 5] for i in range(number)]
        chats = ({"prompt": s, "response": s[::-1]} for s in said)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return [
        *("--model", str(folder / "base"), "--json", str(folder / "peers.json")),
        *("--train", str(folder / "train.jsonl"), "--report", f"r={folder / 'report.jsonl'}"),
        *("--static", "1", "--greedy-windows", "1", "--steps", "4", "--batch-size", "2"),
        *("--report-windows", "3", "--held-back-windows", "3", "--budgets", "0.9,0.6,0.2"),
        *(
            "--dtype",
            "bfloat16",
            "--argument",
            "warm_start=2",
            "--times",
            "2",
            "--samples",
            "128",
            "--threads",
            "1",
        ),
    ]


def test_several_times_a_time_want_a_time(tmp_path: Path) -> None:
    options = peers_quality._options([*files(tmp_path), "--methods", "mod_topk"])
    with pytest.raises(SystemExit, match="the file has none of seed 0; begin --methods with rout"):
        peers_quality._bounds(options, {"runs": []}, "mod_topk", seed=0)
    options.seconds = 60.0
    found = peers_quality._bounds(options, {"runs": []}, "mod_topk", seed=0)
    assert found == [{"max_steps": 4}, {"times": 2.0, "seconds": 120.0}]


@pytest.mark.slow
def test_peers_are_trained_measured_and_gone_on_with(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/peers_quality.py")]
    command += files(tmp_path)
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}

    def run(*more: str) -> dict[str, Any]:
        subprocess.run([*command, *more], check=True, env=environment)
        return dict(json.loads((tmp_path / "peers.json").read_text()))

    first = run()
    methods = [(run["method"], "seconds" in run["tuning"]) for run in first["runs"]]
    timed = [(name, late) for name in peers_quality.ALL_WEIGHTS for late in (False, True)]
    assert methods == [("routers", False), *timed, ("official", False), ("official_hinge", False)]
    found = dict(zip(methods, first["runs"], strict=True))
    for (method, is_timed), one in found.items():
        everything = one["everything_kept"]["r"]
        assert everything["kept_fraction"] == 1.0
        trains_all = method in peers_quality.ALL_WEIGHTS
        assert (everything["loss_over_dense"] != 0) == trains_all
        assert (one["trainable"] > one["parameters"]) == trains_all
        # Three layers of four are routed by the official recipe: it cannot skip as much.
        budgets = [row["budget"] for row in one["routed"]["r"]]
        assert budgets == ([0.9, 0.6] if method in peers_quality.OFFICIAL else [0.9, 0.6, 0.2])
        for row in one["routed"]["r"]:
            assert row["kept_fraction"] == pytest.approx(row["budget"], abs=0.1)
            over = row["loss"] - first["dense"]["r"]["loss"]
            assert row["loss_over_dense"] == pytest.approx(over)
        if is_timed:
            assert one["tuning"]["seconds"] == round(2 * found["routers", False]["seconds"], 1)
            bound = one["tuning"]["seconds"]
            assert 0.5 * bound < one["seconds"] < bound + 10
            assert one["steps"] != 4
        elif trains_all:
            assert one["steps"] == 4
            assert one["train_tokens"] == found["routers", False]["train_tokens"] == 4 * 2 * 256
    assert found["mod_topk", False]["as_trained"]["r"]["kept_fraction"] == 0.75
    assert found["official", False]["steps"] == 2
    assert found["official", False]["layers"] == [0, 1, 2]
    assert {"cosine", "greedy"} <= set(first["static"]["r"])

    stopped = {**first, "runs": first["runs"][:-1]}
    (tmp_path / "peers.json").write_text(json.dumps(stopped))
    again = run("--continue")
    assert again["runs"][:-1] == first["runs"][:-1]
    assert len(again["runs"]) == len(first["runs"])
    for part in ("everything_kept", "as_trained", "routed"):
        assert again["runs"][-1][part] == first["runs"][-1][part]
