"""Losses against torch's own cross entropy on whole logits; reports against runs made by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from router_tuning.attach import attach, set_budget
from router_tuning.baselines import RandomMask, StaticDrop, cosine_order, greedy_order
from router_tuning.calibration import calibrate_windows
from router_tuning.config import RoutingConfig
from router_tuning.cost import flops_fraction
from router_tuning.data import Windows
from router_tuning.errors import BudgetError, ConfigError, DataError, UnsupportedModelError
from router_tuning.evaluation import perplexity
from router_tuning.evaluation.perplexity import MEASURES, evaluate, window_loss
from router_tuning.execution.context import decided_by, dense, record
from router_tuning.peft_config import RouterTuningConfig
from tiny import VOCAB_SIZE, tiny_model, token_ids

TOLERANCE = 1e-5  # fp32, between one matrix product and the same in pieces


def make(rows: int = 5, length: int = 12, seed: int = 0) -> Windows:
    """Random windows; some of their tokens are answer."""
    generator = torch.Generator().manual_seed(seed)
    answer = torch.rand((rows, length), generator=generator) < 0.3
    return Windows(token_ids(rows, length, seed=seed), answer)


def reference(model: nn.Module, windows: Windows, **options: Any) -> tuple[float, float]:
    """Loss and answer loss from the logits of one forward over all windows."""
    with torch.no_grad():
        logits = model(input_ids=windows.ids, use_cache=False, **options).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), windows.ids[:, 1:].flatten(), reduction="none"
    )
    chosen = losses[windows.answer[:, 1:].flatten()]
    return float(losses.mean()), float(chosen.mean())


# The loss of one model


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Room for seven positions' logits: no divisor of a batch."""
    monkeypatch.setattr(perplexity, "LOGIT_BYTES", 7 * VOCAB_SIZE * 4)
    return 7


def test_loss_is_torchs(family: str, small_chunks: int) -> None:
    model, windows = tiny_model(family), make()
    result = window_loss(model, windows, batch_size=2)
    loss, answer_loss = reference(model, windows)
    assert result.loss == pytest.approx(loss, abs=TOLERANCE)
    assert result.answer_loss == pytest.approx(answer_loss, abs=TOLERANCE)
    assert abs(loss - answer_loss) > 1e-3, "the two should differ for the test to tell them apart"
    assert result.tokens == 5 * 11
    assert result.answer_tokens == int(windows.answer[:, 1:].sum())


# Families that do something to their logits, or hold their decoder under another name.
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
}
OTHERS = [
    ("Gemma2", {"final_logit_softcapping": 0.5}),
    ("Granite", {"logits_scaling": 3.0}),
    ("Cohere", {"logit_scale": 4.0}),
    ("GPTNeoX", {}),
    ("Mixtral", {"num_local_experts": 2, "output_router_logits": True}),
]


@pytest.mark.parametrize(("name", "fields"), OTHERS)
def test_loss_of_families_with_more_around_the_head(
    name: str, fields: dict[str, Any], small_chunks: int
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **{**SHAPE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **fields}
    )
    model, windows = getattr(transformers, f"{name}ForCausalLM")(config).eval(), make()
    result = window_loss(model, windows)
    loss, answer_loss = reference(model, windows)
    assert result.loss == pytest.approx(loss, abs=TOLERANCE)
    assert result.answer_loss == pytest.approx(answer_loss, abs=TOLERANCE)
    if fields.keys() & {"final_logit_softcapping", "logits_scaling", "logit_scale"}:
        with torch.no_grad():
            hidden = model.base_model(windows.ids).last_hidden_state[:, :-1]
            bare = model.get_output_embeddings()(hidden).flatten(0, 1)
        plain = torch.nn.functional.cross_entropy(bare, windows.ids[:, 1:].flatten())
        assert abs(float(plain) - loss) > 0.01, f"{fields} should move the logits"


def test_logits_are_made_for_few_positions_at_a_time(
    model: PreTrainedModel, small_chunks: int
) -> None:
    sizes: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: sizes.append(args[0][..., 0].numel()))
    window_loss(model, make(rows=5), batch_size=5)
    assert max(sizes) == small_chunks
    assert sum(sizes) == 5 * 11  # the decoder's last position predicts nothing


def test_fp32_logits_of_a_large_vocabulary_stay_below_the_bound() -> None:
    model, sizes = tiny_model(vocab_size=262_144, num_hidden_layers=1), list[int]()
    model.lm_head.register_forward_hook(lambda _, __, out: sizes.append(out.numel() * 4))
    window_loss(model, make(rows=1, length=70))
    assert max(sizes) <= 64 * 2**20
    assert len(sizes) == 2


