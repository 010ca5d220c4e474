"""What half of the tokens save is set beside what their FLOPs would."""

from __future__ import annotations

import fewer_tokens
import pytest
import torch

from router_tuning.layer_cost import layer_costs
from router_tuning.units import decoder_of
from tiny import tiny_model


def test_half_the_time_for_half_the_flops_saves_all() -> None:
    flops = {8: 100.0, 4: 50.0}
    found = fewer_tokens._halved({8: 2.0, 4: 1.0}, 8, flops.__getitem__)
    assert found["possible_saving"] == 1.0
    # A part of the time that does not shrink with the tokens is not saved.
    found = fewer_tokens._halved({8: 2.0, 4: 1.5}, 8, flops.__getitem__)
    assert found["possible_saving"] == 0.5


def test_pairs_of_an_attention_shrink_faster_than_its_tokens() -> None:
    price = layer_costs(decoder_of(tiny_model("llama")))[0]
    mlp, attention = (fewer_tokens._flops(price, unit) for unit in ("mlp", "attn"))
    assert mlp(512) == 2 * mlp(256)
    assert attention(512) > 2 * attention(256)


@pytest.mark.parametrize("unit", ["mlp", "attn"])
def test_all_layers_run_on_as_many_tokens(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewer_tokens, "TOKENS", (8,))
    decoder = decoder_of(tiny_model("llama"))
    seen: list[int] = []
    for layer in decoder.layers:
        module = layer.mlp if unit == "mlp" else layer.self_attn
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    run = {"mlp": fewer_tokens._mlps, "attn": fewer_tokens._attentions}[unit](decoder)
    with torch.no_grad():
        took = fewer_tokens._times({unit: run}, decoder, repeats=1)
    assert set(took[unit]) == {4, 8}
    assert sorted(seen) == sorted([4, 8] * len(decoder.layers) * 2)  # one round warms up
