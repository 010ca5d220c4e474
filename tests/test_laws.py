"""Laws 1 to 3: fresh routers change nothing, skipping equals masking, cached equals uncached.

Over family x granularity x key/value policy x phase; laws.py says how outputs and decisions are
compared.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from laws import (
    CASES,
    CHUNKS,
    EFFECT,
    LOGIT_TOLERANCE,
    MORE_CASES,
    SOME_CASES,
    Batch,
    Case,
    Run,
    assert_close,
    assert_mixed,
    assert_same_decisions,
    bare_model,
    batch,
    calibrate_by_hand,
    difference,
    over,
    randomize,
    routed_model,
    run,
    with_family,
)
from router_tuning import attach, dense, detach, execute, record, replay, routing_of, set_budget
from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.context import routers_of
from router_tuning.record import Trace
from router_tuning.units import decoder_of, family_of
from tiny import FAMILIES, checkpoint_activations

every_case = pytest.mark.parametrize("case", CASES, ids=str)
more_cases = pytest.mark.parametrize("case", MORE_CASES, ids=str)
some_cases = pytest.mark.parametrize("case", SOME_CASES, ids=str)
every_family = pytest.mark.parametrize("family", FAMILIES)
# Eager attention differs in masks only, so not in what decides.
IMPLEMENTATIONS = [(case, "sdpa") for case in CASES] + [
    (case, "eager") for case in SOME_CASES if case.granularity in ("attn_token", "block_token")
]
every_phase = pytest.mark.parametrize("phase", CHUNKS)


# Law 1: fresh routers change nothing


@pytest.mark.parametrize(("case", "implementation"), IMPLEMENTATIONS, ids=str)
def test_fresh_routers_change_no_bit(case: Case, implementation: str) -> None:
    model = bare_model(case.family, attn_implementation=implementation)
    given = batch()
    before = [bare_logits(model, given, chunks) for chunks in (None, *CHUNKS.values())]
    attach(model, case.config)
    for chunks, logits in zip((None, *CHUNKS.values()), before, strict=True):
        routed = run(model, given, chunks)
        assert torch.equal(routed.logits, logits)
        assert routed.trace.kept_fraction() == 1.0
    assert torch.equal(run(model, given, path="masked").logits, before[0])


def bare_logits(model: Any, given: Batch, chunks: list[int] | None) -> Tensor:
    """Every token's logits from a model that has never been routed."""
    with torch.no_grad():
        if chunks is None:
            return model(
                given.ids, attention_mask=given.mask, position_ids=given.positions, use_cache=False
            ).logits
        cache, parts, start = DynamicCache(config=model.config), [], 0
        for length in chunks:
            columns = slice(start, start + length)
            out = model(
                given.ids[:, columns],
                attention_mask=given.mask[:, : start + length],
                position_ids=given.positions[:, columns],
                **over(cache),
            )
            parts.append(out.logits)
            start += length
        return torch.cat(parts, dim=1)


@every_family
@pytest.mark.parametrize("training", [False, True])
def test_fresh_routers_change_no_bit_with_grad(family: str, training: bool) -> None:
    model, given = bare_model(family).train(training), batch()
    before = model(given.ids, attention_mask=given.mask, position_ids=given.positions).logits
    attach(model, with_family(family).config)
    routed = model(given.ids, attention_mask=given.mask, position_ids=given.positions).logits
    assert routed.requires_grad
    assert torch.equal(routed, before)


@every_family
@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
def test_activation_checkpointing_changes_no_gradient_or_is_refused(
    family: str, granularity: str
) -> None:
    """It runs layers again, where families that hand no keywords on have lost what was decided."""
    model, given = routed_model(Case(family, granularity, "all")), batch()
    model.requires_grad_(False)
    for router in routers_of(model).values():
        router.requires_grad_(True)
    plain = router_gradients(model, given)
    checkpoint_activations(model, {"use_reentrant": False})
    model.train()
    if not family_of(decoder_of(model)).keywords:
        with pytest.raises(UnsupportedCallError, match="activation checkpointing runs layers of"):
            router_gradients(model, given)
        model.eval()
        assert plain.equal(router_gradients(model, given))
    else:
        torch.testing.assert_close(plain, router_gradients(model, given))


