"""What the engine refuses, by name and with what to do; and odd calls that it must serve.

Caches, masks and budgets of calls are in test_generate.py, families and layers in test_units.py,
configs in test_config.py, budgets to calibrate in test_calibration.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from laws import Case, bare_model, batch, calibrate_by_hand, randomize, routed_model, run
from router_tuning import (
    RoutingConfig,
    attach,
    decided_by,
    dense,
    detach,
    execute,
    record,
    replay,
    routing_of,
    set_budget,
)
from router_tuning.baselines import StaticDrop
from router_tuning.errors import (
    BudgetError,
    ConfigError,
    RouterTuningError,
    UnsupportedCallError,
)
from tiny import tiny_model


def open_block(block: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    def enter(model: nn.Module) -> None:
        with block(model):
            pass

    return enter


@pytest.mark.parametrize(
    "act",
    [
        routing_of,
        lambda model: set_budget(model, 0.5),
        open_block(record),
        open_block(lambda model: replay(model, {})),
        open_block(lambda model: decided_by(model, StaticDrop([]))),
    ],
    ids=["routing_of", "set_budget", "record", "replay", "decided_by"],
)
def test_a_model_without_routers_is_told_how_to_get_them(act: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(UnsupportedCallError, match="no routers; attach them"):
        act(tiny_model())


def test_attaching_twice_is_refused_and_changes_nothing() -> None:
    model, given = routed_model(), batch()
    before = run(model, given).logits
    with pytest.raises(ConfigError, match="routed already; detach"):
        attach(model, RoutingConfig())
    assert torch.equal(run(model, given).logits, before)


def test_detaching_what_is_not_routed_does_nothing() -> None:
    model = tiny_model()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    detach(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    "options",
    [
        {"kv": "some"},
        {"layers": [9]},
        {"granularity": ["block_token", "attn_token"]},
        {"budget": 0},
    ],
)
def test_a_bad_config_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model, given = tiny_model(), batch()
    keys = list(model.state_dict())
    with pytest.raises(RouterTuningError):
        attach(model, RoutingConfig(**options))
    assert list(model.state_dict()) == keys
    assert not any("forward" in module.__dict__ for module in model.modules())
    attach(model, RoutingConfig())
    run(model, given)


def test_a_path_that_there_is_not_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="masked, skipping, got 'maskd'"),
        execute(
            routed_model(),
            "maskd",  # type: ignore[arg-type]
        ),
    ):
        pass


@pytest.mark.parametrize("budget", [0, 1.2, float("nan"), "0.8", True])
def test_a_bad_default_budget_is_refused_and_the_old_one_stays(budget: Any) -> None:
    model = routed_model()
    calibrate_by_hand(model)
    set_budget(model, 0.5)
    with pytest.raises(BudgetError):
        set_budget(model, budget)
    assert routing_of(model).config.default_budget == 0.5


def test_a_default_budget_must_be_calibrated() -> None:
    model = routed_model()
    with pytest.raises(BudgetError, match="no budget is calibrated"):
        set_budget(model, 0.8)
    set_budget(model, 1.0)
    calibrate_by_hand(model)
    with pytest.raises(BudgetError, match="outside the calibrated range"):
        set_budget(model, 0.95)


def test_budgets_come_in_every_form_of_number() -> None:
    model, given = routed_model(), batch()
    calibrate_by_hand(model)
    expected = run(model, given, budget=0.5)
    for one in (
        np.float32(0.5),
        np.float64(0.5),
        torch.tensor(0.5),
        [0.5],
        (0.5,),
        [0.5] * 3,
        np.array(0.5),
    ):
        assert torch.equal(run(model, given, budget=one).logits, expected.logits)
    with pytest.raises(BudgetError):
        run(model, given, budget=torch.full((1, 3), 0.5))


@pytest.mark.parametrize(
    "budget",
    [torch.tensor(0.8), torch.tensor([0.8]), torch.tensor([[0.8]]), np.float32(0.8), 0.8],
    ids=repr,
)
def test_a_default_budget_may_be_a_tensor_of_one_number_and_is_kept_as_a_float(budget: Any) -> None:
    """0.8 in float32 lies a little above the highest calibrated budget."""
    model, given = routed_model(), batch()
    routing_of(model).config.calibration = [{"budget": 0.8, "threshold": 0.3}]
    set_budget(model, budget)
    assert type(routing_of(model).config.default_budget) is float
    expected = run(model, given, budget=0.8).logits
    assert torch.equal(run(model, given).logits, expected)
    if not isinstance(budget, torch.Tensor) or budget.ndim < 2:  # a call's may be one a row
        assert torch.equal(run(model, given, budget=budget).logits, expected)
    set_budget(model, None)
    assert routing_of(model).config.default_budget is None


@pytest.mark.parametrize(
    "budget", [torch.tensor([0.5, 0.6]), torch.tensor([]), torch.tensor(True), [0.5], object()]
)
def test_a_default_budget_is_one_number(budget: Any) -> None:
    model = routed_model()
    calibrate_by_hand(model)
    with pytest.raises(BudgetError, match="a budget is the fraction"):
        set_budget(model, budget)
    assert routing_of(model).config.default_budget is None


def test_thresholds_do_not_follow_torchs_default_dtype() -> None:
    """0.3001 rounds to 0.3008 in bf16."""
    model, given = routed_model(), batch()
    routing_of(model).config.calibration = [{"budget": 0.5, "threshold": 0.3001}]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        result = run(model, given, budget=0.5)
    finally:
        torch.set_default_dtype(before)
    threshold = result.trace.forwards[0].units["layers.0.attn"].threshold_B1
    assert threshold is not None
    assert threshold.dtype is torch.float32
    assert float(threshold[0]) == pytest.approx(0.3001, abs=1e-6)


def test_kernels_that_take_no_mask_are_refused_in_training() -> None:
    """Before they are called: none is installed here."""
    model, given = routed_model(), batch(padded=False)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedCallError, match='attn_implementation="sdpa" or "eager"'):
        model(given.ids)


def test_attention_weights_are_refused_and_dense_gives_them() -> None:
    model, given = routed_model(attn_implementation="eager"), batch(padded=False)
    with torch.no_grad():
        with pytest.raises(UnsupportedCallError, match=r"with dense\(model\)"):
            model(given.ids, output_attentions=True)
        with dense(model):
            assert len(model(given.ids, output_attentions=True).attentions) == 4


def test_neither_ids_nor_embeddings_is_transformers_own_error() -> None:
    model = routed_model()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


# Deciders


def decide(answer: Callable[[torch.Tensor], Any]) -> Any:
    """A decider whose answer is made from the decision to keep everything."""
    return lambda unit, x, forward: answer(torch.ones(x.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize(
    ("answer", "came"),
    [
        (lambda keep: keep.float(), r"torch\.float32 \(3, 20\)"),
        (lambda keep: keep.long(), r"torch\.int64 \(3, 20\)"),
        (lambda keep: keep[0], r"torch\.bool \(20,\)"),
        (lambda keep: keep.tolist(), "list"),
        (lambda keep: None, "NoneType"),
    ],
    ids=["float", "int", "shape", "list", "None"],
)
@pytest.mark.parametrize("path", ["masked", "skipping"])
def test_a_decider_that_gives_no_bools_is_named(
    answer: Callable[[torch.Tensor], Any], came: str, path: Any
) -> None:
    model, given = routed_model(), batch()
    before = run(model, given).logits
    wanted = rf"decision for layers\.0\.attn must be a torch\.bool .*\(3, 20\).*; got {came}"
    with (
        pytest.raises(ConfigError, match=wanted),
        execute(model, path),
        decided_by(model, decide(answer)),
    ):
        run(model, given)
    assert torch.equal(run(model, given).logits, before)


def test_decisions_to_replay_name_every_routed_unit_and_no_other() -> None:
    model, given = routed_model(), batch()
    decisions = run(model, given).trace.decisions()
    there = r"routed units layers\.0\.attn, .*, layers\.3\.attn"
    for wrong, match in (
        ({}, r"decisions lacks 'layers\.0\.attn'"),
        ({**decisions, "layers.9.attn": decisions["layers.0.attn"]}, r"names 'layers\.9\.attn'"),
        ({n: d for n, d in decisions.items() if "2" not in n}, r"lacks 'layers\.2\.attn'"),
    ):
        with pytest.raises(ConfigError, match=f"{match}.*{there}"), replay(model, wrong):
            pass


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda keep: keep.float(), "torch.float32"),
        (lambda keep: keep.long(), "torch.int64"),
        (lambda keep: keep[0], "torch.bool"),
        (lambda keep: keep.tolist(), "list"),
    ],
    ids=["float", "int", "row", "list"],
)
def test_decisions_to_replay_are_bools_of_rows_and_columns(
    change: Callable[[torch.Tensor], Any], came: str
) -> None:
    model, given = routed_model(), batch()
    decisions: dict[str, Any] = run(model, given).trace.decisions()
    decisions["layers.2.attn"] = change(decisions["layers.2.attn"])
    match = rf"decisions\['layers\.2\.attn'\] must be a torch\.bool .* got {came}"
    with pytest.raises(ConfigError, match=match), replay(model, decisions):
        pass


# Odd calls that must work


def test_embeddings_in_the_place_of_ids() -> None:
    for family in ("llama", "gemma3"):
        model, given = routed_model(Case(family)), batch()
        expected = run(model, given)
        with torch.no_grad():
            logits = model(
                inputs_embeds=model.get_input_embeddings()(given.ids),
                attention_mask=given.mask,
                position_ids=given.positions,
            ).logits
        assert (logits - expected.logits)[given.real].abs().max() < 3e-5


def test_positional_arguments_tuples_labels_and_hidden_states() -> None:
    model, given = routed_model(), batch(padded=False)
    calibrate_by_hand(model)
    with torch.no_grad():
        expected = model(given.ids, attention_mask=given.mask, budget=0.5)
        positional = model(given.ids, given.mask, budget=0.5)
        as_tuple = model(given.ids, budget=0.5, return_dict=False)
        labelled = model(given.ids, labels=given.ids, budget=0.5)
        states = model(given.ids, output_hidden_states=True, budget=0.5).hidden_states
        bare = model.model(given.ids, budget=0.5).last_hidden_state
    assert torch.equal(positional.logits, expected.logits)
    assert torch.equal(as_tuple[0], expected.logits)
    loss = nn.functional.cross_entropy(
        expected.logits[:, :-1].flatten(0, 1), given.ids[:, 1:].flatten()
    )
    torch.testing.assert_close(labelled.loss, loss)
    assert len(states) == 5
    assert torch.equal(states[-1], bare)


def test_a_mask_of_booleans_or_floats_is_a_mask() -> None:
    model, given = routed_model(), batch()
    expected = run(model, given).logits
    for mask in (given.mask.bool(), given.mask.float()):
        with torch.no_grad():
            logits = model(given.ids, attention_mask=mask, position_ids=given.positions).logits
        assert torch.equal(logits[given.real], expected[given.real])


def test_a_copy_of_a_routed_model_is_its_own() -> None:
    model, given = routed_model(Case("gemma3", sink=5, window=3)), batch()
    calibrate_by_hand(model)
    before = run(model, given).logits
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, given).logits, before)
    randomize(twin, seed=9)
    set_budget(twin, 0.5)
    assert not torch.equal(run(twin, given).logits, before)
    assert torch.equal(run(model, given).logits, before)
    detach(twin)
    assert torch.equal(run(model, given).logits, before)


def test_attaching_again_after_detaching_starts_fresh() -> None:
    model, given = bare_model("llama"), batch()
    for case in (Case(kv="all"), Case(granularity="attn_sequence"), Case(sink=5, window=3)):
        attach(model, case.config)
        assert run(model, given).trace.kept_fraction() == 1.0
        randomize(model)
        assert run(model, given).trace.kept_fraction() < 1.0
        detach(model)


def test_a_forward_that_was_replaced_before_is_kept_and_put_back() -> None:
    """As accelerate's hooks do for models that are spread over devices."""
    model, given = bare_model("llama"), batch()
    calls = []
    attention = model.model.layers[0].self_attn
    original = attention.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    attention.forward = hooked
    attach(model, RoutingConfig())
    run(model, given)
    assert calls == [1]
    detach(model)
    assert attention.forward is hooked
