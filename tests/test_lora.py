"""LoRA inside a router-tuning adapter, and beside it: one adapter, one file, the same laws.

Routers and LoRA are random here: fresh ones change nothing, and would hide one that was not run.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from laws import (
    CHUNKS,
    EFFECT,
    Batch,
    Case,
    Counter,
    assert_close,
    assert_mixed,
    assert_same_decisions,
    bare_model,
    batch,
    difference,
    run,
)
from router_tuning import identity
from router_tuning.adapter_folder import load_adapter, save_adapter
from router_tuning.attach import routing_of, set_budget
from router_tuning.cost import cost
from router_tuning.errors import (
    AdapterError,
    BaseModelMismatchError,
    ConfigError,
    UnsupportedModelError,
)
from router_tuning.execution.context import dense, routers_of
from router_tuning.export import check_droppable
from router_tuning.layer_cost import layer_costs
from router_tuning.lora import RoutedLora, lora_layers, lora_parameters
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.units import decoder_layers, decoder_of
from router_tuning.weight_bytes import layer_weights
from test_peft_tuner import CONFIG, WEIGHTS, logits, traces
from tiny import tiny_model, token_ids

# PEFT 0.21 asks transformers 5.24 for it whenever a PeftModel is made.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Already found a `peft_config` attribute",
)

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "gemma3": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
"""Linear layers of attention and MLP: known parts, sandwich norms, fused projections (flat)."""
FAMILIES = tuple(TARGETS)
KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def lora_on(family: str, **options: Any) -> dict[str, Any]:
    """What to ask of LoRA on a family."""
    return {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[family], **options}


def stir(model: nn.Module, seed: int = 0) -> None:
    """Give the active adapter's routers and LoRA random weights, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for router in routers_of(model).values():
        (name,) = router.active_adapters  # type: ignore[union-attr, operator]
        score: Any = router.keep_logits[name].score  # type: ignore[union-attr, index]
        scale = score.in_features**-0.5
        score.weight.data = torch.randn(score.weight.shape, generator=generator) * scale
        score.bias.data.fill_(0.0)
    for parameter in lora_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def adapted(base: PreTrainedModel, family: str = "llama", /, **fields: Any) -> PeftModel:
    """A base with one adapter of random routers and random LoRA."""
    model = get_peft_model(base, RouterTuningConfig(**{"lora": lora_on(family), **fields}))
    stir(model)
    return model.eval()


# What may be asked


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 4}, "lora has no option 'rank'; there are r, lora_alpha, target_modules"),
        ({"use_dora": True}, "lora with use_dora=True is not supported beside routers"),
        ({"bias": "all"}, "lora with bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "lora with modules_to_save="),
        ({"r": 0}, "lora r must be a whole number of at least 1, got 0"),
        ({"r": True}, "lora r must be a whole number"),
        ({"lora_alpha": 0}, "lora lora_alpha must be positive"),
        ({"lora_dropout": 1.0}, "lora lora_dropout must be at least 0 and below 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of True, False, 'gauss"),
        ({"target_modules": []}, "lora target_modules must be a list of names"),
        ({"target_modules": [3]}, "lora target_modules must be a list of names"),
        ({"target_modules": "q", "layers_to_transform": [1]}, "lora=.*cannot be used when"),
        ("q_proj", "lora must be a dict such as"),
    ],
)
def test_what_lora_cannot_be_is_refused_by_name(lora: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RouterTuningConfig(lora=lora)


def test_options_are_kept_as_plain_values() -> None:
    given = LoraConfig(r=4, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    config = RouterTuningConfig(lora=given)  # type: ignore[arg-type]
    assert config.lora is not None
    assert config.lora["r"] == 4
    assert config.lora["target_modules"] == ["q_proj", "v_proj"]
    assert json.loads(json.dumps(config.to_dict()["lora"])) == config.lora
    assert RouterTuningConfig(lora=config.lora).lora == config.lora
    assert RouterTuningConfig(lora={}).lora == {}
    assert RouterTuningConfig().lora is None


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["q_proj", "qkv"], r"'qkv' names no linear layer of the decoder.*there are down_proj, "),
        (["self_attn"], "'self_attn' names no linear layer"),
        (["q_proj", "lm_head"], "reaches lm_head, but LoRA beside routers goes to linear layers"),
        (r".*\.nothing", "it names no linear layer"),
    ],
)
def test_targets_that_do_not_exist_are_refused_and_leave_the_model(target: Any, words: str) -> None:
    base = tiny_model()
    before = traces(base)
    with pytest.raises(ConfigError, match=words):
        get_peft_model(base, RouterTuningConfig(lora={"target_modules": target}))
    assert traces(base) == before