def router_gradients(model: Any, given: Batch) -> Tensor:
    """Of a loss, in all routers."""
    model.zero_grad()
    logits = model(given.ids, attention_mask=given.mask, position_ids=given.positions).logits
    logits[given.real].square().mean().backward()
    return torch.cat([p.grad.flatten() for r in routers_of(model).values() for p in r.parameters()])


@every_family
def test_fresh_routers_change_no_bit_in_bf16(family: str) -> None:
    model, given = bare_model(family).to(torch.bfloat16), batch()
    before = bare_logits(model, given, None)
    attach(model, with_family(family).config)
    assert torch.equal(run(model, given).logits, before)
    assert torch.equal(run(model, given, path="masked").logits, before)


def objects(model: nn.Module) -> dict[str, tuple[nn.Module, dict[str, object]]]:
    """Each module with all its attributes, and the entries of its dictionaries."""
    found: dict[str, tuple[nn.Module, dict[str, object]]] = {}
    for name, module in model.named_modules():
        attributes: dict[str, object] = {}
        for key, value in module.__dict__.items():
            attributes[key] = value
            if isinstance(value, dict):
                attributes.update({f"{key}[{inner!r}]": entry for inner, entry in value.items()})
        found[name] = (module, attributes)
    return found


@every_family
def test_detach_gives_back_the_same_objects(family: str) -> None:
    model, given = bare_model(family), batch()
    before = bare_logits(model, given, None)
    keys, modules = list(model.state_dict()), objects(model)
    attach(model, with_family(family).config)
    randomize(model)
    run(model, given, CHUNKS["chunked"])
    with dense(model):
        run(model, given)
    model(given.ids, attention_mask=given.mask).logits.sum().backward()
    model.zero_grad()
    detach(model)
    after = objects(model)
    assert list(model.state_dict()) == keys
    assert list(after) == list(modules)
    for name, (module, attributes) in modules.items():
        assert after[name][0] is module
        assert list(after[name][1]) == list(attributes), name
        assert all(after[name][1][key] is value for key, value in attributes.items()), name
    assert torch.equal(bare_logits(model, given, None), before)


@every_family
def test_dense_and_disabled_are_the_base_model_to_the_bit(family: str) -> None:
    model, given = bare_model(family), batch()
    before = bare_logits(model, given, CHUNKS["chunked"])
    attach(model, with_family(family).config)
    randomize(model)
    assert difference(run(model, given).logits, before, given.real) > EFFECT
    with dense(model), record(model) as trace:
        assert torch.equal(bare_logits(model, given, CHUNKS["chunked"]), before)
    assert not trace.forwards
    routing_of(model).enabled = False
    assert torch.equal(bare_logits(model, given, CHUNKS["chunked"]), before)


def test_budget_one_is_the_base_model_to_the_bit() -> None:
    model, given = bare_model("llama"), batch()
    before = bare_logits(model, given, None)
    attach(model, Case().config)
    randomize(model)
    assert torch.equal(run(model, given, budget=1.0).logits, before)
    set_budget(model, 1.0)
    assert torch.equal(run(model, given).logits, before)
    assert torch.equal(run(model, given, path="masked").logits, before)


# Law 2: skipping equals masking


@pytest.mark.parametrize(("case", "implementation"), IMPLEMENTATIONS, ids=str)
def test_skipping_equals_masking(case: Case, implementation: str) -> None:
    model, given = routed_model(case, attn_implementation=implementation), batch()
    skipped, masked = run(model, given), run(model, given, path="masked")
    assert_mixed(skipped.trace)
    assert_same_decisions(skipped, masked)
    replayed = run(model, given, decisions=skipped.trace.decisions(), path="masked")
    assert_close(skipped, replayed, given.real)
    with dense(model):
        assert difference(run(model, given).logits, skipped.logits, given.real) > EFFECT


def every_expert(family: str) -> dict[str, int]:
    """Options with which a token goes through all experts: rounding may else choose others."""
    has_experts = hasattr(bare_model(family).config, "num_experts_per_tok")
    return {"num_experts_per_tok": 4} if has_experts else {}


