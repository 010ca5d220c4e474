"""Traces: fractions with their denominators, decisions over columns, and comparing two of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws import CHUNKS, Batch, Case, batch, routed_model, run
from router_tuning import RoutingConfig, attach, record
from router_tuning.errors import UnsupportedCallError
from router_tuning.record import ForwardRecord, Trace, UnitRecord, same_decisions
from tiny import checkpoint_activations, tiny_model


def bools(*rows: str) -> Tensor:
    """ "x." -> [True, False]"""
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def trace_of(*forwards: tuple[int, Tensor, dict[str, Tensor]], num_units: int = 2) -> Trace:
    names = tuple(forwards[0][2])
    return Trace(
        num_units,
        names,
        [
            ForwardRecord(start, real, True, {n: UnitRecord(k, k) for n, k in keep.items()})
            for start, real, keep in forwards
        ],
    )


def test_fractions_are_over_real_tokens() -> None:
    trace = trace_of(
        (0, bools("xxx.", "xxxx"), {"a": bools("x...", "xx.."), "b": bools("....", "x...")})
    )
    assert trace.kept_per_unit() == {"a": 3 / 7, "b": 1 / 7}
    assert trace.kept_of_routed() == pytest.approx(2 / 7)
    assert trace.kept_fraction() == pytest.approx(2 / 7)


def test_units_that_are_not_routed_count_as_kept() -> None:
    trace = trace_of((0, bools("xxxx"), {"a": bools("x...")}), num_units=4)
    assert trace.kept_of_routed() == 0.25
    assert trace.kept_fraction() == (3 + 0.25) / 4


def test_fractions_add_up_over_forwards_of_different_sizes() -> None:
    trace = trace_of(
        (0, bools("xxx"), {"a": bools("xxx")}),
        (3, bools("x"), {"a": bools(".")}),
        (0, bools("xxxx", "xx.."), {"a": bools("....", "x...")}),
        num_units=1,
    )
    assert trace.kept_fraction() == 4 / 10


def test_decisions_lie_at_their_columns_and_a_later_forward_wins() -> None:
    trace = trace_of(
        (0, bools("xxx"), {"a": bools("x.x")}),
        (3, bools("xx"), {"a": bools("xx")}),
        (4, bools("xx"), {"a": bools(".x")}),  # one column was cropped
    )
    assert torch.equal(trace.decisions()["a"], bools("x.xx.x"))
    assert torch.equal(trace.real(), bools("xxxxxx"))


def test_the_record_of_a_run_tells_what_each_forward_was() -> None:
    model, given = routed_model(Case(granularity="attn_sequence", sink=5, window=3)), batch()
    result = run(model, given, CHUNKS["chunked"])
    assert [f.start for f in result.trace.forwards] == [0, 7, 8, 14]
    assert torch.equal(result.trace.real(), given.real)
    assert result.trace.unit_names == tuple(f"layers.{i}.attn" for i in range(4))
    for keep in result.trace.decisions().values():
        assert not keep[~given.real].any()
    for forward in result.trace.forwards:
        assert forward.kept_keys_only
        for unit in forward.units.values():
            assert unit.logits_BT is not None
            assert unit.logits_BT.dtype is torch.float32
            assert not unit.logits_BT.requires_grad
            # Once every row has its prefix, nothing runs in any case.
            assert (unit.always_BT is None) == (forward.start >= 7)
    logits = result.trace.logits()["layers.0.attn"]
    later = given.positions >= 3
    decided = (logits >= 0) & given.real & later
    assert torch.equal(result.trace.decisions()["layers.0.attn"] & later, decided)


def test_an_interrupted_forward_leaves_no_half_record() -> None:
    model, given = routed_model(), batch()

    def stop(*_: object) -> None:
        raise RuntimeError("stop")

    hook = model.model.layers[2].register_forward_pre_hook(stop)
    with torch.no_grad(), record(model) as trace:
        with pytest.raises(RuntimeError, match="stop"):
            model(given.ids, attention_mask=given.mask)
        hook.remove()
        model(given.ids, attention_mask=given.mask)
    assert len(trace.forwards) == 1
    assert len(trace.forwards[0].units) == 4


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_masked_path_records_gates_with_a_gradient(checkpoint: bool) -> None:
    model, given = routed_model(), batch()
    model.train()
    if checkpoint:
        checkpoint_activations(model, {"use_reentrant": False})
    with record(model) as trace:
        model(given.ids, attention_mask=given.mask).logits.sum().backward(retain_graph=True)
    assert len(trace.forwards) == 1
    model.zero_grad()
    for index, (name, unit) in enumerate(trace.forwards[0].units.items()):
        assert name == f"layers.{index}.attn"
        assert unit.soft_BT is not None
        assert torch.equal(unit.soft_BT.bool() & given.real, unit.keep_BT)
        unit.soft_BT.sum().backward(retain_graph=True)
        grad = model.model.layers[index].skip_router_attn.score.weight.grad
        assert grad is not None
        assert grad.any()


def test_gradients_survive_checkpointing() -> None:
    """The context reaches a layer that is run again in the backward pass."""
    model, given = routed_model(Case("gemma3", sink=5, window=3)), batch()
    gradients = []
    for checkpoint in (False, True):
        model.train()
        if checkpoint:
            checkpoint_activations(model, {"use_reentrant": False})
        model.zero_grad()
        model(given.ids, attention_mask=given.mask).logits[given.real].square().mean().backward()
        gradients.append(
            [layer.skip_router_attn.score.weight.grad.clone() for layer in model.model.layers]
        )
    for plain, again in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(plain, again)


def test_nothing_is_recorded_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    attach(model, RoutingConfig(granularity=("attn_token", "mlp_token")))

    def refuse(*_: object) -> None:
        raise AssertionError("an entry was made")

    monkeypatch.setattr("router_tuning.execution.call.UnitRecord", refuse)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        model(input_ids=ids)
        with pytest.raises(AssertionError, match="entry"), record(model):
            model(input_ids=ids)


def test_layers_that_are_not_routed_are_not_recorded() -> None:
    model, given = tiny_model(), batch()
    attach(model, RoutingConfig(layers=[3, 1]))
    result = run(model, given)
    assert result.trace.unit_names == ("layers.1.attn", "layers.3.attn")
    assert list(result.trace.decisions()) == ["layers.1.attn", "layers.3.attn"]
    assert result.trace.num_units == 4


# Comparing


def two(logits_a: list[float], logits_b: list[float]) -> tuple[Trace, Trace]:
    """Two traces of one unit, decided by logits at a threshold of 0.5."""
    traces = []
    for logits in (logits_a, logits_b):
        logits_BT = torch.tensor([logits])
        keep_BT = logits_BT >= 0.5
        unit = UnitRecord(keep_BT, keep_BT, logits_BT, torch.tensor([[0.5]]))
        real = torch.ones_like(keep_BT)
        traces.append(Trace(1, ("a",), [ForwardRecord(0, real, True, {"a": unit})]))
    return traces[0], traces[1]


def test_flips_near_the_threshold_are_counted_and_forgiven() -> None:
    assert same_decisions(*two([0.1, 0.9], [0.1, 0.9]), delta=0.01) == (True, 0)
    assert same_decisions(*two([0.1, 0.501], [0.1, 0.499]), delta=0.01) == (True, 1)
    assert same_decisions(*two([0.1, 0.6], [0.1, 0.499]), delta=0.01) == (False, 0)
    assert same_decisions(*two([0.499, 0.6], [0.501, 0.1]), delta=0.01) == (False, 1)


def test_decisions_of_another_batch_cannot_be_replayed() -> None:
    model, given = routed_model(), batch()
    decisions = run(model, given).trace.decisions()
    with pytest.raises(UnsupportedCallError, match="cover 3 rows and 20 columns"):
        run(model, batch(2), decisions=decisions)
    with pytest.raises(UnsupportedCallError, match="up to column 22"):
        run(model, batch(3, 22), decisions=decisions)
    shorter = Batch(given.ids[:, :9], given.mask[:, :9])
    assert torch.equal(run(model, shorter, decisions=decisions).trace.real(), given.real[:, :9])
