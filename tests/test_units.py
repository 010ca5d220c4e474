"""Where attention is found, in models of every kind; what is refused; and what routers compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    SiglipVisionConfig,
)

from laws import bare_model
from router_tuning import RoutingConfig, attach, routing_of
from router_tuning.errors import ConfigError, UnsupportedCallError, UnsupportedModelError
from router_tuning.execution.projections import check_parts
from router_tuning.execution.trial import try_out
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.routers import make_router
from router_tuning.units import (
    KINDS,
    Unit,
    attention_of,
    decoder_layers,
    decoder_of,
    family_of,
    find_units,
    hidden_size_of,
    is_sequence,
    kind_of,
    part_of,
    post_norm_of,
)
from tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_units(family: str) -> None:
    model = tiny_model(family)
    decoder = decoder_of(model)
    assert decoder is model.base_model
    assert decoder_of(decoder) is decoder
    assert hidden_size_of(model) == 32
    for kind in KINDS:
        units = find_units(model, RoutingConfig(granularity=f"{kind}_token"))
        assert units == [Unit(f"layers.{i}.{kind}", kind, i) for i in range(4)]
    for layer in decoder_layers(decoder):
        attention = attention_of(decoder, layer)
        assert attention is not None
        assert part_of(decoder, layer, "attn") is attention
        assert part_of(decoder, layer, "block") is layer
        if family_of(decoder).parts:
            check_parts(attention)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_table_says_of_a_family_passes_the_trial(family: str, kind: str) -> None:
    """Which norms stand behind a unit, and what it returns: what nobody has tested is tried so."""
    model = tiny_model(family)
    attach(model, RoutingConfig(granularity=f"{kind}_token"))
    if kind == "block" and family_of(decoder_of(model)).layer_tuple:
        with pytest.raises(UnsupportedModelError, match="say layer_tuple=True"):
            try_out(decoder_of(model))
    elif kind == "mlp" and family_of(decoder_of(model)).mlp_tuple:
        with pytest.raises(UnsupportedModelError, match="say mlp_tuple=True"):
            try_out(decoder_of(model))
    else:
        try_out(decoder_of(model))


def test_post_norms_are_found() -> None:
    def post_norms(family: str) -> list[nn.Module | None]:
        decoder = decoder_of(tiny_model(family))
        return [post_norm_of(decoder, decoder_layers(decoder)[0], kind) for kind in KINDS]

    assert post_norms("llama") == [None] * 3
    for family in ("gemma2", "gemma3", "olmo2"):
        attention, mlp, block = post_norms(family)
        assert attention is not None
        assert mlp is not None
        assert block is None


def test_units_come_in_the_order_in_which_they_run() -> None:
    config = RoutingConfig(granularity=["mlp_token", "attn_sequence"], layers=[2, 1])
    names = [unit.name for unit in find_units(tiny_model(), config)]
    assert names == ["layers.1.attn", "layers.1.mlp", "layers.2.attn", "layers.2.mlp"]


def test_sliding_windows_are_found() -> None:
    def windows(family: str, **options: Any) -> list[int | None]:
        layers = decoder_layers(decoder_of(tiny_model(family, **options)))
        return [sliding_window_of(layer.self_attn) for layer in layers]

    assert windows("llama") == [None] * 4
    assert windows("mistral", sliding_window=7) == [7] * 4
    assert windows("mistral") == [None] * 4
    assert windows("gemma3", sliding_window=7) == [7, None, 7, None]
    kinds = ["full_attention", "sliding_attention"] * 2
    for family in ("qwen2", "qwen3"):
        assert windows(family) == [None] * 4
        sliding = windows(family, use_sliding_window=True, sliding_window=7, layer_types=kinds)
        assert sliding == [None, 7, None, 7]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_families_that_slide_in_some_layers_keep_the_laws(family: str) -> None:
    from laws import Case, batch, difference, randomize, run

    kinds = ["full_attention", "sliding_attention"] * 2
    model = bare_model(family, use_sliding_window=True, sliding_window=6, layer_types=kinds)
    attach(model, Case(sink=5, window=3).config)
    randomize(model)
    given = batch()
    whole = run(model, given)
    for other in (run(model, given, path="masked"), run(model, given, [7, 1, 6, 6])):
        assert difference(whole.logits, other.logits, given.real) < 3e-5


def test_the_text_model_inside_a_multimodal_one_is_found() -> None:
    text = bare_model("gemma3").config.to_dict()
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    ).to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    decoder = decoder_of(model)
    assert decoder is model.model.language_model
    attach(model, RoutingConfig())
    assert len(routing_of(model).units) == 4
    # It masks images in a way of its own: refused, not computed wrongly.
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="dict mask"):
        model(input_ids=torch.arange(3, 15)[None])


def test_an_unknown_family_is_named_with_the_known_ones() -> None:
    model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=11))
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*Known: cohere2, .*Add a row"):
        attach(model, RoutingConfig())
    with pytest.raises(UnsupportedModelError, match="no unit table"):
        decoder_of(nn.Linear(2, 2))


@pytest.mark.parametrize("layers", [[4], [-1], [0, 99]])
def test_an_unknown_layer_is_named(layers: list[int]) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=rf"names layer {layers[-1]}, .* 4 layers \(0 to 3\)"):
        attach(model, RoutingConfig(layers=layers))
    assert not any("skip_router" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("layers", [["3"], [1.0], [None], [True]])
def test_layers_that_are_no_numbers_are_refused(layers: list[Any]) -> None:
    with pytest.raises(ConfigError, match="layers"):
        attach(tiny_model(), RoutingConfig(layers=layers))


def test_layers_are_taken_once_and_in_order() -> None:
    units = find_units(tiny_model(), RoutingConfig(layers=[3, 0, 3]))
    assert [unit.layer_idx for unit in units] == [0, 3]


def test_a_layer_without_attention_is_named() -> None:
    model = tiny_model()
    del model.model.layers[2].self_attn
    assert [unit.layer_idx for unit in find_units(model, RoutingConfig())] == [0, 1, 3]
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.attn .*it has no attention"):
        find_units(model, RoutingConfig(layers=[1, 2]))


def test_an_attention_built_of_other_parts_is_refused() -> None:
    model = tiny_model()
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(UnsupportedModelError, match=r"LlamaAttention .*missing: k_proj"):
        attach(model, RoutingConfig())
    assert "routing" not in model.model.__dict__


def test_layers_that_the_model_does_not_run_are_left_out() -> None:
    model = tiny_model()
    model.config.num_hidden_layers = 3
    assert len(decoder_layers(decoder_of(model))) == 3


def test_names_of_granularities() -> None:
    assert kind_of("attn_token") == "attn"
    assert kind_of("block_sequence") == "block"
    assert is_sequence("attn_sequence")
    assert not is_sequence("attn_token")


# Routers


@pytest.mark.parametrize("kind", ["linear", "bottleneck", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_routers_give_their_bias_everywhere_in_fp32(kind: str, dtype: torch.dtype) -> None:
    router = make_router(RoutingConfig(router=kind, init_bias=1.5, router_hidden=4), 8)
    x_BTD = torch.randn(2, 5, 8).to(dtype) * 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BT = router(x_BTD)
    assert logits_BT.shape == (2, 5)
    assert logits_BT.dtype is torch.float32
    assert (logits_BT == 1.5).all()
    assert all(p.dtype is torch.float32 for p in router.parameters())


def test_the_linear_router_is_one_map() -> None:
    router: Any = make_router(RoutingConfig(), 8)
    router.score.weight.data = torch.randn(1, 8)
    x_BTD = torch.randn(2, 5, 8)
    torch.testing.assert_close(router(x_BTD), x_BTD @ router.score.weight[0] + 1.0)


@pytest.mark.parametrize("kind", ["linear", "bottleneck", "bias"])
def test_every_router_learns(kind: str) -> None:
    """Also the bottleneck, whose last layer starts at zero: the first moves from step two on."""
    router = make_router(RoutingConfig(router=kind, router_hidden=4), 8)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    before = [p.detach().clone() for p in router.parameters()]
    x_BTD, target = torch.randn(2, 5, 8), torch.randn(2, 5)
    for _ in range(2):
        optimizer.zero_grad()
        (router(x_BTD) - target).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, router.parameters(), strict=True))