@every_family
def test_skipping_equals_masking_in_bf16(family: str) -> None:
    model = routed_model(with_family(family), **every_expert(family)).to(torch.bfloat16)
    for (
        router
    ) in model.modules():  # routers stay in fp32, as they do in a bf16 model that is routed
        if type(router).__name__ == "LinearRouter":
            router.float()
    given = batch()
    skipped = run(model, given)
    assert skipped.logits.dtype is torch.bfloat16
    masked = run(model, given, path="masked", decisions=skipped.trace.decisions())
    assert_close(skipped, masked, given.real)
    decoded = run(model, given, CHUNKS["decode"], decisions=skipped.trace.decisions())
    assert_close(skipped, decoded, given.real)
    with dense(model):
        assert difference(run(model, given).logits, skipped.logits, given.real) > EFFECT


@every_family
@pytest.mark.parametrize("path", ["skipping", "masked"])
def test_autocast_runs_and_agrees_roughly_with_fp32(family: str, path: str) -> None:
    model, given = routed_model(with_family(family), **every_expert(family)), batch()
    full = run(model, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(model, given, path=path, decisions=full.trace.decisions())
        decoded = run(model, given, CHUNKS["decode"], decisions=full.trace.decisions())
    tolerance = LOGIT_TOLERANCE[torch.bfloat16]
    assert difference(half.logits, full.logits, given.real) < tolerance
    if path == "skipping":
        assert difference(decoded.logits, full.logits, given.real) < tolerance


@pytest.mark.parametrize("kv", ["all", "kept"])
def test_the_default_path_is_masked_only_where_a_gradient_can_be_wanted(kv: str) -> None:
    model, given = routed_model(Case(kv=kv)), batch(padded=False)
    rows = given.ids.numel()

    def queried() -> int:
        entered = []
        hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda module, args: entered.append(args[0][..., 0].numel())
        )
        model(given.ids)
        hook.remove()
        return sum(entered)

    # Grad is on and the routers can be trained: everything is computed.
    assert queried() == rows
    with torch.no_grad():
        assert queried() < rows
        with execute(model, "masked"):
            assert queried() == rows
    model.requires_grad_(False)
    assert queried() < rows
    model.train()
    assert queried() == rows


@some_cases
def test_the_gradient_of_the_masked_path_reaches_every_router(case: Case) -> None:
    model, given = routed_model(case), batch()
    model(given.ids, attention_mask=given.mask, position_ids=given.positions).logits[
        given.real
    ].square().mean().backward()
    for router in routers_of(model).values():
        gradient: Any = router.score.weight.grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_the_gate_of_a_sandwich_family_acts_after_its_post_norm() -> None:
    """Before the norm a gate would be undone, and at zero its gradient would explode."""
    model, given = routed_model(Case("gemma3", kv="all")), batch(padded=False)
    norm = model.model.layers[2].post_attention_layernorm
    entering, leaving = [], []
    norm.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    norm.register_forward_hook(lambda module, args, output: leaving.append(output))
    with record(model) as trace:
        logits = model(given.ids).logits
    gate_BT = trace.forwards[0].units["layers.2.attn"].soft_BT
    assert gate_BT is not None
    gate_BT.retain_grad()
    leaving[0].retain_grad()
    logits.square().mean().backward()
    ungated_BTD = type(norm).forward(norm, entering[0])
    torch.testing.assert_close(leaving[0], ungated_BTD * gate_BT[..., None])
    torch.testing.assert_close(gate_BT.grad, (leaving[0].grad * ungated_BTD).sum(-1))
    assert gate_BT.grad[gate_BT == 0].abs().max() > 0  # a skipped token learns too


@some_cases
def test_gradients_through_the_skipping_path_equal_the_masked_ones(case: Case) -> None:
    """Of the inputs: what is skipped gives none, and no NaN of an empty query gets through."""
    model, given = routed_model(case), batch()
    model.requires_grad_(False)
    decisions = run(model, given).trace.decisions()
    gradients = [input_gradient(model, given, decisions, path) for path in ("skipping", "masked")]
    assert gradients[0].isfinite().all()
    scale = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * scale


def input_gradient(model: Any, given: Batch, decisions: dict[str, Tensor], path: str) -> Tensor:
    embedded = model.get_input_embeddings()(given.ids).detach().requires_grad_()
    with execute(model, path), replay(model, decisions):  # type: ignore[arg-type]
        logits = model(
            inputs_embeds=embedded,
            attention_mask=given.mask,
            position_ids=given.positions,
            use_cache=False,
        ).logits
    logits[given.real].square().sum().backward()
    assert embedded.grad is not None
    return embedded.grad * given.mask[..., None]