def test_a_module_that_peft_has_no_lora_for_is_refused_and_leaves_the_model() -> None:
    base = tiny_model()
    base.model.layers[2].self_attn.q_proj = Odd()
    before = traces(base)
    with pytest.raises(ConfigError, match=r"does not fit the model: Target module Odd"):
        get_peft_model(base, RouterTuningConfig(lora={"target_modules": ["q_proj"]}))
    assert traces(base) == before


def test_a_family_that_fails_its_trial_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(decoder: nn.Module) -> None:
        raise UnsupportedModelError("no")

    monkeypatch.setattr(sys.modules["router_tuning.attach"], "try_out", fail)
    base = tiny_model("starcoder2")
    before = traces(base)
    with pytest.raises(UnsupportedModelError, match="no"):
        get_peft_model(base, RouterTuningConfig(lora={"target_modules": ["q_proj"]}))
    assert traces(base) == before


def test_a_family_found_by_its_structure_is_tried_with_lora() -> None:
    lora = {"target_modules": ["q_proj", "c_fc"], "init_lora_weights": False}
    base = tiny_model("starcoder2")
    before = logits(base)
    model = get_peft_model(base, RouterTuningConfig(lora=lora)).eval()
    assert not torch.equal(logits(model), before)
    with dense(model):
        assert torch.equal(logits(model), before)


class Odd(nn.Module):
    """Says it is linear, and is of no make that PEFT knows."""

    in_features = out_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 32))


QK, MLP = ["q_proj", "k_proj"], ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("lora", "names", "layers"),
    [
        ({}, ["q_proj", "v_proj"], 4),
        ({"target_modules": QK, "layers_to_transform": [1, 3]}, QK, 2),
        ({"target_modules": QK, "exclude_modules": ["0.self_attn.q_proj"]}, QK, 3.5),
        ({"target_modules": r".*\.2\.mlp\..*"}, MLP, 1),
    ],
    ids=["usual", "layers", "exclude", "pattern"],
)
def test_where_lora_goes(lora: dict[str, Any], names: list[str], layers: float) -> None:
    model = get_peft_model(tiny_model(), RouterTuningConfig(lora=lora))
    found = [n for n, module in model.named_modules() if isinstance(module, RoutedLora)]
    assert {name.rpartition(".")[2] for name in found} == set(names)
    assert len(found) == len(names) * layers


def test_all_linear_layers_and_no_router() -> None:
    model = adapted(tiny_model(), lora={"target_modules": "all-linear"})
    assert len(lora_layers(model)) == 4 * 7
    model.add_adapter("two", RouterTuningConfig(lora={"target_modules": "all-linear"}))
    assert len(lora_layers(model)) == 4 * 7


def test_one_config_serves_two_models() -> None:
    config = RouterTuningConfig(lora={})
    for family, names in (("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"])):
        get_peft_model(tiny_model(family), config)
        assert config.lora == {"target_modules": names}
    with pytest.raises(
        ConfigError, match="PEFT knows no usual LoRA targets for model_type 'olmo2'"
    ):
        get_peft_model(tiny_model("olmo2"), config)


def test_ranks_by_layer_reach_peft() -> None:
    lora = {"target_modules": ["q_proj"], "r": 2, "rank_pattern": {"1.self_attn.q_proj": 5}}
    model = get_peft_model(tiny_model(), RouterTuningConfig(lora=lora))
    assert [layer.r["default"] for layer in lora_layers(model)] == [2, 5, 2, 2]


# The laws


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_lora_changes_no_bit_and_only_the_adapter_trains(family: str) -> None:
    base = tiny_model(family)
    before = logits(base)
    model = get_peft_model(base, RouterTuningConfig(lora=lora_on(family)))
    assert torch.equal(logits(model), before)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".keep_logits.default." in n or ".lora_" in n for n in trained)
    assert sum(".lora_" in n for n in trained) == 2 * len(lora_layers(model))
    assert identity.identify(model) == identity.identify(tiny_model(family))


