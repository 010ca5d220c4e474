"""kv="kept": the gradient of a decision holds what its token's key is worth to later tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from laws import Case, randomize, routed_model
from router_tuning import RoutingConfig, attach, execute
from router_tuning.execution.context import original_forward, routers_of
from router_tuning.execution.visibility import additive
from router_tuning.units import decoder_layers, decoder_of, first_of
from tiny import tiny_model, token_ids

TOKENS = 8
STEP = 0.01
"""Not smaller: eager attention takes its softmax in float32."""


def slopes(
    config: dict[str, Any],
    family: str = "llama",
    implementation: str = "eager",
    kind: str = "attn",
    dropout: float = 0.0,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """A forward of one routed unit, each token with a decision of its own: what the unit was called
    with, the decisions (T,), and for each token j the gradient by its decision of what the unit
    gives to *other* tokens, weighed by fixed random numbers: (T,).
    """
    model = tiny_model(family, attn_implementation=implementation).double().eval()
    model.set_experts_implementation("eager")  # grouped_mm takes no float64
    attach(model, RoutingConfig(granularity=f"{kind}_token", layers=[1], **config))
    randomize(model, seed=3)
    layer: Any = decoder_layers(decoder_of(model))[1]
    layer.self_attn.attention_dropout = dropout
    layer.self_attn.train(dropout > 0)
    unit = layer.self_attn if kind == "attn" else layer
    seen: dict[str, Any] = {}
    leaves: list[Tensor] = []

    def leaf(router: Any, args: Any, logits: Tensor) -> Tensor:
        leaves.append(logits.detach().requires_grad_())
        return leaves[-1]

    routers_of(model)[f"layers.1.{kind}"].register_forward_hook(leaf)
    unit.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    unit.register_forward_hook(lambda *args: seen.update(output=first_of(args[-1])))
    with torch.enable_grad(), execute(model, "masked"):
        decoder_of(model)(token_ids(1, TOKENS), use_cache=False)
        weights_TTD = weighing(seen["output"])
        found = []
        for token in range(TOKENS):
            value = (seen["output"][0] * weights_TTD[token]).sum()
            (slope,) = torch.autograd.grad(value, leaves, retain_graph=True)
            found.append(slope[0, token])
    probability = leaves[0].detach()[0].sigmoid()
    slope_T = torch.stack(found) / (probability * (1 - probability))
    seen["attention"] = layer.self_attn
    return seen, leaves[0].detach()[0] >= 0, slope_T


def weighing(output_1TD: Tensor) -> Tensor:
    """Random numbers for each token (T, T, D), zero where a token would weigh its own output."""
    generator = torch.Generator().manual_seed(5)
    shape = (TOKENS, *output_1TD.shape[1:])
    weights = torch.randn(shape, generator=generator, dtype=output_1TD.dtype)
    weights[torch.arange(TOKENS), torch.arange(TOKENS)] = 0
    return weights


def attended(seen: dict[str, Any], mask_TT: Tensor) -> Tensor:
    """What the attention gives under an additive mask: (T, D)."""
    forward = original_forward(seen["attention"])
    with torch.no_grad():
        output: Tensor = forward(
            hidden_states=seen["hidden_states"],
            position_embeddings=seen["position_embeddings"],
            attention_mask=mask_TT[None, None],
        )[0][0]
    return output


def weighed_a_little(
    seen: dict[str, Any], token: int, decided_TT: Tensor, shown_TT: Tensor
) -> Tensor:
    """The slope (T, D) from an attention whose kept key `token` weighs a little more and less."""
    outputs = []
    for weight in (1 + STEP, 1 - STEP):
        mask_TT = additive(shown_TT, torch.float64)
        mask_TT[:, token] += decided_TT[:, token] * torch.tensor(weight).double().log()
        outputs.append(attended(seen, mask_TT))
    return (outputs[0] - outputs[1]) / (2 * STEP)


def shown_and_not(seen: dict[str, Any], token: int, decided_TT: Tensor, shown_TT: Tensor) -> Tensor:
    """What changes (T, D) where the skipped key `token` alone is shown beside the kept ones."""
    with_TT = shown_TT.clone()
    with_TT[:, token] |= decided_TT[:, token]
    return attended(seen, additive(with_TT, torch.float64)) - attended(
        seen, additive(shown_TT, torch.float64)
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("window", [0, 3])
def test_the_gradient_of_a_decision_holds_the_worth_of_its_key(
    window: int, family: str, implementation: str
) -> None:
    if implementation == "sdpa" and family in ("gemma2", "gpt_oss"):
        pytest.skip("its scores are capped, or it has sinks: SDPA does not serve it")
    config = {"kv": "kept", "kv_window": window}
    seen, keep_T, slope_T = slopes(config, family, implementation)
    assert 2 <= int(keep_T.sum()) <= TOKENS - 2
    query, key = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None]
    causal, nearby = key <= query, query - key < max(window, 1)
    decided, shown = causal & ~nearby, causal & (keep_T[None] | nearby)
    for token in range(TOKENS - max(window, 1)):
        changed = weighed_a_little if keep_T[token] else shown_and_not
        change_TD = changed(seen, token, decided, shown)
        if family != "gemma2":  # whose outputs are gated later, after a norm
            change_TD = change_TD * keep_T[:, None]
        wanted = float((change_TD * weighing(seen["output"])[token]).sum())
        assert float(slope_T[token]) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert int((slope_T.abs() > 0.01).sum()) >= 3  # nobody that is kept asks for the others


def test_a_block_learns_of_its_keys_too() -> None:
    _, keep_T, slope_T = slopes({"kv": "kept"}, kind="block")
    for kept in (True, False):
        assert bool((slope_T[keep_T == kept].abs() > 0.01).any())


def test_keys_that_dropout_has_dropped_are_worth_nothing() -> None:
    _, _, slope_T = slopes({"kv": "kept"}, dropout=1.0)
    assert not slope_T.any()


def test_a_sink_and_a_policy_that_keeps_every_key_have_none() -> None:
    _, _, slope_T = slopes({"kv": "kept", "kv_sink": 3})
    assert not slope_T[:3].any()
    assert slope_T[3:].any()
    assert not slopes({"kv": "all"})[2].any()


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_output_is_the_same_with_and_without_gradients(
    family: str, implementation: str
) -> None:
    model = routed_model(Case(family), attn_implementation=implementation)
    ids = token_ids(2, 12)
    with execute(model, "masked"):
        with_gradients = model(ids, use_cache=False).logits.detach()
        with torch.no_grad():
            without = model(ids, use_cache=False).logits
    torch.testing.assert_close(with_gradients, without)