# Law 3: cached equals uncached


@functools.lru_cache(maxsize=8)
def uncached(case: Case) -> tuple[PreTrainedModel, Batch, Run, Run]:
    """A routed model and a batch, run in one forward by the skipping and the masked path."""
    model, given = routed_model(case), batch()
    whole = run(model, given)
    return model, given, whole, run(model, given, path="masked", decisions=whole.trace.decisions())


@every_phase
@every_case
def test_cached_equals_uncached(case: Case, phase: str) -> None:
    model, given, whole, masked = uncached(case)
    assert_same_decisions(whole, run(model, given, CHUNKS[phase]))
    replayed = run(model, given, CHUNKS[phase], decisions=whole.trace.decisions())
    assert_close(whole, replayed, given.real)
    assert_close(masked, replayed, given.real)


@pytest.mark.parametrize("chunks", [[1] * 12, [1, 11], [2, 3, 7]], ids=str)
@more_cases
def test_a_one_token_prompt_and_a_prefix_that_spans_chunks(case: Case, chunks: list[int]) -> None:
    model, given = routed_model(case, router_seed=2), batch(rows=2, length=12, padded=False)
    whole, cached = run(model, given), run(model, given, chunks)
    assert_same_decisions(whole, cached)
    replayed = run(model, given, chunks, decisions=whole.trace.decisions())
    assert_close(whole, replayed, given.real)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("policy", [{"kv": "all"}, {"kv": "kept"}, {"sink": 2, "window": 9}])
def test_pads_in_the_middle_of_a_conversation(family: str, policy: dict[str, Any]) -> None:
    """Turns of different lengths, padded on the right in the first turn and on the left in the
    second.
    """
    model, given = routed_model(Case(family=family, **policy)), batch(padded=False)
    given.mask[0, 5:9] = 0
    given.mask[1, 9:13] = 0
    given.mask[2, :2] = 0
    chunks = [9, 8, 1, 1, 1]
    whole, cached = run(model, given), run(model, given, chunks)
    assert_same_decisions(whole, cached)
    replayed = run(model, given, chunks, decisions=whole.trace.decisions())
    assert_close(whole, replayed, given.real)
    masked = run(model, given, path="masked", decisions=whole.trace.decisions())
    assert_close(masked, whole, given.real)


@more_cases
def test_a_crop_takes_tokens_back(case: Case) -> None:
    """As assisted decoding does: wrong tokens are run, cropped, and the right ones run in their
    place.
    """
    model, given = routed_model(case), batch(rows=2, padded=False)
    whole = run(model, given)
    wrong = Batch(given.ids.flip(1), given.mask)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()  # else sliding layers cannot be cropped
        at, logits = 0, []
        for good, bad in ((8, 3), (1, 4), (1, 2), (6, 3), (4, 0)):
            right = slice(at, at + good)
            ids = torch.cat([given.ids[:, right], wrong.ids[:, :bad]], dim=1)
            logits.append(model(ids, **over(cache), use_cache=True).logits[:, :good])
            cache.crop(-bad)
            at += good
            assert cache.get_seq_length() == at
    assert (
        difference(torch.cat(logits, 1), whole.logits, given.real) < LOGIT_TOLERANCE[torch.float32]
    )


@more_cases
def test_a_crop_into_the_prefix_takes_a_sequence_decision_back(case: Case) -> None:
    model, given = routed_model(case), batch(rows=2, length=12, padded=False)
    whole = run(model, given)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(given.ids[:, :1], **over(cache), use_cache=True)
        model(
            given.ids[:, 1:5].flip(1), **over(cache), use_cache=True
        )  # other tokens: another decision
        cache.crop(-4)
        logits = model(given.ids[:, 1:], **over(cache), use_cache=True).logits
    assert (
        difference(logits, whole.logits[:, 1:], given.real[:, 1:]) < LOGIT_TOLERANCE[torch.float32]
    )


