"""Families beside those of the law tests: what is safe is routed, the rest is refused by name.

Found ones stand in no table: they are known by their structure, and tried when they are routed.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from laws import Case, assert_close, assert_same_decisions, batch, difference, randomize, run
from router_tuning import RoutingConfig, attach, detach, routing_of
from router_tuning.config import GRANULARITIES
from router_tuning.errors import UnsupportedCallError, UnsupportedModelError
from router_tuning.execution import trial
from router_tuning.execution.context import routers_of
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.units import FAMILIES as TABLE
from router_tuning.units import decoder_of, is_found
from tiny import CACHE_KEY, FOUND_HERE, PARTLY, tiny_model, token_ids

CELLS = [
    *(Case(family, g, "kept", 5, 3) for family in (*PARTLY, *FOUND_HERE) for g in GRANULARITIES),
    *(Case(f, g, "all") for f in (*PARTLY, *FOUND_HERE) for g in ("attn_token", "block_sequence")),
    *(Case(family, "attn_sequence+mlp_token", "kept") for family in (*PARTLY, *FOUND_HERE)),
]
NONE_SAFE = {
    ("gemma3n", "block"): "works on several streams of hidden states",
    ("opt", "mlp"): "has no MLP of its own",
}
"""Kinds of units of which a family has none that is safe."""
TOLERANCE = 2e-4
"""Linear attention sums in another order over a cache: the dense models differ by 3e-5 there."""


def refusal(case: Case) -> str | None:
    kinds = [granularity.partition("_")[0] for granularity in case.granularity.split("+")]
    return next((NONE_SAFE[case.family, k] for k in kinds if (case.family, k) in NONE_SAFE), None)


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_what_is_safe_keeps_the_laws_and_the_rest_is_refused(case: Case) -> None:
    model, given = tiny_model(case.family), batch()
    why = refusal(case)
    if why is not None:
        with pytest.raises(UnsupportedModelError, match=why):
            attach(model, case.config)
        return
    before = run_bare(model)
    attach(model, case.config)
    assert torch.equal(run(model, given).logits, before)
    randomize(model)
    whole = run(model, given)
    assert 0.2 < whole.trace.kept_of_routed() < 0.9
    decisions = whole.trace.decisions()
    masked = run(model, given, path="masked", decisions=decisions)
    assert difference(whole.logits, masked.logits, given.real) < TOLERANCE
    for chunks in ([7, 1, 6, 6], [12] + [1] * 8):
        assert_same_decisions(whole, run(model, given, chunks))
        cached = run(model, given, chunks, decisions=decisions)
        assert difference(whole.logits, cached.logits, given.real) < TOLERANCE
    for row in range(3):
        alone = run(model, given.row(row, left=2))
        apart = alone.logits[0, 2:] - whole.logits[row][given.real[row]]
        assert apart.abs().max() < TOLERANCE
    detach(model)
    assert torch.equal(run_bare(model), before)


def run_bare(model: Any) -> Tensor:
    given = batch()
    with torch.no_grad():
        return model(
            given.ids, attention_mask=given.mask, position_ids=given.positions, use_cache=False
        ).logits


@pytest.mark.parametrize("family", FOUND_HERE)
def test_found_families_stand_in_no_table(family: str) -> None:
    model = tiny_model(family)
    assert model.config.model_type not in TABLE
    assert is_found(decoder_of(model))


@pytest.mark.parametrize("family", FOUND_HERE)
def test_found_families_generate_and_train(family: str) -> None:
    model, ids = tiny_model(family), token_ids(2, 9)
    attach(model, RoutingConfig(granularity=["attn_token"], kv_window=2))
    randomize(model)
    texts = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached, eos_token_id=None)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    model(ids, labels=ids).loss.backward()
    for router in routers_of(model).values():
        gradient: Any = router.score.weight.grad
        assert gradient.abs().max() > 0


# Shared keys and other mixers


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_are_left_out_or_refused_by_name(family: str) -> None:
    model = tiny_model(family)
    attach(model, RoutingConfig(granularity=["attn_token", "mlp_token"]))
    names = [unit.name for unit in routing_of(model).units]
    assert [name for name in names if "attn" in name] == ["layers.0.attn", "layers.1.attn"]
    assert len([name for name in names if "mlp" in name]) == 6
    detach(model)
    for layer, why in ((2, "stores keys that other layers read"), (5, "reads the keys of another")):
        with pytest.raises(UnsupportedModelError, match=rf"layers\.{layer}\.attn .*it {why}"):
            attach(model, RoutingConfig(layers=[0, layer]))


@pytest.mark.parametrize("kept", [1, 4])
def test_layers_that_would_run_some_tokens_only_run_all(kept: int) -> None:
    """Some decoders run the layers that share keys on the tokens that logits are wanted of."""
    model, ids = tiny_model("gemma4"), token_ids(2, 9)
    attach(model, RoutingConfig(granularity="mlp_sequence", decide_after=3))
    randomize(model)
    with torch.no_grad():
        wanted = model(ids).logits[:, -kept:]
        got = model(ids, logits_to_keep=kept).logits
    torch.testing.assert_close(got, wanted)


def test_a_unit_that_is_given_some_tokens_only_is_refused() -> None:
    model = tiny_model()
    attach(model, RoutingConfig(granularity="mlp_token"))
    layer = model.model.layers[1]
    dense = layer.mlp.forward
    layer.mlp.forward = lambda x: dense(x[:, -1:])
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match=r"layers\.1\.mlp .*\(2, 1\)"):
        model(token_ids(2, 9))


@pytest.mark.parametrize("kind", ["attn", "block"])
def test_layers_with_another_mixer_are_left_out_or_refused_by_name(kind: str) -> None:
    model = tiny_model("qwen3_next")
    attach(model, RoutingConfig(granularity=f"{kind}_token"))
    assert [unit.layer_idx for unit in routing_of(model).units] == [1, 3]
    detach(model)
    with pytest.raises(UnsupportedModelError, match=rf"layers\.2\.{kind} .*has no attention"):
        attach(model, RoutingConfig(granularity=f"{kind}_token", layers=[1, 2]))


@pytest.mark.parametrize("family", PARTLY)
def test_mlps_remember_beside_the_nearest_plain_keys(family: str) -> None:
    """Each MLP for itself: two of them share a layer of the cache."""
    model, given = tiny_model(family), batch()
    attach(model, Case(granularity="mlp_sequence").config)
    randomize(model)
    memories = [unit.memory for unit in routing_of(model).units]
    assert len(set(memories)) < len(memories)
    decisions = run(model, given, [2] * 10).trace.decisions()
    assert len({tuple(d[:, -1].tolist()) for d in decisions.values()}) > 1
    assert_same_decisions(run(model, given), run(model, given, [2] * 10))


def test_a_kind_that_no_layer_can_route_is_not_left_out_in_silence() -> None:
    model = tiny_model("falcon", alibi=True, new_decoder_architecture=False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.attn .*ALiBi.* layers\.3\.attn\)"):
        attach(model, RoutingConfig(granularity=["attn_token", "mlp_token"]))


def test_alibi_is_refused_for_attention_and_served_for_mlps() -> None:
    model = tiny_model("falcon", alibi=True, new_decoder_architecture=False)
    for kind in ("attn", "block"):
        with pytest.raises(UnsupportedModelError, match=r"layers\.0\.\w+ .*ALiBi"):
            attach(model, RoutingConfig(granularity=f"{kind}_token"))
    attach(model, RoutingConfig(granularity="mlp_token"))
    randomize(model)
    given = batch(padded=False)
    whole = run(model, given)
    masked = run(model, given, path="masked", decisions=whole.trace.decisions())
    assert_close(whole, masked, given.real)


# Refused altogether

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
WORDS = {**SMALL, "d_model": 32, "n_heads": 4, "n_layers": 2, "n_head": 4, "n_layer": 2}
BART = {**SMALL, "d_model": 32, "decoder_layers": 2, "encoder_layers": 2}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("BloomForCausalLM", WORDS, r"layers\.0\.attn .*it takes 'residual'"),
    "mpt": ("MptForCausalLM", WORDS, "its structure leaves doubt|takes 'position_bias'"),
    "bart": ("BartForConditionalGeneration", BART, "it is an encoder-decoder"),
    "bart's decoder": ("BartForCausalLM", BART, "another part 'encoder_attn'"),
    "mamba": ("MambaForCausalLM", SMALL, "no list of decoder layers"),
    "bert": ("BertLMHeadModel", {**SMALL, "is_decoder": True}, "takes no input_ids"),
    "llama4": (
        "Llama4ForCausalLM",
        {
            **SMALL,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
        },
        "its cache keeps 8192",
    ),
}


def refused_model(name: str) -> PreTrainedModel:
    model_class, fields, _ = REFUSED[name]
    with torch.random.fork_rng(devices=[]):
        model: Any = getattr(transformers, model_class)
        made: PreTrainedModel = model(model.config_class(**fields)).eval()
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_refused_families_say_why_and_how_to_add_them(name: str) -> None:
    model = refused_model(name)
    before = {key: module.__dict__.keys() for key, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=REFUSED[name][2]) as refused:
        attach(model, RoutingConfig())
    assert "leave" in str(refused.value) or "Add a row to FAMILIES" in str(refused.value)
    assert {key: module.__dict__.keys() for key, module in model.named_modules()} == before


# The trial of found families


class Shifts(nn.Module):
    """An MLP that also reads the token before, as some families' do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, dims=1)


