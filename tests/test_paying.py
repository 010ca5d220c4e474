"""Attentions that run whole where leaving queries out takes longer: the same results, honestly
counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from laws import (
    CHUNKS,
    FIRST_FIVE,
    LOGIT_TOLERANCE,
    REPRESENTATIVES,
    Case,
    Counter,
    batch,
    calibrate_by_hand,
    difference,
    routed_model,
    run,
)
from router_tuning import Windows, always_skipping, dense, evaluate, record, replay, routing_of
from router_tuning.cost import cost, flops_fraction
from router_tuning.evaluation.variants import Ran, Variant
from router_tuning.execution import paying
from tiny import token_ids

ALL, WINDOW = Case(kv="all"), Case(kv="kept", sink=5, window=3)
both_policies = pytest.mark.parametrize("case", [ALL, WINDOW], ids=str)
every_phase = pytest.mark.parametrize("phase", ["uncached", *CHUNKS])


SHARE = paying.LEAST_SHARE_WINDOW


@pytest.fixture(autouse=True)
def skipping_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is measured whether it does, as everywhere outside the tests. Only that random
    routers skip more than runs whole with a window.
    """
    monkeypatch.setattr(paying, "LEAST_SHARE_WINDOW", 1.0)


@every_phase
@both_policies
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted({*FIRST_FIVE, *REPRESENTATIVES}))
def test_running_whole_changes_nothing(
    family: str, implementation: str, case: Case, phase: str
) -> None:
    case = replace(case, family=family)
    model, given = routed_model(case, attn_implementation=implementation), batch()
    chunks = CHUNKS.get(phase)
    with always_skipping(model):
        strict = run(model, given, chunks)
    decisions = strict.trace.decisions()
    whole = run(model, given, chunks, decisions=decisions)
    ran_whole = [unit.whole_BT is not None for unit in whole.trace.forwards[0].units.values()]
    cannot = case.window and family in ("falcon", "deepseek_v3")  # that do not run flat
    assert any(ran_whole) == (not cannot)
    assert_same_keys(strict.cache, whole.cache)
    assert difference(strict.logits, whole.logits, given.real) < LOGIT_TOLERANCE[torch.float32]
    assert whole.trace.kept_fraction() == strict.trace.kept_fraction()
    for name, keep in whole.trace.decisions().items():
        assert torch.equal(keep, decisions[name])


def assert_same_keys(some: Any, other: Any) -> None:
    """The kept keys of two caches are the same, of the same tokens."""
    for a, b in zip(getattr(some, "layers", ()), getattr(other, "layers", ()), strict=True):
        if getattr(a, "store", None) is not None:
            assert torch.equal(a.store.columns_BS, b.store.columns_BS)
            assert a.store.held() == b.store.held()
            torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), rtol=1e-4, atol=1e-4)


@every_phase
@both_policies
def test_what_ran_whole_is_counted_as_such(case: Case, phase: str) -> None:
    model, given = routed_model(case), batch()
    with Counter(model) as counter:
        trace = run(model, given, CHUNKS.get(phase)).trace
    for unit in routing_of(model).units:
        entered, runs = 0, [forward.units[unit.name] for forward in trace.forwards]
        for forward, of_unit in zip(trace.forwards, runs, strict=True):
            ran, real = int(of_unit.ran_BT.sum()), int(forward.real_BT.sum())
            dense_call = ran == real and (case.kv == "all" or not forward.start)
            entered += forward.real_BT.numel() if dense_call else ran
            if forward.real_BT.shape[1] == 1 or (case.window and forward.start):
                assert of_unit.whole_BT is None
        assert runs[0].whole_BT is not None
        assert set(counter.entered(unit.layer_idx, "query")) == {entered}


@both_policies
def test_what_ran_whole_costs_what_torch_counts(case: Case) -> None:
    model, given = routed_model(case, attn_implementation="eager"), batch(padded=False)
    with FlopCounterMode(display=False) as counted:
        trace = run(model, given).trace
    with FlopCounterMode(display=False) as counted_dense, dense(model):
        run(model, given)
    spent = cost(model, trace)
    biases = 2 * len(routing_of(model).units) * given.ids.numel()  # torch leaves them out
    routers = spent.flops - spent.dense_flops - biases
    assert routers > 0  # nothing else is beside what dense runs
    assert counted.get_total_flops() - counted_dense.get_total_flops() == routers


