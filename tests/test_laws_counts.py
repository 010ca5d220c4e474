"""Laws 6 and 10: skipped means not called, and what is reported is what ran.

The rows that enter each linear layer are counted by hooks, and compared with the record, the cache
and the cost model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from laws import (
    CASES,
    CHUNKS,
    EXPANDING,
    REPRESENTATIVES,
    Batch,
    Case,
    Counter,
    Run,
    batch,
    bytes_in,
    held_columns,
    pairs_by_hand,
    routed_model,
    run,
)
from router_tuning import dense, routing_of
from router_tuning.cost import cost, flops_fraction
from router_tuning.execution.cache import RoutedCacheLayer
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.record import Trace
from router_tuning.units import attention_of, decoder_layers, decoder_of
from tiny import FAMILIES, VOCAB_SIZE

# A chunked text begins with a prefill, which is looked at alone in some families only.
PHASES = [
    (case, phase)
    for case in CASES
    for phase in ("uncached", *CHUNKS)
    if phase != "prefill" or case.family in REPRESENTATIVES
]
every_case_and_phase = pytest.mark.parametrize(("case", "phase"), PHASES, ids=str)


@dataclass(frozen=True)
class Observed:
    """A model, a batch, what running it recorded, and what entered each linear layer."""

    model: PreTrainedModel
    given: Batch
    result: Run
    counter: Counter


def observe(case: Case, phase: str, padded: bool) -> Observed:
    """Run a case, with all that is to be looked at."""
    model, given = routed_model(case), batch(padded=padded)
    with Counter(model) as counter:
        result = run(model, given, chunks_of(phase))
    return Observed(model, given, result, counter)


def chunks_of(phase: str) -> list[int] | None:
    return CHUNKS.get(phase)


def names(model: nn.Module, kinds: tuple[str, ...] = ("attn", "block")) -> dict[int, str]:
    """The routed units of some kinds, by their layers."""
    units = routing_of(model).units
    return {unit.layer_idx: unit.name for unit in units if unit.kind in kinds}


def attentions(model: nn.Module) -> list[Any]:
    decoder = decoder_of(model)
    return [attention_of(decoder, layer) for layer in decoder_layers(decoder)]


# Law 6: skipped means not called


@every_case_and_phase
def test_what_was_called_is_what_was_recorded(case: Case, phase: str) -> None:
    seen = observe(case, phase, padded=True)
    if "attn" in case.granularity or "block" in case.granularity:
        check_rows_of_attentions(case, phase, seen)
        check_writes(case, seen)
    if "mlp" in case.granularity:
        check_rows_of_mlps(seen)
    if phase != "uncached":
        check_the_cache(case, seen)


def check_rows_of_attentions(case: Case, phase: str, seen: Observed) -> None:
    """Rows that entered attentions, and the rest of routed blocks."""
    total = 0
    for index, name in names(seen.model).items():
        keep = write = pads = 0
        moved = False  # the cache has left the dense layer's hands
        for forward in seen.result.trace.forwards:
            unit = forward.units[name]
            real = int(forward.real_BT.sum())
            keep += int(unit.keep_BT.sum())
            write += int(unit.write_BT.sum())
            if int(unit.keep_BT.sum()) == real and not moved:
                # the dense call itself, which computes pads too
                pads += forward.real_BT.numel() - real
            elif phase != "uncached" and case.kv == "kept":
                moved = True
        entered = seen.counter.entered
        assert set(entered(index, "query")) == {keep + pads}
        assert set(entered(index, "key")) == {write + pads}
        if "block" in case.granularity:
            assert set(entered(index, "mlp")) == {keep + pads}
        total += keep + pads
    real = int(seen.given.real.sum())
    assert 0 < total < 0.9 * real * len(names(seen.model))


def check_rows_of_mlps(seen: Observed) -> None:
    total = 0
    for index, name in names(seen.model, ("mlp",)).items():
        wanted = 0
        for forward in seen.result.trace.forwards:
            unit = forward.units[name]
            assert unit.write_BT is None
            kept, real = int(unit.keep_BT.sum()), int(forward.real_BT.sum())
            # Where all are kept it is the dense call itself, which computes pads too.
            wanted += forward.real_BT.numel() if kept == real else kept
        assert set(seen.counter.entered(index, "mlp")) == {wanted}
        total += wanted
    assert 0 < total < 0.9 * 4 * seen.given.ids.numel()


def check_writes(case: Case, seen: Observed) -> None:
    """Keys are made for the tokens that the policy names."""
    given, result = seen.given, seen.result
    sink = given.real & (given.positions < case.sink)
    for name in names(seen.model).values():
        keep = result.trace.decisions()[name]
        write = torch.cat([f.units[name].write_BT for f in result.trace.forwards], dim=1)
        if case.kv == "all" or case.window:
            assert torch.equal(write, given.real)
        else:
            assert torch.equal(write, keep | sink)


def check_the_cache(case: Case, seen: Observed) -> None:
    """The cache holds the keys that the policy names, and no pad's."""
    given, result = seen.given, seen.result
    for index, name in names(seen.model).items():
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
        sliding = sliding_window_of(attentions(seen.model)[index])
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