def test_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    model.lm_head.eval()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    parts = {name: list(module._modules.values()) for name, module in model.named_modules()}
    window_loss(model, make())
    assert {n: dict(m.__dict__) for n, m in model.named_modules()} == before
    assert {n: list(m._modules.values()) for n, m in model.named_modules()} == parts
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off() -> None:
    model = tiny_model("llama", attention_dropout=0.9)
    expected = window_loss(model, make()).loss
    assert window_loss(model.train(), make()).loss == expected


def test_no_answers_and_no_windows(model: PreTrainedModel) -> None:
    windows = make()
    only_first = torch.zeros_like(windows.answer)
    only_first[:, 0] = True  # nothing predicts the first token
    result = window_loss(model, Windows(windows.ids, only_first))
    assert (result.answer_loss, result.answer_tokens) == (None, 0)
    with pytest.raises(DataError, match="no windows"):
        window_loss(model, windows.take([]))


def test_progress_counts_windows(model: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    window_loss(model, make(), batch_size=2, progress=lambda *n: seen.append(n))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_what_is_no_causal_lm(model: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError, match="wanted a causal LM of transformers"):
        window_loss(nn.Linear(2, 2), make())


# Reports


def unequal_routers(model: nn.Module, seed: int = 0) -> None:
    """Give each router its own direction and bias, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "skip_router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


BUDGETS = (0.9, 0.75, 0.5)


@pytest.fixture
def routed() -> PreTrainedModel:
    """A tiny Llama with unequal routers, calibrated."""
    model = tiny_model("llama")
    attach(model, RoutingConfig(kv="kept"))
    unequal_routers(model)
    calibrate_windows(model, make(rows=20, length=32, seed=9), BUDGETS)
    return model


@pytest.fixture
def windows() -> Windows:
    return make(rows=6, length=32, seed=1)


@pytest.fixture
def selection() -> Windows:
    return make(rows=6, length=32, seed=2)


def row_of(model: nn.Module, windows: Windows, **options: Any) -> dict[str, float]:
    """A row's measures, from one forward over all windows."""
    with record(model) as trace:
        loss, answer_loss = reference(model, windows, **options)
    return {
        "kept_fraction": trace.kept_fraction(),
        "kept_of_routed": trace.kept_of_routed(),
        "loss": loss,
        "answer_loss": answer_loss,
        "flops_fraction": flops_fraction(model, trace),
    }


def assert_rows(found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, float]]) -> None:
    assert [row["budget"] for row in found] == list(BUDGETS)
    for row, expected in zip(found, wanted, strict=True):
        assert {name: row[name] for name in MEASURES} == pytest.approx(expected, abs=TOLERANCE)


def test_report_of_dense_and_routed(routed: PreTrainedModel, windows: Windows) -> None:
    set_budget(routed, 0.75)
    report = evaluate(routed, windows, BUDGETS, batch_size=4)
    assert report.keys() == {"dense", "routed"}
    loss, answer_loss = reference(tiny_model("llama"), windows)
    assert report["dense"] == pytest.approx(
        {"loss": loss, "answer_loss": answer_loss, "tokens": 6 * 31}, abs=TOLERANCE
    )
    assert all(row.keys() == {"budget", *MEASURES} for row in report["routed"])
    assert_rows(report["routed"], [row_of(routed, windows, budget=b) for b in BUDGETS])
    losses = [row["loss"] for row in report["routed"]]
    assert len({*losses, loss}) == 4, "each budget should run something else"
    kept = [row["kept_fraction"] for row in report["routed"]]
    assert kept == sorted(kept, reverse=True)


def test_report_of_a_peft_model(windows: Windows) -> None:
    model = get_peft_model(tiny_model("llama"), RouterTuningConfig(kv="all"))
    unequal_routers(model)
    calibrate_windows(model, make(rows=20, length=32, seed=9), BUDGETS)
    report = evaluate(model, windows, BUDGETS)
    assert_rows(report["routed"], [row_of(model, windows, budget=b) for b in BUDGETS])
    assert report["dense"]["loss"] == window_loss(tiny_model("llama"), windows).loss


def test_random_controls_skip_at_the_routers_rates(
    routed: PreTrainedModel, windows: Windows, selection: Windows
) -> None:
    options: dict[str, Any] = {"compare": True, "selection": selection, "seeds": (3, 4)}
    report = evaluate(routed, windows, BUDGETS, **options)
    per_unit, uniform = [], []
    for budget in BUDGETS:
        with record(routed) as trace:
            reference(routed, windows, budget=budget)
        rates: Any
        for rates, rows in ((trace.kept_per_unit(), per_unit), (trace.kept_of_routed(), uniform)):
            seeds = []
            for seed in (3, 4):
                with decided_by(routed, RandomMask(rates, seed)):
                    seeds.append(row_of(routed, windows))
            rows.append({name: sum(s[name] for s in seeds) / 2 for name in MEASURES})
            rows[-1]["losses"] = [s["loss"] for s in seeds]
    for name, rows in (("random", per_unit), ("random_uniform", uniform)):
        for row, wanted in zip(report[name], rows, strict=True):
            assert row["seeds"] == [3, 4]
            assert row["loss_per_seed"] == pytest.approx(wanted.pop("losses"), abs=TOLERANCE)
            assert row["loss_per_seed"][0] != row["loss_per_seed"][1]
        assert_rows(report[name], rows)