@both_policies
def test_a_cost_of_decisions_is_had_by_always_skipping(case: Case) -> None:
    model, ids = routed_model(case), token_ids(2, 20)
    with torch.no_grad(), record(model) as free:
        model(ids)
    with torch.no_grad(), always_skipping(model), record(model) as strict:
        model(ids)
    assert flops_fraction(model, strict) < 1 < flops_fraction(model, free)


def test_evaluation_says_what_decisions_are_worth() -> None:
    model, ids = routed_model(ALL), token_ids(2, 20)
    calibrate_by_hand(model)
    windows, selection = (
        Windows(x, torch.ones_like(x, dtype=torch.bool)) for x in (ids, token_ids(2, 20, seed=1))
    )
    report = evaluate(model, windows, [0.5], selection=selection, compare=True)
    assert report["routed"][0]["flops_fraction"] < 1
    assert report["random"][0]["flops_fraction"] < 1
    ran, half = Ran(), Variant(budget=0.5)
    with torch.no_grad(), half.on(model) as given, ran.counting(model, half):
        model(ids, **given)
    assert ran.shares()["flops_fraction"] < 1


@pytest.mark.parametrize("kept", [0.5, 0.9])
@pytest.mark.parametrize("length", [64, 1000])
def test_few_skipped_tokens_run_whole_and_many_do_not(kept: float, length: int) -> None:
    model, ids = routed_model(ALL), token_ids(1, length)
    generator = torch.Generator().manual_seed(0)
    decisions = {
        unit.name: torch.rand((1, length), generator=generator) < kept
        for unit in routing_of(model).units
    }
    with torch.no_grad(), replay(model, decisions), record(model) as trace:
        model(ids)
    for unit in trace.forwards[0].units.values():
        least = paying.LEAST_SHARE * length + paying.LEAST_TOKENS
        whole = int((~unit.keep_BT).sum()) < least
        assert whole == (unit.whole_BT is not None)
        assert whole == (kept == 0.9 or length == 64)


@pytest.mark.parametrize(
    ("length", "kept", "whole"),
    [(64, 0.7, True), (64, 0.5, False), (400, 0.9, True), (400, 0.7, False), (600, 0.97, False)],
)
def test_with_a_window_short_prompts_run_whole(
    length: int, kept: float, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paying, "LEAST_SHARE_WINDOW", SHARE)
    model, ids = routed_model(WINDOW), token_ids(1, length)
    keep = torch.rand((1, length), generator=torch.Generator().manual_seed(0)) < kept
    decisions = {unit.name: keep for unit in routing_of(model).units}
    with torch.no_grad(), replay(model, decisions), record(model) as trace:
        model(ids)
    for unit in trace.forwards[0].units.values():
        assert (unit.whole_BT is not None) == whole


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(granularity="attn_sequence", kv="all"),
        Case(granularity="block_token", kv="all"),
        replace(WINDOW, granularity="attn_sequence"),
        replace(WINDOW, granularity="block_token"),
    ],
    ids=str,
)
def test_nothing_else_runs_whole(case: Case) -> None:
    trace = run(routed_model(case), batch()).trace
    assert all(unit.whole_BT is None for unit in trace.forwards[0].units.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("amx", [True, False])
def test_fast_products_in_bfloat16_run_whole_for_longer(
    amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paying, "has_amx", lambda: amx)
    model, ids = routed_model(ALL).to(dtype), token_ids(1, 1000)
    half = torch.arange(1000)[None] % 2 == 0
    decisions = {unit.name: half for unit in routing_of(model).units}
    with torch.no_grad(), replay(model, decisions), record(model) as trace:
        model(ids)
    wanted = amx and dtype == torch.bfloat16
    for unit in trace.forwards[0].units.values():
        assert (unit.whole_BT is not None) == wanted
