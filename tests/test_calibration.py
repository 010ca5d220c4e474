"""Thresholds that keep what was asked, on the calibration text and on fresh text of its kind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from laws import Case, bare_model, randomize, routed_model
from router_tuning import RoutingConfig, attach, record, routing_of, set_budget
from router_tuning.calibration import TOLERANCE, calibrate, calibrate_windows
from router_tuning.data import Example, Windows
from router_tuning.errors import BudgetError, DataError
from tiny import SENTENCES, token_ids

BUDGETS = (0.9, 0.7, 0.5)


def windows(number: int, length: int = 64, seed: int = 0) -> Windows:
    """Text of a kind: some tokens are frequent, others rare."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, 95).float() ** -0.7
    ids = torch.multinomial(weights, number * length, replacement=True, generator=generator) + 3
    return Windows(ids.view(number, length), torch.zeros(number, length, dtype=torch.bool))


def kept(model: PreTrainedModel, text: Windows, budget: Any = None, **options: Any) -> float:
    with torch.no_grad(), record(model) as trace:
        model(text.ids, use_cache=False, budget=budget, **options)
    return trace.kept_fraction()


@pytest.mark.parametrize(
    "case",
    [Case(kv="all"), Case(), Case(sink=5, window=3), Case("gemma3"), Case("mistral", sink=2)],
    ids=str,
)
def test_tokens_are_kept_at_the_budget_here_and_on_fresh_text(case: Case) -> None:
    model = routed_model(case)
    entries = calibrate_windows(model, windows(24), BUDGETS)
    assert [entry["budget"] for entry in entries] == sorted(BUDGETS)
    assert routing_of(model).config.calibration is entries
    assert routing_of(model).config.default_budget is None
    fresh = windows(24, seed=1)
    for entry in entries:
        budget = entry["budget"]
        assert abs(entry["kept_fraction"] - budget) <= TOLERANCE
        assert kept(model, windows(24), budget) == pytest.approx(entry["kept_fraction"])
        assert abs(kept(model, fresh, budget) - budget) <= 0.02
        mean = sum(entry["kept_per_unit"].values()) / 4
        assert entry["kept_of_routed"] == entry["kept_fraction"] == pytest.approx(mean)
    thresholds = [entry["threshold"] for entry in entries]
    assert thresholds == sorted(thresholds, reverse=True)


def test_sequences_are_kept_at_the_budget_as_nearly_as_their_number_allows() -> None:
    """A sequence is kept or not as a whole, after a prefix that always counts."""
    model = routed_model(Case(granularity="attn_sequence"))
    number, length = 200, 12
    entries = calibrate_windows(model, windows(number, length), (0.8, 0.6), batch_size=64)
    for entry in entries:
        assert abs(entry["kept_fraction"] - entry["budget"]) <= 2 * TOLERANCE
        fresh = kept(model, windows(number, length, seed=1), entry["budget"])
        assert abs(fresh - entry["budget"]) <= 0.05  # 800 coin flips, three quarters of the tokens
        assert all(share >= 3 / 12 for share in entry["kept_per_unit"].values())


