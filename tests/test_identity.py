"""Base identity: what counts as the same model, what is refused, and what never matters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from router_tuning.errors import BaseModelMismatchError
from router_tuning.identity import ALLOW_VARIABLE, base_parameters, check_identity, identify
from tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_same_model_passes_and_describes_itself(family: str) -> None:
    recorded = json.loads(json.dumps(identify(tiny_model(family), "a/name")))
    assert recorded["name"] == "a/name"
    assert recorded["architecture"] == type(tiny_model(family)).__name__
    assert (recorded["hidden_size"], recorded["num_layers"], recorded["vocab_size"]) == (32, 4, 97)
    assert len(recorded["fingerprint"]) == 64
    assert recorded["note"] is None
    check_identity(tiny_model(family), recorded)


def test_name_is_the_models_own_if_none_is_given() -> None:
    model = tiny_model()
    model.name_or_path = "owner/some-model"
    assert identify(model)["name"] == "owner/some-model"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_does_not_matter(dtype: torch.dtype) -> None:
    in_fp32, cast = tiny_model(), tiny_model().to(dtype)
    check_identity(cast, identify(in_fp32))
    check_identity(in_fp32, identify(cast))


def test_float32_and_bfloat16_have_one_fingerprint() -> None:
    assert identify(tiny_model())["fingerprint"] == identify(tiny_model().bfloat16())["fingerprint"]


def test_weights_that_were_bfloat16_have_one_fingerprint_in_every_dtype() -> None:
    first = identify(tiny_model().bfloat16().float())["fingerprint"]
    assert identify(tiny_model().bfloat16().half())["fingerprint"] == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_single_tensor_counts(dtype: torch.dtype) -> None:
    recorded = identify(tiny_model())
    names = [name for name, _ in tiny_model().named_parameters()]
    for name in names:
        changed = tiny_model()
        changed.get_parameter(name).data.mul_(1.02)
        with pytest.raises(BaseModelMismatchError, match="other numbers"):
            check_identity(changed.to(dtype), recorded)


def test_another_seed_is_refused_naming_both_and_the_override(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded, other = identify(tiny_model(), "owner/first"), tiny_model(seed=1)
    other.name_or_path = "owner/second"
    with pytest.raises(BaseModelMismatchError) as raised:
        check_identity(other, recorded)
    for said in ("owner/first", "owner/second", ALLOW_VARIABLE, "allow_changed_weights"):
        assert said in str(raised.value)
    check_identity(other, recorded, allow_changed_weights=True)
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    check_identity(other, recorded)


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("llama", {"num_hidden_layers": 2}, "num_layers 4 there, 2 here"),
        ("llama", {"hidden_size": 64}, "hidden_size 32 there, 64 here"),
        ("llama", {"vocab_size": 99}, "vocab_size 97 there, 99 here"),
        ("mistral", {}, "model_type llama there, mistral here"),
    ],
)
def test_another_shape_is_refused_whatever_is_allowed(
    family: str, fields: dict[str, int], said: str
) -> None:
    recorded = identify(tiny_model("llama"), "the-base")
    with pytest.raises(BaseModelMismatchError, match=said) as raised:
        check_identity(tiny_model(family, **fields), recorded, allow_changed_weights=True)
    assert "the-base (LlamaForCausalLM" in str(raised.value)
    assert type(tiny_model(family, **fields)).__name__ in str(raised.value)


def test_adapters_are_no_part_of_the_base() -> None:
    recorded = identify(tiny_model())
    names = [name for name, _ in tiny_model().named_parameters()]
    model = tiny_model()
    for layer in model.model.layers:
        layer.skip_router_attn = nn.Linear(32, 1)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_()
    check_identity(tuned, recorded)
    check_identity(model, recorded)
    assert sorted(name for name, _ in base_parameters(model)) == sorted(names)
    model.model.layers[0].self_attn.q_proj.base_layer.weight.data.mul_(1.02)
    with pytest.raises(BaseModelMismatchError):
        check_identity(tuned, recorded)


def test_tied_weights_count_once() -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    again = copy.deepcopy(tied)
    check_identity(again, identify(tied))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def _on_meta() -> nn.Module:
    return tiny_model().to("meta")


def _with_int8_weight() -> nn.Module:
    model = tiny_model()
    weight = torch.zeros(32, 32, dtype=torch.int8)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _with_quantization_config() -> nn.Module:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_with_int8_weight, "quantised"),
        (_with_quantization_config, "quantised"),
        (_on_meta, "not in memory"),
    ],
)
def test_weights_that_cannot_be_compared_are_checked_by_shape_and_it_is_said(
    make: Callable[[], nn.Module], why: str
) -> None:
    model = make()
    identity = identify(model)
    assert identity["fingerprint"] is None
    assert why in identity["note"]
    with pytest.warns(UserWarning, match=f"by shape only: .*{why}"):
        check_identity(model, identify(tiny_model()))
    with pytest.warns(UserWarning, match=f"by shape only: .*{why}"):
        check_identity(tiny_model(), identity)
    with pytest.raises(BaseModelMismatchError, match="num_layers"):
        check_identity(model, identify(tiny_model(num_hidden_layers=2)))