CASES = [
    Case("llama", granularity, "kept", 5, 3)
    for granularity in ("attn_token", "attn_sequence", "block_token", "attn_token+mlp_token")
] + [
    Case("llama", "attn_token", "all"),
    Case("llama", "mlp_sequence", "all"),
    *(Case(f, g, "kept", 5, 3) for f in ("gemma3", "gpt2") for g in ("attn_token", "block_token")),
    Case("gemma3", "attn_token+mlp_token", "kept"),
]


def routed(case: Case, lora: bool = True) -> Any:
    """A causal LM with an adapter of random routers, and random LoRA."""
    asked = lora_on(case.family) if lora else None
    return adapted(bare_model(case.family), lora=asked, **vars(case.config)).get_base_model()


@pytest.mark.parametrize("phase", CHUNKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_skipping_equals_masking_and_cached_equals_uncached(case: Case, phase: str) -> None:
    model, given = routed(case), batch()
    skipped = run(model, given, CHUNKS[phase])
    decisions = skipped.trace.decisions()
    assert_mixed(skipped.trace)
    masked = run(model, given, decisions=decisions, path="masked")
    assert_close(skipped, masked, given.real)
    assert_close(skipped, run(model, given, decisions=decisions, path="skipping"), given.real)
    assert_same_decisions(skipped, run(model, given, path="masked"))
    without = run(routed(case, lora=False), given, decisions=decisions)
    assert difference(skipped.logits, without.logits, given.real) > EFFECT


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_what_is_skipped_does_not_run(family: str) -> None:
    model, given = routed(Case(family, "attn_token+mlp_token", "kept")), batch()
    with Counter(model) as counter:
        trace = run(model, given).trace
    keeps = trace.decisions()
    seen = [(i, name) for i, name in counter.rows if ".lora_A." in name]
    assert len(seen) == len(lora_layers(model))
    for index, name in seen:
        kind = "mlp" if name.startswith("mlp.") else "attn"
        kept = keeps[f"layers.{index}.{kind}"][given.real].sum()
        assert counter.rows[index, name] == kept < given.real.sum(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_disabled_are_the_base_model_to_the_bit(family: str) -> None:
    base = tiny_model(family)
    before = logits(base)
    model = adapted(base, family)
    changed = logits(model)
    assert float((changed - before).abs().max()) > EFFECT
    with dense(model):
        assert torch.equal(logits(model), before)
        assert not any(
            layer.disable_adapters for layer in lora_layers(model)
        )  # nothing is switched
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), changed)
    assert len(lora_parameters(model)) == 2 * len(lora_layers(model))  # those that train
    routing_of(model).enabled = False
    assert torch.equal(logits(model), before)


def test_dense_in_one_thread_leaves_lora_on_in_another() -> None:
    model = adapted(tiny_model())
    changed = logits(model)
    with ThreadPoolExecutor(1) as threads, dense(model):
        assert torch.equal(threads.submit(logits, model).result(), changed)
        assert torch.equal(logits(model), logits(tiny_model()))


def test_budget_one_keeps_lora_on() -> None:
    model = adapted(tiny_model())
    alone = get_peft_model(tiny_model(), LoraConfig(**lora_on("llama"))).eval()
    weights = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    alone.load_state_dict(weights, strict=False)
    set_budget(model, 1.0)
    assert torch.equal(logits(model), logits(alone))
    assert not torch.equal(logits(model), logits(tiny_model()))


def test_dropout_of_a_model_in_eval_mode_is_off() -> None:
    base = tiny_model()
    base.model.layers[1].train()
    model = get_peft_model(base, RouterTuningConfig(lora=lora_on("llama", lora_dropout=0.5)))
    modes = {m.training for layer in lora_layers(model) for m in layer.modules()}
    assert modes == {False, True}
    model.eval()
    model.add_adapter("two", RouterTuningConfig(lora=lora_on("llama", lora_dropout=0.5)))
    assert not any(m.training for layer in lora_layers(model) for m in layer.modules())


def test_a_copy_is_dense_by_itself() -> None:
    model = adapted(tiny_model())
    copied = copy.deepcopy(model)
    changed = logits(model)
    with dense(model):
        assert torch.equal(logits(copied), changed)
    with dense(copied):
        assert torch.equal(logits(model), changed)
        assert torch.equal(logits(copied), logits(tiny_model()))