def test_the_trial_refuses_an_mlp_that_mixes_tokens() -> None:
    model = tiny_model("starcoder2")
    model.model.layers[1].mlp = Shifts()
    with pytest.raises(UnsupportedModelError, match=r"'starcoder2'.*other states.* apart"):
        attach(model, RoutingConfig(granularity="mlp_token"))
    assert not any("skip_router" in name for name, _ in model.named_modules())
    assert "forward" not in model.model.__dict__


def test_the_trial_refuses_an_attention_that_counts_its_tokens() -> None:
    model = tiny_model("starcoder2")
    attention = model.model.layers[0].self_attn
    dense = type(attention).forward

    def counting(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        number = torch.arange(hidden_states.shape[1])[:, None]
        return dense(self, hidden_states + 0.1 * number, *args, **kwargs)

    attention.forward = MethodType(counting, attention)
    with pytest.raises(UnsupportedModelError, match="other states"):
        attach(model, RoutingConfig())


def test_an_attention_that_asks_its_cache_for_more_is_refused() -> None:
    """Of the length, say, to count positions from: it is not the kept tokens'."""
    model = tiny_model("starcoder2")
    attention = model.model.layers[3].self_attn
    dense = type(attention).forward

    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs[CACHE_KEY] and kwargs[CACHE_KEY].get_seq_length()
        return dense(self, *args, **kwargs)

    attention.forward = MethodType(asking, attention)
    with pytest.raises(UnsupportedModelError, match="asks its cache for 'get_seq_length'"):
        attach(model, RoutingConfig())


def test_the_trial_names_a_norm_that_nobody_knew() -> None:
    model = tiny_model("starcoder2")
    layer = model.model.layers[0]
    layer.behind_norm = nn.LayerNorm(32)
    layer.forward = MethodType(through_the_norm, layer)
    with pytest.raises(
        UnsupportedModelError, match=r"'behind_norm' takes what layers\.0\.mlp gives"
    ):
        attach(model, RoutingConfig(granularity="mlp_token"))


def through_the_norm(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    return hidden_states + self.behind_norm(self.mlp(hidden_states))


def test_the_trial_compares_windows_with_the_cache() -> None:
    """It is too short to notice one."""
    model = tiny_model("starcoder2", sliding_window=100)
    model.model.layers[1].self_attn.sliding_window = 50
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.attn .* latest 50, .* keeps 100"):
        attach(model, RoutingConfig())


def test_an_attention_that_names_a_window_and_does_not_slide_sees_all() -> None:
    model = tiny_model("exaone4")
    attentions = [layer.self_attn for layer in model.model.layers]
    assert [attention.sliding_window for attention in attentions] == [8] * 4
    assert [sliding_window_of(attention) for attention in attentions] == [8, None, 8, None]
    attach(model, RoutingConfig(kv="all"))
    randomize(model)
    given = batch(padded=False)  # the model makes no mask for layers that see all
    whole = run(model, given)
    masked = run(model, given, path="masked", decisions=whole.trace.decisions())
    assert_close(whole, masked, given.real)


def test_the_trial_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("starcoder2").train()
    model.model.layers[2].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    tried, whole = [], trial._try_out

    def watched(decoder: nn.Module) -> None:
        tried.append(any(module.training for module in decoder.modules()))
        state = torch.get_rng_state()
        whole(decoder)
        assert torch.equal(torch.get_rng_state(), state)

    monkeypatch.setattr(trial, "_try_out", watched)
    attach(model, RoutingConfig())
    assert tried == [False]
    assert all(model.get_submodule(name).training is mode for name, mode in modes.items())


def test_an_argument_that_is_not_by_tokens_is_refused() -> None:
    model = tiny_model("starcoder2")
    attach(model, RoutingConfig())
    randomize(model)
    ids = token_ids(2, 8)
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="not by tokens"):
        model(ids, strange=torch.ones(3, 5))
