"""FLOPs and cache bytes by hand, where a trace is not one plain text: crops, packed texts, several
runs.

tests/test_laws_counts.py compares the cost with counted calls and with torch's counter.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from laws import Batch, Case, batch, over, routed_model, run
from router_tuning import RoutingConfig, attach, record, replay
from router_tuning.cost import Cost, cost, flops_fraction
from router_tuning.errors import UnsupportedCallError, UnsupportedModelError
from router_tuning.layer_cost import LayerCost, layer_costs, linear_flops
from router_tuning.units import decoder_of
from tiny import tiny_model

# A tiny Llama: hidden 32, four heads of 8, two key/value heads, MLP of 48, four layers.
QUERY = 2 * (32 * 32 + 32 * 32)
KEY = 2 * (32 * 16 + 32 * 16)
PAIR = 4 * 32
OUTSIDE = 4 * 2 * 3 * 32 * 48 + 2 * 32 * 97
ROUTER = 2 * 33
KEY_BYTES = 2 * 16 * 4
WEIGHT_BYTES = 4 * (4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32 * 97)
"""Of a forward: four layers with their norms, and the head."""


def test_a_text_by_hand() -> None:
    """Three tokens; layer 0 keeps the first and the last, the other layers keep all."""
    model, given = routed_model(Case()), batch(1, 3, padded=False)
    keep = {f"layers.{i}.attn": given.real for i in range(4)}
    keep["layers.0.attn"] = torch.tensor([[True, False, True]])
    found = cost(model, run(model, given, decisions=keep).trace)
    dense = 4 * (3 * (QUERY + KEY) + 6 * PAIR) + 3 * OUTSIDE
    saved = QUERY + KEY + 3 * PAIR  # the second token's two pairs, and the third's with it
    assert found == Cost(
        flops=dense - saved + 4 * 3 * ROUTER,
        dense_flops=dense,
        kv_bytes=(4 * 3 - 1) * KEY_BYTES,
        dense_kv_bytes=4 * 3 * KEY_BYTES,
        weight_bytes=WEIGHT_BYTES + 4 * 4 * 33,
        dense_weight_bytes=WEIGHT_BYTES,
        tokens=3,
    )
    assert found.flops_fraction == found.flops / found.dense_flops


def test_only_routed_layers_can_save() -> None:
    model, given = tiny_model(), batch(1, 3, padded=False)
    attach(model, RoutingConfig(layers=[2]))
    none = {"layers.2.attn": torch.zeros(1, 3, dtype=torch.bool)}
    result = run(model, given, decisions=none)
    found = cost(model, result.trace)
    assert found.dense_flops - found.flops == 3 * (QUERY + KEY) + 6 * PAIR - 3 * ROUTER
    assert found.kv_bytes == 3 * 3 * KEY_BYTES
    assert result.trace.kept_fraction() == 0.75
    assert result.trace.kept_of_routed() == 0.0


def test_padding_costs_nothing() -> None:
    model, given = routed_model(Case(sink=2, window=3)), batch()
    given.mask[1] = given.mask[1].flip(0)  # on the left: windows reach back over columns
    together = cost(model, run(model, given).trace)
    alone = [cost(model, run(model, given.row(row)).trace) for row in range(3)]
    assert together.flops == sum(c.flops for c in alone)
    assert together.dense_flops == sum(c.dense_flops for c in alone)
    assert together.kv_bytes == sum(c.kv_bytes for c in alone)


def test_texts_one_after_another_add_up() -> None:
    model = routed_model()
    texts = [batch(padded=False, seed=seed) for seed in (1, 2)]
    with torch.no_grad(), record(model) as trace:
        for text in texts:
            model(text.ids, use_cache=False)
    each = [cost(model, run(model, text).trace) for text in texts]
    assert cost(model, trace).flops == sum(c.flops for c in each)


@pytest.mark.parametrize("case", [Case(kv="all"), Case(), Case(sink=5, window=3)], ids=str)
def test_packed_texts_cost_what_they_cost_alone(case: Case) -> None:
    model, given = routed_model(case), batch(rows=2, padded=False)
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    with torch.no_grad(), record(model) as trace:
        model(given.ids, position_ids=positions, use_cache=False)
    parts = [
        cost(model, run(model, Batch(given.ids[:, part], given.mask[:, part])).trace)
        for part in (slice(0, 12), slice(12, 20))
    ]
    packed = cost(model, trace)
    assert packed.flops == sum(c.flops for c in parts)
    assert packed.dense_flops == sum(c.dense_flops for c in parts)


@pytest.mark.parametrize("case", [Case(kv="all"), Case(), Case(sink=5, window=3)], ids=str)
def test_cropped_tokens_are_paid_for_and_then_unseen(case: Case) -> None:
    """Seven tokens, three of them taken back, then five others: the later five never see the
    three.
    """
    model, given = routed_model(case), batch(rows=2, length=9, padded=False)
    with torch.no_grad(), record(model) as trace:
        cache = DynamicCache(config=model.config)
        wrong = torch.cat([given.ids[:, :4], given.ids[:, 6:9]], dim=1)
        model(wrong, **over(cache), use_cache=True)
        cache.crop(-3)
        model(given.ids[:, 4:], **over(cache), use_cache=True)
    straight = run(model, given, [4, 5])
    detour = run(model, Batch(wrong, torch.ones_like(wrong)), [4, 3])
    short = run(model, Batch(given.ids[:, :4], given.mask[:, :4]), [4])
    both, one, other, shared = (
        cost(model, t) for t in (trace, straight.trace, detour.trace, short.trace)
    )
    assert both.flops == one.flops + other.flops - shared.flops
    assert both.dense_flops == one.dense_flops + other.dense_flops - shared.dense_flops
    assert both.kv_bytes == one.kv_bytes


def test_the_fraction_of_what_is_skipped_wholly() -> None:
    model, given = routed_model(Case(kv="all")), batch(padded=False)
    nothing = {f"layers.{i}.attn": torch.zeros_like(given.real) for i in range(4)}
    with torch.no_grad(), replay(model, nothing), record(model) as trace:
        model(given.ids, use_cache=False)
    # Without a cache nobody asks for the keys either.
    tokens, pairs = given.ids.numel(), 3 * 20 * 21 // 2
    dense = tokens * (OUTSIDE + 4 * (QUERY + KEY)) + 4 * pairs * PAIR
    assert flops_fraction(model, trace) == tokens * (OUTSIDE + 4 * ROUTER) / dense


def test_a_trace_that_does_not_know_the_beginning_is_refused() -> None:
    model, given = routed_model(), batch(padded=False)
    cache = run(model, Batch(given.ids[:, :9], given.mask[:, :9]), [9]).cache
    rest = run(model, given, [11], cache=cache)
    with pytest.raises(UnsupportedCallError, match="begins at token 9"):
        cost(model, rest.trace)
    with record(model) as empty:
        pass
    with pytest.raises(UnsupportedCallError, match="empty"):
        cost(model, empty)


# What a layer costs


def test_a_layer_by_hand() -> None:
    mixtral, deepseek = (layer_costs(decoder_of(tiny_model(f)))[1] for f in MOE)
    expert = 2 * (2 * 32 * 48 + 48 * 32)
    gate = 2 * 4 * 32
    assert mixtral == LayerCost(
        key=KEY,
        query=QUERY,
        expand=0,
        pair=PAIR,
        mlp=2 * expert + gate,  # two of four experts
        rest=0,
        early=0,
        key_bytes=KEY_BYTES,
    )
    assert deepseek == LayerCost(
        key=2 * (32 * 12 + 12 * 4 * 10 + 32 * (10 + 4)),
        query=2 * 4 * 8 * 32,
        expand=2 * 10 * 4 * (6 + 8),
        pair=2 * 4 * (10 + 8),
        mlp=3 * expert // 2 + gate,  # experts of half the width: two, and a shared one
        rest=0,
        early=0,
        key_bytes=(10 + 4) * 4,
    )


MOE = ("mixtral", "deepseek_v3")
UNLISTED = ("Starcoder2", "Phi", "Glm4", "GPTBigCode")


@pytest.mark.parametrize("name", UNLISTED)
def test_families_found_by_their_structure_are_counted(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        attn_implementation="eager",
        **({"head_dim": 8} if name == "Glm4" else {}),
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    given = batch(1, 9, padded=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model(given.ids, use_cache=True).past_key_values
    operators = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attach(model, RoutingConfig(granularity="block_token"))
    found = cost(model, run(model, given).trace)
    prices = layer_costs(decoder_of(model))
    linear = operators.get("aten.mm", 0) + operators.get("aten.addmm", 0)
    assert found.dense_flops - sum(price.pair for price in prices) * 9 * 10 // 2 == linear
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.kv_bytes == found.dense_kv_bytes == held


def test_adapters_on_linear_layers_count() -> None:
    model = tiny_model()
    lora = LoraConfig(r=3, target_modules=["q_proj", "k_proj", "up_proj"])
    plain, adapted = (
        layer_costs(decoder_of(m))[0] for m in (tiny_model(), get_peft_model(model, lora))
    )
    assert adapted.query - plain.query == 2 * 3 * (32 + 32)
    assert adapted.key - plain.key == 2 * 3 * (32 + 16)
    assert adapted.mlp - plain.mlp == 2 * 3 * (32 + 48)


def test_counting_leaves_no_trace() -> None:
    model = tiny_model(rms_norm_eps=1.5e-6)  # another model than those before: nothing remembered
    before, state = {n: dict(m.__dict__) for n, m in model.named_modules()}, torch.get_rng_state()
    layer_costs(decoder_of(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_counted_is_named() -> None:
    experts = nn.Module()
    experts.weight = nn.Parameter(torch.zeros(4, 3, 2))
    with pytest.raises(UnsupportedModelError, match=r"how many experts .* wanted one of top_k"):
        linear_flops(experts, config=None)
    assert linear_flops(experts, config=SimpleNamespace(num_experts_per_tok=3)) == 3 * 2 * 6
    model = tiny_model()
    model.config.hidden_act = "no such activation"
    with pytest.raises(UnsupportedModelError, match=r"of LlamaModel cannot .* does not run \(Key"):
        layer_costs(decoder_of(model))