def test_budgets_between_are_interpolated() -> None:
    model = routed_model()
    calibrate_windows(model, windows(24), BUDGETS)
    fresh = windows(24, seed=1)
    found = [kept(model, fresh, budget) for budget in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    assert found == sorted(found)
    assert abs(found[1] - 0.6) <= 0.04
    assert abs(found[3] - 0.8) <= 0.04
    assert found[5] == 1.0


def test_a_call_and_each_of_its_rows_have_their_budget() -> None:
    model = routed_model()
    calibrate_windows(model, windows(24), BUDGETS)
    fresh = windows(24, seed=1)
    budgets = [0.5, 0.7, 0.9] * 8
    with torch.no_grad(), record(model) as trace:
        model(fresh.ids, use_cache=False, budget=budgets)
    per_row = torch.stack(list(trace.decisions().values())).double().mean((0, 2))
    for offset, budget in enumerate((0.5, 0.7, 0.9)):
        assert abs(float(per_row[offset::3].mean()) - budget) <= 0.03
    set_budget(model, 0.7)
    assert kept(model, fresh) == kept(model, fresh, 0.7)


def test_unrouted_layers_count_as_kept() -> None:
    model = bare_model("llama")
    attach(model, RoutingConfig(layers=[1, 2, 3]))
    randomize(model)
    entry = calibrate_windows(model, windows(24), (0.6,))[0]
    assert abs(entry["kept_fraction"] - 0.6) <= TOLERANCE
    assert abs(entry["kept_of_routed"] - (0.6 * 4 - 1) / 3) <= 2 * TOLERANCE
    assert list(entry["kept_per_unit"]) == [f"layers.{i}.attn" for i in (1, 2, 3)]


def test_routers_that_see_no_difference_can_only_keep_all_or_nothing() -> None:
    """Fresh ones: one logit for all. The nearest that is possible is stored, with what it keeps."""
    model = bare_model("llama")
    attach(model, RoutingConfig())
    with pytest.warns(UserWarning, match=r"budget 0\.8 was missed: .* keeps 1\.000 .* alike"):
        entry = calibrate_windows(model, windows(4), (0.8,))[0]
    assert entry["kept_fraction"] == 1.0


def test_too_little_text_is_told_of_with_how_little_it_was() -> None:
    """Two sequences of four units: nothing lies between eighths of what follows the prefix."""
    model = routed_model(Case(granularity="attn_sequence"))
    text = windows(2, 6)
    with pytest.warns(UserWarning, match=r"too little text \(2 windows, 12 tokens\)") as told:
        entries = calibrate_windows(model, text, [0.6 + 0.02 * i for i in range(15)])
    missed = [e["budget"] for e in entries if abs(e["kept_fraction"] - e["budget"]) > 0.02]
    assert 0 < len(missed) < len(entries)
    assert [str(t.message).split()[1] for t in told] == [f"{budget:g}" for budget in missed]
    assert {t.filename for t in told} == {__file__}
    assert routing_of(model).config.calibration is entries


def test_calibrate_warns_where_it_was_called(tokenizer: PreTrainedTokenizerFast) -> None:
    model = bare_model("llama")
    attach(model, RoutingConfig())
    text = [Example(messages=None, text=" ".join(SENTENCES * 20))]
    with pytest.warns(UserWarning, match=r"budget 0\.8 was missed") as told:
        calibrate(model, tokenizer, text, (0.8,), max_windows=1)
    assert [t.filename for t in told] == [__file__]


def test_static_routers_are_not_told_that_they_keep_whole_units() -> None:
    model = bare_model("llama")
    attach(model, RoutingConfig(router="bias"))
    for unit in routing_of(model).units:
        model.model.layers[unit.layer_idx].skip_router_attn.bias.data.fill_(float(unit.layer_idx))
    entries = calibrate_windows(model, windows(4), (0.9, 0.6))  # a warning would be an error
    assert [entry["kept_fraction"] for entry in entries] == [0.75, 1.0]


def test_calibrating_again_replaces_what_was_there() -> None:
    model = routed_model()
    calibrate_windows(model, windows(8), (0.9, 0.5))
    set_budget(model, 0.5)
    entries = calibrate_windows(model, windows(8), (0.7, 0.7, 0.6))
    assert [entry["budget"] for entry in entries] == [0.6, 0.7]
    assert routing_of(model).config.default_budget == 0.5
    assert not model.training


def test_batches_do_not_matter() -> None:
    tables = []
    for batch_size in (3, 24):
        model = routed_model()
        tables.append(calibrate_windows(model, windows(24), (0.7,), batch_size=batch_size))
    assert tables[0][0]["threshold"] == pytest.approx(tables[1][0]["threshold"], abs=1e-4)


def test_progress_and_training_mode() -> None:
    model = routed_model()
    model.train()
    steps: list[tuple[int, int]] = []
    calibrate_windows(model, windows(4), (0.8, 0.6), progress=lambda a, b: steps.append((a, b)))
    assert steps == [(1, 2), (2, 2)]
    assert model.training


def test_examples_are_cut_into_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    model = routed_model()
    held_out = [Example(None, sentence * 40) for sentence in SENTENCES]
    entries = calibrate(model, tokenizer, held_out, (0.8, 0.6), max_windows=6)
    assert [entry["budget"] for entry in entries] == [0.6, 0.8]
    assert all(abs(entry["kept_fraction"] - entry["budget"]) <= 0.01 for entry in entries)


# What cannot be


@pytest.mark.parametrize("budgets", [(), (1.0,), (0.8, 1.0), (0.0,), (1.2,), (math.nan,), ("0.8",)])
def test_bad_budgets_are_refused_and_change_nothing(budgets: Any) -> None:
    model = routed_model()
    table = calibrate_windows(model, windows(4), (0.8,))
    with pytest.raises(BudgetError):
        calibrate_windows(model, windows(4), budgets)
    assert routing_of(model).config.calibration is table


@pytest.mark.parametrize("budgets", [0.8, "0.8", None, torch.tensor(0.8), np.array(0.8)], ids=repr)
def test_one_bare_budget_is_refused_before_the_text_is_read(
    tokenizer: PreTrainedTokenizerFast, budgets: Any
) -> None:
    model = routed_model()
    with pytest.raises(BudgetError, match=r"must be a list of numbers, got .*; write \[0\.8\]"):
        calibrate(model, tokenizer, iter([None]), budgets)  # type: ignore[list-item]
    with pytest.raises(BudgetError, match="must be a list of numbers"):
        calibrate_windows(model, windows(4), budgets)


def test_budgets_come_in_any_list() -> None:
    model = routed_model()
    for budgets in ((0.8,), [0.8], {0.8}, np.array([0.8])):
        assert len(calibrate_windows(model, windows(8), budgets)) == 1  # type: ignore[arg-type]


def test_a_budget_below_the_unrouted_layers_is_refused_with_the_floor() -> None:
    model = bare_model("llama")
    attach(model, RoutingConfig(layers=[0]))
    randomize(model)
    with pytest.raises(BudgetError, match=r"budget 0\.7 cannot be met: 0\.750 of the executions"):
        calibrate_windows(model, windows(4), (0.9, 0.7))
    assert routing_of(model).config.calibration == []
    assert routing_of(model).config.default_budget is None


@pytest.mark.parametrize("length", [4, 3, 2])
def test_a_budget_below_the_prefix_is_refused(length: int) -> None:
    model = routed_model(Case(granularity="attn_sequence"))
    with pytest.raises(BudgetError, match="longer text"):
        calibrate_windows(model, windows(4, length), (0.7,))
    if length < 4:  # no token is free to be skipped
        with pytest.raises(BudgetError, match=r"1\.000 of the executions"):
            calibrate_windows(model, windows(4, length), (0.9999,))


def test_the_lowest_possible_budget_skips_all_that_is_free() -> None:
    model = routed_model(Case(granularity="attn_sequence"))
    entry = calibrate_windows(model, windows(4, 12), (0.25,))[0]
    assert entry["kept_fraction"] == 0.25


def test_no_windows_are_refused() -> None:
    none = Windows(token_ids(1, 8)[:0], torch.zeros(0, 8, dtype=torch.bool))
    with pytest.raises(DataError, match="no windows"):
        calibrate_windows(routed_model(), none, (0.8,))


def test_an_interruption_leaves_the_table_as_it_was() -> None:
    model = routed_model()
    table = calibrate_windows(model, windows(4), (0.8,))
    set_budget(model, 0.8)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_windows(model, windows(4), (0.6, 0.5), progress=stop)
    assert routing_of(model).config.calibration is table
    assert routing_of(model).config.default_budget == 0.8