@more_cases
def test_reordered_rows_carry_their_keys_and_decisions(case: Case) -> None:
    """As beam search does between two steps."""
    model, given = routed_model(case), batch()
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        for columns in (slice(0, 9), slice(9, 10)):
            model(
                given.ids[:, columns],
                attention_mask=given.mask[:, : columns.stop],
                position_ids=given.positions[:, columns],
                **over(cache),
            )
    cache.reorder_cache(order)
    permuted = given.take(order.tolist())
    rest = run(model, permuted, [1, 8, 1], cache=cache)
    whole = run(model, permuted)
    real = permuted.real[:, 10:]
    assert difference(rest.logits, whole.logits[:, 10:], real) < LOGIT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("kv", ["all", "kept"])
def test_budgets_by_row_equal_each_row_alone(kv: str) -> None:
    model, given = routed_model(Case(kv=kv)), batch()
    calibrate_by_hand(model)
    budgets = [0.2, 0.5, 0.85]
    for chunks in (None, *CHUNKS.values()):
        together = run(model, given, chunks, budget=budgets)
        as_tensor = run(model, given, chunks, budget=torch.tensor(budgets, dtype=torch.float64))
        assert torch.equal(together.logits, as_tensor.logits)
        for row, budget in enumerate(budgets):
            alone = run(model, given.take([row]), chunks, budget=budget)
            real = given.real[[row]]
            assert difference(alone.logits, together.logits[[row]], real) < 3e-5
            for unit, keep in alone.trace.decisions().items():
                assert torch.equal(keep[0], together.trace.decisions()[unit][row])
    kept = torch.stack(list(together.trace.decisions().values())).float().mean((0, 2))
    assert kept[0] < kept[1]


@every_family
@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence", "block_token"])
def test_packed_sequences_do_not_see_each_other(family: str, granularity: str) -> None:
    """Two texts in a row, told apart by position ids that start again, are each as if alone."""
    case = Case(family=family, granularity=granularity, sink=5, window=3)
    model, given = routed_model(case), batch(rows=2, padded=False)
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    if not tells_apart(family, given, positions):
        for path in ("skipping", "masked"):
            with pytest.raises(UnsupportedCallError, match="lets each see the one before"):
                run_packed(model, given, positions, path)
        return
    for path in ("skipping", "masked"):
        packed, trace = run_packed(model, given, positions, path)
        for part in (slice(0, 12), slice(12, 20)):
            alone = run(model, Batch(given.ids[:, part], given.mask[:, part]), path=path)
            assert difference(packed[:, part], alone.logits, given.real[:, part]) < 3e-5
            for unit, keep in alone.trace.decisions().items():
                assert torch.equal(keep, trace.decisions()[unit][:, part])


def run_packed(model: Any, given: Batch, positions: Tensor, path: str) -> tuple[Tensor, Trace]:
    with torch.no_grad(), execute(model, path), record(model) as trace:  # type: ignore[arg-type]
        return model(given.ids, position_ids=positions, use_cache=False).logits, trace


def tells_apart(family: str, given: Batch, positions: Tensor) -> bool:
    """Whether the base model tells packed texts apart; not all of transformers' do."""
    model = bare_model(family)
    with torch.no_grad():
        packed = model(given.ids, position_ids=positions, use_cache=False).logits[:, 12:]
        alone = model(given.ids[:, 12:], use_cache=False).logits
    return bool((packed - alone).abs().max() < LOGIT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("kv", ["all", "kept"])
def test_where_the_dense_model_does_not_tell_packed_texts_apart_neither_does_routing(
    kv: str, with_mask: bool
) -> None:
    """transformers looks for packed texts only without a cache and without a mask."""
    model, given = routed_model(Case(kv=kv)), batch(rows=2, padded=False)
    options: dict[str, Any] = {
        "position_ids": torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1),
        "attention_mask": given.mask if with_mask else None,
        "use_cache": not with_mask,
    }
    decisions = {unit.name: given.real.clone() for unit in routing_of(model).units}
    decisions["layers.3.attn"][1, ::2] = False
    with torch.no_grad():
        with replay(model, decisions):
            routed = model(given.ids, **options).logits
        with dense(model):
            base = model(given.ids, **options).logits
    assert (routed[0] - base[0]).abs().max() < LOGIT_TOLERANCE[torch.float32]
    assert (routed[1] - base[1]).abs().max() > EFFECT
