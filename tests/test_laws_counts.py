"""Laws 6 and 10: skipped means not called, and what is reported is what ran.

The rows that enter each projection are counted by hooks, and compared with the record, the cache
and the cost model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from laws import CASES, CHUNKS, Batch, Case, Counter, Run, batch, held_columns, routed_model, run
from router_tuning import routing_of
from router_tuning.cost import cost, flops_fraction
from router_tuning.execution.cache import RoutedCacheLayer
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.units import decoder_layers
from tiny import VOCAB_SIZE

every_case = pytest.mark.parametrize("case", CASES, ids=str)
attention_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if "attn" in c.granularity], ids=str
)
mlp_cases = pytest.mark.parametrize("case", [c for c in CASES if "mlp" in c.granularity], ids=str)
every_phase = pytest.mark.parametrize("phase", ["uncached", *CHUNKS])


@dataclass(frozen=True)
class Observed:
    """A model, a batch, what running it recorded, and the rows that entered each projection."""

    model: PreTrainedModel
    given: Batch
    result: Run
    rows: dict[tuple[int, str], int]


@functools.cache
def observed(case: Case, phase: str, padded: bool) -> Observed:
    """Run a case once for all tests that look at it."""
    model, given = routed_model(case), batch(padded=padded)
    with Counter(model) as counter:
        result = run(model, given, chunks_of(phase))
    layers = range(len(decoder_layers(model.model)))
    parts = (*Counter.NAMES, Counter.MLP)
    rows = {(i, name): counter.rows.get((i, name), 0) for i in layers for name in parts}
    return Observed(model, given, result, rows)


def chunks_of(phase: str) -> list[int] | None:
    return CHUNKS.get(phase)


def names(model: nn.Module, kind: str = "attn") -> dict[int, str]:
    """The routed units of a kind, by their layers."""
    units = routing_of(model).units
    return {unit.layer_idx: unit.name for unit in units if unit.kind == kind}


# Law 6: skipped means not called


@every_phase
@attention_cases
def test_counted_rows_equal_the_record(case: Case, phase: str) -> None:
    seen = observed(case, phase, padded=True)
    model, given, result, rows = seen.model, seen.given, seen.result, seen.rows
    for index, name in names(model).items():
        keep = write = pads = 0
        moved = False  # the cache has left the dense layer's hands
        for forward in result.trace.forwards:
            unit = forward.units[name]
            real = int(forward.real_BT.sum())
            keep += int(unit.keep_BT.sum())
            write += int(unit.write_BT.sum())
            if int(unit.keep_BT.sum()) == real and not moved:
                pads += (
                    forward.real_BT.numel() - real
                )  # the dense call itself, which computes pads too
            elif phase != "uncached" and case.kv == "kept":
                moved = True
        assert rows[index, "q_proj"] == keep + pads
        assert rows[index, "o_proj"] == keep + pads
        assert rows[index, "k_proj"] == write + pads
        assert rows[index, "v_proj"] == write + pads
    real = int(given.real.sum())
    total = sum(rows[index, "q_proj"] for index in names(model))
    assert total < 0.9 * real * len(names(model))


@every_phase
@mlp_cases
def test_counted_rows_of_mlps_equal_the_record(case: Case, phase: str) -> None:
    seen = observed(case, phase, padded=True)
    total = 0
    for index, name in names(seen.model, "mlp").items():
        wanted = 0
        for forward in seen.result.trace.forwards:
            unit = forward.units[name]
            assert unit.write_BT is None
            kept, real = int(unit.keep_BT.sum()), int(forward.real_BT.sum())
            # Where all are kept it is the dense call itself, which computes pads too.
            wanted += forward.real_BT.numel() if kept == real else kept
        assert seen.rows[index, Counter.MLP] == wanted
        total += wanted
    assert 0 < total < 0.9 * 4 * seen.given.ids.numel()


@every_phase
@attention_cases
def test_writes_are_what_the_policy_names(case: Case, phase: str) -> None:
    seen = observed(case, phase, padded=True)
    given, result = seen.given, seen.result
    sink = given.real & (given.positions < case.sink)
    for name in names(seen.model).values():
        keep = result.trace.decisions()[name]
        write = torch.cat([f.units[name].write_BT for f in result.trace.forwards], dim=1)
        if case.kv == "all" or case.window:
            assert torch.equal(write, given.real)
        else:
            assert torch.equal(write, keep | sink)


@pytest.mark.parametrize("phase", CHUNKS)
@attention_cases
def test_the_cache_holds_exactly_the_keys_that_the_policy_names(case: Case, phase: str) -> None:
    seen = observed(case, phase, padded=True)
    model, given, result = seen.model, seen.given, seen.result
    layers = decoder_layers(model.model)
    for index, name in names(model).items():
        held = result.cache.layers[index]
        keep = result.trace.decisions()[name]
        if case.kv == "all":
            assert getattr(held, "store", None) is None
            continue
        assert isinstance(held, RoutedCacheLayer)
        assert held.get_seq_length() == given.ids.shape[1]
        store = held.store
        if store is None:  # nothing was skipped
            assert torch.equal(keep, given.real)
            continue
        sliding = sliding_window_of(layers[index].self_attn)
        wanted = held_columns(case, keep, given.real, sliding)
        assert store.held() == sum(map(len, wanted))
        _, _, columns_BS = store.view()
        for row, columns in enumerate(columns_BS.tolist()):
            used = [column for column in columns if column >= 0]
            assert len(used) == len(set(used))
            assert wanted[row] <= set(used)
            assert all(given.real[row, column] for column in used), "a pad's key was cached"
            if not case.window and sliding is None:
                assert set(used) == wanted[row]


@pytest.mark.parametrize("kv", ["all", "kept"])
def test_a_unit_that_skips_all_runs_nothing(kv: str) -> None:
    model, given = routed_model(Case(kv=kv)), batch()
    none = {name: torch.zeros_like(given.real) for name in names(model).values()}
    for phase in ("uncached", *CHUNKS):
        with Counter(model) as counter:
            result = run(model, given, chunks_of(phase), decisions=none)
        assert result.trace.kept_fraction() == 0.0
        queried = [n for (_, name), n in counter.rows.items() if name in ("q_proj", "o_proj") and n]
        assert not queried
        written = sum(n for (_, name), n in counter.rows.items() if name == "k_proj")
        cached = phase != "uncached" and kv == "all"
        assert written == (4 * int(given.real.sum()) if cached else 0)


# Law 10: what is reported is what ran


def pairs_by_hand(case: Case, keep: torch.Tensor, real: torch.Tensor, sliding: int | None) -> int:
    """Pairs of an asking query and a key it sees, one by one."""
    total = 0
    for keep_C, real_C in zip(keep.tolist(), real.tolist(), strict=True):
        position = [sum(real_C[: c + 1]) - 1 for c in range(len(real_C))]
        for query in range(len(keep_C)):
            if not keep_C[query]:
                continue
            for key in range(query + 1):
                near = query - key < max(case.window, 1)
                sink = position[key] < case.sink
                seen = case.kv == "all" or keep_C[key] or sink or near
                if real_C[key] and seen and (sliding is None or key > query - sliding):
                    total += 1
    return total


@every_phase
@every_case
def test_the_cost_equals_the_counted_calls(case: Case, phase: str) -> None:
    seen = observed(case, phase, padded=False)
    model, given, result, rows = seen.model, seen.given, seen.result, seen.rows
    layers = decoder_layers(model.model)
    tokens = given.ids.numel()
    routed = dense = 0
    held = dense_held = 0
    decisions = result.trace.decisions()
    for index in range(len(layers)):
        attention = layers[index].self_attn
        sliding = sliding_window_of(attention)
        keep = decisions.get(f"layers.{index}.attn", given.real)
        policy = case if f"layers.{index}.attn" in decisions else Case(kv="all")
        pair = 4 * attention.head_dim * 4  # score and sum, four heads
        sizes = {n: 2 * getattr(attention, n).weight.numel() for n in Counter.NAMES}
        routed += sum(sizes[n] * rows[index, n] for n in sizes)
        routed += pair * pairs_by_hand(policy, keep, given.real, sliding)
        dense += tokens * sum(sizes.values())
        dense += pair * pairs_by_hand(Case(kv="all"), given.real, given.real, sliding)
        mlp = layers[index].mlp
        size = 2 * sum(p.weight.numel() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        routed, dense = routed + size * rows[index, Counter.MLP], dense + size * tokens
        kept = given.real if policy.kv == "all" else keep
        held += sum(map(len, held_columns(policy, kept, given.real, sliding)))
        dense_held += sum(map(len, held_columns(Case(), given.real, given.real, sliding)))
    routed += 2 * (32 + 1) * tokens * len(decisions)  # the routers' weights and biases
    head = 2 * tokens * 32 * VOCAB_SIZE
    found = cost(model, result.trace)
    assert found.flops == routed + head
    assert found.dense_flops == dense + head
    assert flops_fraction(model, result.trace) == found.flops / found.dense_flops < 1
    per_key = 2 * 2 * 8 * 4  # keys and values, two heads of eight, fp32
    assert found.dense_kv_bytes == per_key * dense_held
    assert found.kv_bytes == per_key * held


@every_phase
@every_case
def test_the_kept_fraction_equals_the_counted_queries(case: Case, phase: str) -> None:
    seen = observed(case, phase, padded=False)
    model, result = seen.model, seen.result
    entered = {"attn": "q_proj", "mlp": Counter.MLP}
    ran = {
        unit.name: seen.rows[unit.layer_idx, entered[unit.kind]] for unit in routing_of(model).units
    }
    tokens = seen.given.ids.numel()
    assert result.trace.kept_fraction() == pytest.approx(sum(ran.values()) / (len(ran) * tokens))
    for name, n in ran.items():
        assert result.trace.kept_per_unit()[name] == pytest.approx(n / tokens), name


def counted(model: nn.Module, given: Batch, chunks: list[int] | None) -> tuple[Run, dict[str, int]]:
    """A run, and the FLOPs of torch's own counter by operator."""
    with FlopCounterMode(display=False) as counter:
        result = run(model, given, chunks)
    return result, {str(op): int(n) for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("phase", ["uncached", "prefill", "decode"])
@pytest.mark.parametrize(
    "case", [Case(kv="all"), Case(), Case(sink=5, window=3), Case("qwen2")], ids=str
)
def test_the_cost_equals_torchs_flop_counter(case: Case, phase: str) -> None:
    """All terms agree but two, which are counted here: bias additions and what rectangles add.

    The cost model counts a router's bias (torch's counter leaves biases out) and only the visible
    pairs of query and key; eager attention multiplies the whole rectangle of queries and keys,
    hidden pairs included, so torch's count of `bmm` is an upper bound. The rotary table's outer
    product is no part of the cost model.
    """
    model = routed_model(case, attn_implementation="eager")
    given = batch(rows=1, padded=False)
    result, operators = counted(model, given, chunks_of(phase))
    found = cost(model, result.trace)
    tokens = given.ids.numel()
    linear = sum(n for op, n in operators.items() if op in ("aten.mm", "aten.addmm"))
    attention = operators["aten.bmm"] - 2 * (8 // 2) * tokens  # without the rotary table
    layers = decoder_layers(model.model)
    pairs = sum(
        pairs_by_hand(
            case, result.trace.decisions()[n], given.real, sliding_window_of(layers[i].self_attn)
        )
        for i, n in names(model).items()
    )
    biases = 2 * tokens * len(layers)
    assert linear + biases + 4 * 32 * pairs == found.flops
    assert attention >= 4 * 32 * pairs
    if (
        phase == "decode" and not case.window
    ):  # one query a step sees all that is there, but in the prefill
        prefill = CHUNKS["decode"][0]
        hidden = prefill * (prefill - 1) // 2 * len(layers)
        assert attention <= 4 * 32 * (pairs + hidden)


def test_the_cost_of_a_dense_looking_trace_is_the_dense_cost_and_its_routers() -> None:
    model, given = routed_model(), batch(padded=False)
    all_of_it = {name: given.real for name in names(model).values()}
    found = cost(model, run(model, given, decisions=all_of_it).trace)
    assert found.flops - found.dense_flops == 4 * 2 * 33 * given.ids.numel()
    assert found.kv_bytes == found.dense_kv_bytes