@pytest.mark.parametrize("fields", [{}, {"granularity": ["attn_token", "mlp_token"]}])
@pytest.mark.parametrize("family", FAMILIES)
def test_unload_gives_back_the_very_same_model(family: str, fields: dict[str, Any]) -> None:
    base = tiny_model(family)
    before, plain = traces(base), logits(base)
    model = adapted(base, family, **fields)
    logits(model)
    with model.disable_adapter():
        logits(model)
    assert model.unload() is base
    assert traces(base) == before
    assert torch.equal(logits(base), plain)


def test_merging_is_explained() -> None:
    model = adapted(tiny_model())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ConfigError, match=r"cannot be merged.*unload\(\)"):
            merge()


# Files


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return folder


def base_from(folder: Path, **kwargs: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    return model.eval()


LOADERS: dict[str, Callable[[PreTrainedModel, Path], PeftModel]] = {
    "PeftModel": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(
        base, folder, low_cpu_mem_usage=True
    ),
    "load_adapter": lambda base, folder: load_adapter(folder, base),
    "load_adapter, trainable": lambda base, folder: load_adapter(folder, base, is_trainable=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loader", LOADERS)
def test_saved_equals_loaded(
    base_folder: Path, tmp_path: Path, loader: str, dtype: torch.dtype
) -> None:
    lora = lora_on("llama", target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.5)
    model = adapted(base_from(base_folder, dtype=dtype), lora=lora)
    save_adapter(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    loaded = LOADERS[loader](base_from(base_folder, dtype=dtype), tmp_path).eval()
    given = Batch(token_ids(2, 16, seed=3), torch.ones(2, 16, dtype=torch.long))
    for chunks in (None, [8] + [1] * 8):
        ours, theirs = run(model, given, chunks), run(loaded, given, chunks)
        assert_mixed(ours.trace)
        assert torch.equal(ours.logits, theirs.logits)
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    names = {n for n, _ in loaded.named_parameters() if ".lora_" in n or ".keep_logits." in n}
    assert trained == (names if loader.endswith("trainable") else set())
    assert len(lora_parameters(loaded)) == len([n for n in trained if ".lora_" in n])
    with dense(loaded):
        assert torch.equal(logits(loaded), logits(base_from(base_folder, dtype=dtype)))


def test_lora_moves_to_the_device_of_its_layer() -> None:
    layer, *_ = lora_layers(adapted(tiny_model()))
    layer.base_layer.to("meta")  # the only other device without a GPU
    layer._move_adapter_to_device_of_base_layer("default")
    assert all(p.is_meta for p in layer.parameters())


def test_one_file_holds_both_and_the_card_says_so(base_folder: Path, tmp_path: Path) -> None:
    adapted(base_from(base_folder), lora={"r": 2}).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    assert sum("lora_" in key for key in weights) == 2 * 2 * 4
    assert {KEY.format(0, "A"), KEY.format(3, "B")} <= weights.keys()
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert saved["lora"] == {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    card = (tmp_path / "README.md").read_text()
    assert "| LoRA | rank 2, alpha 8, on `q_proj`, `v_proj` |" in card
    assert "It has LoRA in it too" in card
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert len(lora_layers(model)) == 8


def test_transformers_own_loader_refuses(base_folder: Path, tmp_path: Path) -> None:
    adapted(base_from(base_folder), lora={}).save_pretrained(tmp_path)
    base = base_from(base_folder)
    before = traces(base)
    with pytest.raises(AdapterError, match=r"needs a PEFT model.*PeftModel\.from_pretrained\(m"):
        base.load_adapter(tmp_path)
    with pytest.raises(AdapterError, match="needs a PEFT model"):
        inject_adapter_in_model(RouterTuningConfig(lora={}), base)
    assert traces(base) == before
    with pytest.raises(AdapterError, match="needs a PEFT model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", ["PeftModel", "load_adapter"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(KEY.format(2, "B")), r"lacks 1 of the 24 weights.*layers\.2\..*lora_B"),
        (lambda w: w.update({KEY.format(1, "A"): torch.ones(2, 8)}), r"q_proj.*shape \(2, 8\)"),
        (lambda w: w.update({KEY.format(9, "A"): torch.ones(2, 8)}), r"no LoRA of its.*layers\.9"),
    ],
    ids=["missing", "shape", "unexpected"],
)
def test_weights_that_do_not_fit_are_refused_and_taken_off(
    base_folder: Path, tmp_path: Path, change: Any, words: str, loader: str
) -> None:
    adapted(base_from(base_folder), lora={}).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    base = base_from(base_folder)
    before = traces(base)
    with pytest.raises(AdapterError, match=words):
        LOADERS[loader](base, tmp_path)
    assert traces(base) == before


def test_weights_of_lora_for_a_config_without_are_refused(
    base_folder: Path, tmp_path: Path
) -> None:
    adapted(base_from(base_folder), lora={}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "lora": None}))
    with pytest.raises(AdapterError, match="16 weights that no router and no LoRA of its config"):
        load_adapter(tmp_path, base_from(base_folder))


# Several adapters


def test_lora_follows_the_active_adapter(base_folder: Path, tmp_path: Path) -> None:
    one = adapted(base_from(base_folder), lora={"target_modules": ["q_proj"]})
    two = adapted(base_from(base_folder), lora={"target_modules": ["q_proj", "up_proj"], "r": 2})
    three = adapted(base_from(base_folder), lora=None)
    stir(two, seed=5)
    expected = {"one": logits(one), "two": logits(two), "three": logits(three)}
    for name, model in (("one", one), ("two", two), ("three", three)):
        save_adapter(model, tmp_path / name)
    base = base_from(base_folder)
    before, plain = traces(base), logits(base)
    model = load_adapter(tmp_path / "one", base, adapter_name="one", is_trainable=True)
    load_adapter(tmp_path / "two", model, adapter_name="two")
    model.load_adapter(tmp_path / "three", "three")
    for name in ("three", "one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name]), name
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(f".{name}." in n for n in trained), name
    assert sum(".lora_" in name for name in trained) == 8
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert torch.equal(logits(model), expected["two"])
    model.delete_adapter("two")
    assert not lora_layers(model)
    assert torch.equal(logits(model), expected["three"])
    model.delete_adapter("three")
    assert torch.equal(logits(base), plain)
    assert [n for n, _ in base.named_modules()] == [n for n, _ in before["modules"]]


def test_adding_an_adapter_leaves_what_trains(base_folder: Path) -> None:
    model = adapted(base_from(base_folder), lora={"target_modules": ["q_proj"]})
    before, trained = logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("two", RouterTuningConfig(lora={"target_modules": ["q_proj", "o_proj"]}))
    assert torch.equal(logits(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    with pytest.raises(ConfigError, match="'nope' names no linear layer"):
        model.add_adapter("three", RouterTuningConfig(lora={"target_modules": ["nope"]}))
    assert list(model.peft_config) == ["default", "two"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


# Beside LoRA that is an adapter of its own


def other_lora(base: PreTrainedModel, *targets: str, name: str = "other") -> PeftModel:
    """Plain PEFT LoRA that changes the logits."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    return get_peft_model(base, config, name).eval()


def test_own_lora_and_another_on_other_modules() -> None:
    """In either order both run; dense leaves out the adapter's own, disable_adapter both."""
    found = []
    for own_first in (True, False):
        base = tiny_model()
        plain = logits(base)
        model = None if not own_first else adapted(base, lora={"target_modules": ["q_proj"]})
        other = other_lora(base, "down_proj")
        model = model or adapted(base, lora={"target_modules": ["q_proj"]})
        found.append(logits(model))
        assert torch.equal(logits(other), found[-1])
        alone = logits(other_lora(tiny_model(), "down_proj"))
        with dense(model):
            assert torch.equal(logits(model), alone)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), found[-1])
    assert torch.equal(*found)


def test_taking_the_other_lora_off_leaves_ours() -> None:
    base = tiny_model()
    model = adapted(base, lora={"target_modules": ["q_proj"]})
    routed_alone = logits(model)
    other = other_lora(base, "down_proj")
    assert not torch.equal(logits(model), routed_alone)
    other.merge_adapter()
    assert not any(layer.merged for layer in lora_layers(model))
    other.unmerge_adapter()
    other.unload()
    torch.testing.assert_close(logits(model), routed_alone, atol=1e-3, rtol=1e-3)
    assert len(lora_layers(model)) == 4


def test_two_loras_on_one_module_are_refused() -> None:
    base = tiny_model()
    other = other_lora(base, "q_proj")
    alone, before = logits(other), traces(base)
    with pytest.raises(ConfigError, match=r"q_proj has the LoRA of another adapter.*merge it"):
        get_peft_model(base, RouterTuningConfig(lora={"target_modules": ["q_proj"]}))
    assert traces(base) == before
    assert torch.equal(logits(other), alone)
    base = tiny_model()
    adapted(base, lora={"target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match="has its own LoRA on a module that LoRA 'other' asks"):
        other_lora(base, "q_proj")


def test_routers_over_a_merged_lora(base_folder: Path, tmp_path: Path) -> None:
    """The merged model is another base: the adapter fits it, and no longer the one before."""

    def merged() -> PreTrainedModel:
        model: PreTrainedModel = other_lora(base_from(base_folder), "q_proj").merge_and_unload()
        return model

    model = adapted(merged(), lora=None)
    save_adapter(model, tmp_path)
    for loader in ("PeftModel", "load_adapter"):
        base = merged()
        loaded = LOADERS[loader](base, tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), logits(merged()))
        loaded.delete_adapter("default")
        assert torch.equal(logits(base), logits(merged()))
        with pytest.raises(BaseModelMismatchError, match="same shape, other numbers"):
            LOADERS[loader](base_from(base_folder), tmp_path)


@pytest.mark.parametrize("routers_first", [True, False])
def test_routers_and_another_lora_are_saved_loaded_and_deleted(
    base_folder: Path, tmp_path: Path, routers_first: bool
) -> None:
    base = base_from(base_folder)
    routers = adapted(base, lora=None) if routers_first else None
    other = other_lora(base, "q_proj")
    routers = routers or adapted(base, lora=None)
    both = logits(routers)
    save_adapter(routers, tmp_path / "routers")
    other.save_pretrained(tmp_path / "lora", selected_adapters=["other"])
    assert not any("lora_" in key for key in load_file(tmp_path / "routers" / WEIGHTS))
    again = base_from(base_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        PeftModel.from_pretrained(again, tmp_path / "lora" / "other", "other")
        loaded = load_adapter(tmp_path / "routers", again)
    assert torch.equal(logits(loaded), both)
    with dense(loaded):
        assert torch.equal(logits(loaded), logits(other_lora(base_from(base_folder), "q_proj")))
    loaded.delete_adapter("default")
    only_lora = logits(other_lora(base_from(base_folder), "q_proj"))
    assert torch.equal(logits(again), only_lora)


# What it costs


@pytest.mark.parametrize("granularity", ["attn_token", "block_token", "attn_token+mlp_token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_counts_where_it_ran_and_not_in_the_dense_model(family: str, granularity: str) -> None:
    case, given = Case(family, granularity, "kept", 5, 3), batch(padded=False)
    model, without = routed(case), routed(case, lora=False)
    with Counter(model) as counter:
        trace = run(model, given).trace
    same = run(without, given, decisions=trace.decisions()).trace
    places = [place for place, rows in counter.rows.items() if ".lora_" in place[1] and rows]
    ours, theirs = cost(model, trace), cost(without, same)
    assert ours.flops - theirs.flops == sum(counter.flops[place] for place in places) > 0
    assert ours.dense_flops == theirs.dense_flops
    layers = decoder_layers(decoder_of(model))
    read = [layers[i].get_submodule(name).weight.nbytes for i, name in places]  # type: ignore[union-attr]
    assert ours.weight_bytes - theirs.weight_bytes == sum(read)
    assert ours.dense_weight_bytes == theirs.dense_weight_bytes


def test_lora_of_an_adapter_that_is_not_active_costs_nothing() -> None:
    model = adapted(tiny_model(), lora={"target_modules": ["q_proj", "up_proj"]})
    decoder = decoder_of(model)
    before = layer_costs(decoder), [(w.query, w.mlp) for w in layer_weights(decoder)]
    idle = {"target_modules": ["q_proj", "down_proj"], "r": 7}
    model.add_adapter("idle", RouterTuningConfig(lora=idle))
    assert (layer_costs(decoder), [(w.query, w.mlp) for w in layer_weights(decoder)]) == before
    model.set_adapter("idle")
    assert layer_costs(decoder) != before[0]
    assert layer_costs(decoder, dense=True) == layer_costs(decoder_of(tiny_model()))


def test_an_adapter_with_lora_is_not_exported() -> None:
    model = adapted(tiny_model(), granularity="block_token")
    with pytest.raises(UnsupportedModelError, match="LoRA of its own, which the checkpoint would"):
        check_droppable(model, ["layers.1.block"])