@pytest.mark.parametrize("name", ["static_cosine", "static_greedy"])
def test_static_controls_interpolate_between_whole_units(
    routed: PreTrainedModel, windows: Windows, selection: Windows, name: str
) -> None:
    options: dict[str, Any] = {"compare": True, "selection": selection, "greedy_windows": 3}
    report = evaluate(routed, windows, BUDGETS, **options)
    if name == "static_cosine":
        order = cosine_order(routed, selection)
    else:
        order = greedy_order(routed, selection.take([0, 1, 2]), 2)
    rows = []
    for num in range(3):
        with decided_by(routed, StaticDrop(order[:num])):
            rows.append(row_of(routed, windows))
    # Of 4 units, a budget of 0.9 drops 0.4 of one, 0.75 drops one, 0.5 drops two.
    between = {n: 0.6 * rows[0][n] + 0.4 * rows[1][n] for n in MEASURES}
    assert_rows(report[name], [between, rows[1], rows[2]])
    assert [row["kept_fraction"] for row in report[name]] == pytest.approx(BUDGETS)
    assert [row["units"] for row in report[name]] == [[[], order[:1]], [order[:1]], [order[:2]]]


def test_static_dropping_is_chosen_on_the_selection_windows(
    routed: PreTrainedModel,
    windows: Windows,
    selection: Windows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen_on = {}

    def spy(name: str) -> None:
        choose = getattr(perplexity, name)

        def choosing(model: nn.Module, given: Windows, *args: Any, **options: Any) -> list[str]:
            chosen_on[name] = given.ids
            return list(choose(model, given, *args, **options))

        monkeypatch.setattr(perplexity, name, choosing)

    spy("cosine_order")
    spy("greedy_order")
    evaluate(routed, windows, [0.75], compare=True, selection=selection, greedy_windows=2)
    assert torch.equal(chosen_on["cosine_order"], selection.ids)
    assert torch.equal(chosen_on["greedy_order"], selection.ids[:2])


def test_static_controls_drop_no_more_than_is_routed(windows: Windows, selection: Windows) -> None:
    model = tiny_model("llama")
    attach(model, RoutingConfig(layers=[1]))
    unequal_routers(model)
    calibrate_windows(model, selection, [0.76])
    routing = model.model.__dict__["routing"]
    routing.config.calibration.insert(0, {"budget": 0.5, "threshold": 9.0})  # more than it can
    report = evaluate(model, windows, [0.5], compare=True, selection=selection)
    assert report["static_cosine"][0]["units"] == [["layers.1.attn"]]
    assert report["static_cosine"][0]["kept_fraction"] == 0.75


def test_progress_of_a_report_ends_at_its_total(
    routed: PreTrainedModel, windows: Windows, selection: Windows
) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(
        routed,
        windows,
        BUDGETS,
        batch_size=4,
        compare=True,
        selection=selection,
        seeds=(0, 1),
        progress=lambda *n: seen.append(n),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


def test_report_changes_nothing(
    routed: PreTrainedModel, windows: Windows, selection: Windows
) -> None:
    config = routed.model.__dict__["routing"].config
    before, weights = copy.deepcopy(config), copy.deepcopy(routed.state_dict())
    routed.train()
    evaluate(routed, windows, BUDGETS, compare=True, selection=selection)
    assert config == before
    assert all(module.training for module in routed.modules())
    assert all(torch.equal(w, weights[n]) for n, w in routed.state_dict().items())


def test_what_cannot_be_compared(
    routed: PreTrainedModel, windows: Windows, selection: Windows
) -> None:
    with pytest.raises(ConfigError, match="give selection windows"):
        evaluate(routed, windows, BUDGETS, compare=True)
    with pytest.raises(ConfigError, match="the same text"):
        evaluate(routed, windows, BUDGETS, compare=True, selection=windows.take(range(6)))
    with pytest.raises(ConfigError, match="at least one seed"):
        evaluate(routed, windows, BUDGETS, compare=True, selection=selection, seeds=())


@pytest.mark.parametrize("budget", [0.0, 1.2, math.nan, 0.3])
def test_bad_budget_is_refused_before_anything_runs(
    routed: PreTrainedModel, windows: Windows, budget: float
) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(BudgetError):
        evaluate(routed, windows, [0.9, budget], progress=lambda *n: seen.append(n))
    assert not seen


def test_dense_row_is_the_frozen_model_to_the_bit(
    routed: PreTrainedModel, windows: Windows
) -> None:
    with dense(routed):
        assert window_loss(routed, windows) == window_loss(tiny_model("llama"), windows)
