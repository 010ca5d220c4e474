"""kv="kept": the gradient of a decision holds what its token's key is worth to later tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from laws import Case, randomize, routed_model
from router_tuning import RoutingConfig, attach, execute
from router_tuning.execution.context import original_forward, routers_of
from router_tuning.units import decoder_layers, decoder_of
from tiny import tiny_model, token_ids

NAME, TOKENS = "layers.1.attn", 8
STEP = 0.01
"""Not smaller: eager attention takes its softmax in float32."""


def slopes(config: dict[str, Any], family: str = "llama") -> tuple[dict[str, Any], Tensor, Tensor]:
    """A forward of one routed attention, each token with a decision of its own: what the attention
    was called with, the decisions (T,), and for each token j the gradient by its decision of what
    the attention gives to *other* tokens, weighed by fixed random numbers: (T,).
    """
    model = tiny_model(family, attn_implementation="eager").double().eval()
    attach(model, RoutingConfig(granularity="attn_token", layers=[1], **config))
    randomize(model, seed=3)
    attention: Any = decoder_layers(decoder_of(model))[1].self_attn
    seen: dict[str, Any] = {}
    leaves: list[Tensor] = []

    def leaf(router: Any, args: Any, logits: Tensor) -> Tensor:
        leaves.append(logits.detach().requires_grad_())
        return leaves[-1]

    routers_of(model)[NAME].register_forward_hook(leaf)
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    attention.register_forward_hook(lambda module, args, output: seen.update(output=output[0]))
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
    seen["attention"] = attention
    return seen, leaves[0].detach()[0] >= 0, slope_T


def weighing(output_1TD: Tensor) -> Tensor:
    """Random numbers for each token (T, T, D), zero where a token would weigh its own output."""
    generator = torch.Generator().manual_seed(5)
    shape = (TOKENS, *output_1TD.shape[1:])
    weights = torch.randn(shape, generator=generator, dtype=output_1TD.dtype)
    weights[torch.arange(TOKENS), torch.arange(TOKENS)] = 0
    return weights


def by_differences(
    seen: dict[str, Any], keep_T: Tensor, token: int, lasting_TT: Tensor, shown_TT: Tensor
) -> float:
    """The same from an attention whose key `token` weighs a little more and less."""
    attention = seen["attention"]
    forward = original_forward(attention)
    low = torch.finfo(torch.float64).min
    values = []
    for weight in (1 + STEP, 1 - STEP):
        mask = torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(~shown_TT, low)
        mask[:, token] += lasting_TT[:, token] * torch.tensor(weight).double().log()
        with torch.no_grad():
            output = forward(
                hidden_states=seen["hidden_states"],
                position_embeddings=seen["position_embeddings"],
                attention_mask=mask[None, None],
            )[0]
        gated = output[0] * keep_T[:, None]
        values.append(float((gated * weighing(output)[token]).sum()))
    return (values[0] - values[1]) / (2 * STEP)


@pytest.mark.parametrize("window", [0, 3])
def test_the_gradient_of_a_decision_holds_the_worth_of_its_key(window: int) -> None:
    seen, keep_T, slope_T = slopes({"kv": "kept", "kv_window": window})
    assert 2 <= int(keep_T.sum()) <= TOKENS - 2
    query, key = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None]
    causal, lasting = key <= query, query - key >= max(window, 1)
    kept = causal & (keep_T[None] | (query - key < max(window, 1)))
    for token in range(TOKENS - max(window, 1)):
        # A kept key is weighed among the kept ones, a skipped one among all.
        shown = kept if keep_T[token] else causal
        wanted = by_differences(seen, keep_T, token, lasting, shown)
        assert float(slope_T[token]) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert int((slope_T.abs() > 0.01).sum()) >= 3  # nobody that is kept asks for the others


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