@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
@pytest.mark.parametrize("kv", ["all", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_that_skips_all_runs_nothing(family: str, kv: str, granularity: str) -> None:
    model, given = routed_model(Case(family, granularity, kv)), batch()
    none = {name: torch.zeros_like(given.real) for name in names(model).values()}
    for phase in ("uncached", "chunked"):
        with Counter(model) as counter:
            result = run(model, given, chunks_of(phase), decisions=none)
        assert result.trace.kept_fraction() == 0.0
        written = int(given.real.sum()) if phase != "uncached" and kv == "all" else 0
        for index in range(4):
            assert set(counter.entered(index, "query")) == {0}
            assert set(counter.entered(index, "key")) == {written}
            if "block" in granularity:
                assert set(counter.entered(index, "mlp")) == {0}


# Law 10: what is reported is what ran


def expansions_by_hand(case: Case, trace: Trace, name: str, sliding: int | None) -> int:
    """How many latent keys are made long, one by one: in each forward, in each row that asks, those
    left of earlier forwards and the new ones.
    """
    total, past = 0, 0
    keep = trace.decisions()[name]
    for forward in trace.forwards:
        unit, new = forward.units[name], forward.real_BT.shape[1]
        for row in range(len(keep)):
            if not unit.keep_BT[row].any():
                continue
            for key in range(past):
                lasts = case.kv == "all" or keep[row, key] or key < case.sink  # without padding
                near = past - key < max(case.window, 1)
                total += bool((lasts or near) and (sliding is None or key > past - sliding))
            total += int(unit.write_BT[row].sum())
        past += new
    return total


@functools.cache
def dense_flops(family: str, phase: str) -> tuple[float, tuple[int, ...]]:
    """FLOPs of the linear layers of a dense run, and each layer's bytes of a cached key."""
    model, given = routed_model(Case(family)), batch(padded=False)
    with Counter(model) as counter, dense(model):
        run(model, given, chunks_of(phase))
    with dense(model):
        cache = run(model, given, [20]).cache
    widths = (sum(x[:1, :, :1].nbytes for x in (c.keys, c.values)) for c in cache.layers)
    return sum(counter.flops.values()), tuple(widths)


def pair_flops(attention: Any) -> int:
    """A score and a weighted sum, in four heads."""
    value = getattr(attention, "v_head_dim", 8)
    return 2 * 4 * (getattr(attention, "qk_head_dim", 8) + value)


@every_case_and_phase
def test_what_is_reported_is_what_ran(case: Case, phase: str) -> None:
    seen = observe(case, phase, padded=False)
    check_the_kept_fraction(seen)
    check_the_cost(case, phase, seen)


def check_the_cost(case: Case, phase: str, seen: Observed) -> None:
    """FLOPs equal what entered the linear layers, and the pairs and keys one by one; bytes equal
    the cache's.
    """
    model, given, result, counter = seen.model, seen.given, seen.result, seen.counter
    decisions, attending = result.trace.decisions(), names(seen.model)
    tokens = given.ids.numel()
    expanding = [place for place in counter.flops if counter.role(place[1]) == "expand"]
    routed: float = sum(n for place, n in counter.flops.items() if place not in expanding)
    wide, key_bytes = dense_flops(case.family, phase)
    held = dense_held = 0
    for index, attention in enumerate(attentions(model)):
        sliding, name = sliding_window_of(attention), attending.get(index)
        keep = given.real if name is None else decisions[name]
        policy = Case(kv="all") if name is None else case
        pair = pair_flops(attention)
        routed += pair * pairs_by_hand(policy, keep, given.real, sliding)
        wide += pair * pairs_by_hand(Case(kv="all"), given.real, given.real, sliding)
        kept = given.real if policy.kv == "all" else keep
        held += key_bytes[index] * sum(map(len, held_columns(policy, kept, given.real, sliding)))
        everything = held_columns(Case(), given.real, given.real, sliding)
        dense_held += key_bytes[index] * sum(map(len, everything))
    for index, layer_name in expanding:
        weight = attentions(model)[index].get_submodule(layer_name.rpartition(".")[2]).weight
        if index in attending:
            sliding = sliding_window_of(attentions(model)[index])
            long = expansions_by_hand(case, result.trace, attending[index], sliding)
            assert long <= counter.rows[index, layer_name]  # which may have some filling
            routed += 2 * weight.numel() * long
        else:
            routed += counter.flops[index, layer_name]
    routed += 2 * (32 + 1) * tokens * len(decisions)  # the routers' weights and biases
    head = 2 * tokens * 32 * VOCAB_SIZE
    found = cost(model, result.trace)
    assert found.flops == routed + head
    assert found.dense_flops == wide + head
    assert flops_fraction(model, result.trace) == found.flops / found.dense_flops < 1
    assert found.dense_kv_bytes == dense_held
    assert found.kv_bytes == held
    if phase != "uncached":
        assert found.kv_bytes == sum(map(bytes_in, result.cache.layers))


def check_the_kept_fraction(seen: Observed) -> None:
    model, result = seen.model, seen.result
    role = {"attn": "query", "block": "query", "mlp": "mlp"}
    ran = {
        unit.name: max(seen.counter.entered(unit.layer_idx, role[unit.kind]))
        for unit in routing_of(model).units
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


TORCH_CASES = [
    Case(family, granularity, **policy)  # type: ignore[arg-type]
    for family in FAMILIES
    for granularity, policy in (
        ("attn_token", {"kv": "all"}),
        ("attn_token", {}),
        ("attn_token", {"sink": 5, "window": 3}),
        ("block_token", {"kv": "all"}),
        ("block_token", {"sink": 5, "window": 3}),
        ("mlp_token", {"kv": "all"}),
    )
]


@pytest.mark.parametrize("phase", ["uncached", "decode"])
@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_the_cost_equals_torchs_flop_counter(case: Case, phase: str) -> None:
    """All terms agree but what is counted here: bias additions, and what rectangles add.

    The cost model counts a router's bias (torch's counter leaves biases out) and only the visible
    pairs of query and key; eager attention multiplies the whole rectangle of queries and keys,
    hidden pairs included, so torch's count of `bmm` is an upper bound (it has rotary tables in it,
    too). Of a window of latent keys, also the places of kept tokens are made long.
    """
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = routed_model(case, **options)
    given = batch(rows=1, padded=False)
    result, operators = counted(model, given, chunks_of(phase))
    found = cost(model, result.trace)
    linear = sum(n for op, n in operators.items() if op in ("aten.mm", "aten.addmm"))
    biases = 2 * given.ids.numel() * 4
    pairs = scores = 0
    for index, attention in enumerate(attentions(model)):
        name, sliding = names(model).get(index), sliding_window_of(attention)
        keep = given.real if name is None else result.trace.decisions()[name]
        policy = Case(kv="all") if name is None else case
        number = pairs_by_hand(policy, keep, given.real, sliding)
        pairs, scores = pairs + number, scores + number * pair_flops(attention)
    extra = linear + biases + scores - found.flops
    if case.window and hasattr(attentions(model)[0], EXPANDING):
        a_key = 2 * getattr(attentions(model)[0], EXPANDING).weight.numel()
        assert extra % a_key == 0
        assert 0 <= extra <= 4 * (case.window - 1) * (len(result.trace.forwards) - 1) * a_key
    else:
        assert extra == 0
    assert operators["aten.bmm"] >= scores
    if phase == "decode" and case.family in ("llama", "qwen2") and not case.window:
        # One query a step sees all that is there, but in the prefill; beside the rotary table.
        prefill = CHUNKS["decode"][0]
        hidden = prefill * (prefill - 1) // 2 * 4
        rotary = 2 * (8 // 2) * given.ids.numel()
        assert operators["aten.bmm"] - rotary <= 4 * 32 * (pairs + hidden)


def test_the_cost_of_a_dense_looking_trace_is_the_dense_cost_and_its_routers() -> None:
    for family in REPRESENTATIVES:
        model, given = routed_model(Case(family)), batch(padded=False)
        all_of_it = {name: given.real for name in names(model).values()}
        found = cost(model, run(model, given, decisions=all_of_it).trace)
        assert found.flops - found.dense_flops == 4 * 2 * 33 * given.ids.numel()
        assert found.kv_bytes == found.dense_kv_bytes
