"""The PEFT adapter: attach, switch, save, load, take off; and every folder that must be refused.

Routers are random here: fresh ones keep everything, and would hide a router that was not loaded.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from laws import FIRST_FIVE, Batch, assert_mixed, run
from router_tuning import embedded, peft_config
from router_tuning.adapter_folder import load_adapter, save_adapter
from router_tuning.attach import attach, routing_of, set_budget
from router_tuning.errors import (
    AdapterError,
    BaseModelMismatchError,
    BudgetError,
    ConfigError,
    UnsupportedModelError,
)
from router_tuning.execution.context import record
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.peft_tuner import ROUTERS, RouterLayer
from tiny import checkpoint_activations, tiny_model, token_ids

# PEFT 0.21 asks transformers 5.24 for it whenever a PeftModel is made.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KEY = "base_model.model.model.layers.{}.skip_router_attn.keep_logits.score.weight"
IDS = token_ids(2, 16, seed=3)


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base model of two kinds of family: pre-norm, and sandwich."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("llama-only")
    tiny_model("llama").save_pretrained(folder)
    return folder


def base_from(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """The base model in a folder."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    return model.eval()


def randomise(model: nn.Module, adapter_name: str = "default", seed: int = 0) -> None:
    """Give an adapter's routers random weights, about half of whose logits are negative."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{ROUTERS}.{adapter_name}." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """The model's logits of IDS, on the skipping path."""
    found: Tensor = model(IDS).logits
    return found


def adapted(base: PreTrainedModel, adapter_name: str = "default", **fields: Any) -> PeftModel:
    """The base with a random adapter."""
    model = get_peft_model(base, RouterTuningConfig(**fields), adapter_name)
    randomise(model, adapter_name)
    return model.eval()


def saved(base_folder: Path, folder: Path, **fields: Any) -> tuple[Path, Tensor]:
    """An adapter folder, and the logits of the model that was saved."""
    model = adapted(base_from(base_folder), **fields)
    model.save_pretrained(folder)
    return folder, logits(model)


def change_config(folder: Path, **fields: Any) -> None:
    """Change fields in an adapter's config file."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change an adapter's weights file."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything about a model's objects that putting an adapter on could change."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [
            {
                n: len(v)
                for n, v in module.__dict__.items()
                if "hooks" in n and hasattr(v, "__len__")
            }
            for module in model.modules()
        ],
        "forwards": [module.__dict__.get("forward") for module in model.modules()],
        "tensors": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "keys": list(model.state_dict()),
    }


LOADERS: dict[str, Callable[[PreTrainedModel, Path], PeftModel]] = {
    "PeftModel": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(
        base, folder, low_cpu_mem_usage=True
    ),
    "AutoPeft": lambda base, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "load_adapter": lambda base, folder: load_adapter(folder),
    "load_adapter on a model": lambda base, folder: load_adapter(folder, base),
}
CHECKED = ("PeftModel", "load_adapter on a model")


def test_type_is_registered_like_any_other() -> None:
    assert PeftType("ROUTER_TUNING") is PeftType.ROUTER_TUNING
    assert PeftType.ROUTER_TUNING in list(PeftType)
    assert RouterTuningConfig().peft_type.value == "ROUTER_TUNING"
    assert copy.deepcopy(PeftType.ROUTER_TUNING) is PeftType.ROUTER_TUNING


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"budget": 0}, BudgetError),
        ({"budget": float("nan")}, BudgetError),
        ({"granularity": "attention"}, ConfigError),
        ({"kv": "all", "kv_sink": 4}, ConfigError),
        ({"modules_to_save": ["lm_head"]}, ConfigError),
        ({"format_version": 99}, ConfigError),
    ],
)
def test_config_is_checked_when_it_is_made(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        RouterTuningConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": [1, 9]}, "layer 9"),
        ({"target_modules": ["q_proj"]}, "no unit to route"),
        ({"exclude_modules": ["self_attn"]}, "no unit to route"),
    ],
)
def test_config_that_does_not_fit_leaves_the_model_as_it_was(
    model: PreTrainedModel, fields: dict[str, Any], words: str
) -> None:
    before = traces(model)
    with pytest.raises(ConfigError, match=words):
        get_peft_model(model, RouterTuningConfig(**fields))
    assert traces(model) == before


def test_unknown_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), RouterTuningConfig(task_type=None))


def test_fresh_adapter_changes_nothing_and_trains_routers_only(base_folder: Path) -> None:
    base = base_from(base_folder)
    names, dense = list(base.state_dict()), logits(base)
    model = get_peft_model(base, RouterTuningConfig())
    assert torch.equal(logits(model), dense)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 8
    assert all(".skip_router_attn.keep_logits.default." in name for name in trainable)
    assert [n for n in base.state_dict() if "skip_router_attn" not in n] == names
    assert next(iter(base.model.layers)).skip_router_attn.keep_logits["default"].score.in_features


@pytest.mark.parametrize("loader", LOADERS)
def test_saved_equals_loaded(base_folder: Path, tmp_path: Path, loader: str) -> None:
    folder, routed = saved(base_folder, tmp_path)
    base = base_from(base_folder)
    assert not torch.equal(routed, logits(base))
    model = LOADERS[loader](base, folder)
    assert torch.equal(logits(model), routed)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
@pytest.mark.parametrize("family", FIRST_FIVE)
def test_a_loaded_adapter_decodes_like_the_one_saved(
    family: str, granularity: str, tmp_path: Path
) -> None:
    """A prompt and then token by token, by our loader and by plain PEFT."""
    model = adapted(tiny_model(family), granularity=granularity, decide_after=4, kv_window=2)
    model.save_pretrained(tmp_path)
    given = Batch(IDS, torch.ones_like(IDS))
    chunks = [8] + [1] * 8
    expected = run(model, given, chunks)
    assert_mixed(expected.trace)
    for load in (PeftModel.from_pretrained, lambda base, folder: load_adapter(folder, base)):
        loaded = run(load(tiny_model(family), str(tmp_path)), given, chunks)
        assert torch.equal(loaded.logits, expected.logits)
        for unit, keep in expected.trace.decisions().items():
            assert torch.equal(loaded.trace.decisions()[unit], keep)


@pytest.mark.parametrize(
    "fields",
    [
        {"kv": "all", "router": "bottleneck", "router_hidden": 3, "layers": [1, 2]},
        {"granularity": "attn_sequence", "decide_after": 4, "kv_sink": 2, "router": "bias"},
        {"granularity": "mlp_token", "layers": [0, 2]},
        {"granularity": ["mlp_sequence", "attn_token"], "decide_after": 3},
    ],
    ids=["bottleneck-all", "sequence-bias", "mlp", "mlp-and-attention"],
)
def test_settings_are_loaded_too(base_folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder, routed = saved(base_folder, tmp_path, **fields)
    base = base_from(base_folder)
    assert not torch.equal(routed, logits(base))
    model = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(model), routed)
    for name, value in fields.items():
        assert getattr(routing_of(model).config, name) == value


def test_saved_files(base_folder: Path, tmp_path: Path) -> None:
    saved(base_folder, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert KEY.format(3) in load_file(tmp_path / WEIGHTS)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "ROUTER_TUNING"
    assert config["base_model_name_or_path"] == str(base_folder)
    assert config["base"]["num_layers"] == 4
    assert config["base"]["fingerprint"]
    card = (tmp_path / "README.md").read_text()
    assert "router_tuning.load_adapter" in card
    assert "More Information Needed" not in card
    assert str(base_folder.parent) not in card


def test_budgets_travel_with_the_adapter(llama_folder: Path, tmp_path: Path) -> None:
    model = adapted(base_from(llama_folder))
    calibration = [{"budget": 0.6, "threshold": 0.7, "kept_fraction": 0.6, "kept_of_routed": 0.6}]
    routing_of(model).config.calibration = calibration
    own_threshold = logits(model)
    set_budget(model, 0.6)
    assert not torch.equal(logits(model), own_threshold)
    loaded = load_adapter(save_adapter(model, tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    with torch.no_grad():
        assert torch.equal(loaded(IDS, budget=1.0).logits, logits(base_from(llama_folder)))


def test_generate_through_peft_skips(llama_folder: Path, tmp_path: Path) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    model = load_adapter(folder)
    with record(model) as trace:
        model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(trace.forwards) == 3
    assert 0 < trace.kept_fraction() < 1


def test_disabled_adapter_is_the_dense_model(base_folder: Path, tmp_path: Path) -> None:
    folder, routed = saved(base_folder, tmp_path)
    base = base_from(base_folder)
    dense = logits(base)
    model = load_adapter(folder, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), dense)
        assert routing_of(model).enabled is False
    assert torch.equal(logits(model), routed)
    assert not any(p.requires_grad for p in model.parameters())  # it was loaded frozen


@pytest.mark.parametrize("granularity", ["attn_token", ["attn_token", "mlp_token"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_unload_gives_back_the_very_same_model(
    base_folder: Path, checkpointing: bool, granularity: str | list[str]
) -> None:
    base = base_from(base_folder)
    if checkpointing:
        checkpoint_activations(base)
    before, dense = traces(base), logits(base)
    model = adapted(base, layers=[0, 2], granularity=granularity)
    with model.disable_adapter():
        logits(model)
    assert traces(base) != before
    assert model.unload() is base
    assert traces(base) == before
    assert torch.equal(logits(base), dense)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_second_adapter_of_the_same_name_is_refused(model: PreTrainedModel) -> None:
    adapter = adapted(model)
    routed = logits(adapter)
    with pytest.raises(ConfigError, match=r"'default' already.*unload\(\)"):
        get_peft_model(model, RouterTuningConfig(layers=[0]))
    assert torch.equal(logits(adapter), routed)
    assert routing_of(model).config is adapter.peft_config["default"]
    assert torch.equal(logits(adapted(adapter.unload())), routed)


def test_merging_is_refused(model: PreTrainedModel) -> None:
    adapter = adapted(model)
    for merge in (adapter.merge_and_unload, adapter.merge_adapter):
        with pytest.raises(ConfigError, match=r"cannot be merged.*unload\(\).*set_budget"):
            merge()
    assert any(isinstance(m, RouterLayer) for m in model.modules())


def test_settings_follow_the_active_adapter(base_folder: Path, tmp_path: Path) -> None:
    one, routed_one = saved(base_folder, tmp_path / "one", kv="all")
    two, routed_two = saved(
        base_folder, tmp_path / "two", granularity="attn_sequence", decide_after=4, layers=[1, 3]
    )
    three, routed_three = saved(base_folder, tmp_path / "three", kv="kept")
    assert not torch.equal(routed_one, routed_three)  # other settings for the same units
    model = load_adapter(one)
    assert load_adapter(two, model, adapter_name="two") is model
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), routed_two)
    assert [u.layer_idx for u in routing_of(model).units] == [1, 3]
    model.set_adapter("default")
    assert torch.equal(logits(model), routed_one)
    assert routing_of(model).config is model.peft_config["default"]
    model.load_adapter(three, "three")  # PEFT's own way leaves the active one
    assert torch.equal(logits(model), routed_one)
    model.set_adapter("three")
    assert torch.equal(logits(model), routed_three)
    with pytest.raises(ConfigError, match="one adapter can route"):
        model.base_model.set_adapter(["default", "two"])


def test_deleting_adapters(llama_folder: Path, tmp_path: Path) -> None:
    base = base_from(llama_folder)
    dense = logits(base)
    two, routed_two = saved(llama_folder, tmp_path, kv="all", layers=[1])
    model = adapted(base, layers=[0, 2])
    model.load_adapter(two, "two")
    model.delete_adapter("default")
    assert model.active_adapters == ["two"]
    assert torch.equal(logits(model), routed_two)
    assert not hasattr(base.model.layers[0], "skip_router_attn")
    model.delete_adapter("two")
    assert torch.equal(logits(base), dense)
    assert not any(isinstance(m, RouterLayer) for m in base.modules())
    assert not any("forward" in m.__dict__ for m in base.modules())


def test_switching_keeps_a_disabled_model_disabled(model: PreTrainedModel) -> None:
    dense = logits(model)
    adapter = adapted(model)
    adapter.add_adapter("two", RouterTuningConfig(layers=[2]))
    randomise(adapter, "two")
    with adapter.disable_adapter():
        adapter.set_adapter("two")
        assert torch.equal(logits(adapter), dense)
    assert not torch.equal(logits(adapter), dense)


def test_a_copy_routes_through_its_own_routers(model: PreTrainedModel) -> None:
    adapter = adapted(model)
    routed, dense = logits(adapter), logits(adapter.get_base_model())
    assert torch.equal(routed, dense)
    copied = copy.deepcopy(adapter)
    randomise(adapter, seed=2)
    assert torch.equal(logits(copied), routed)
    assert not torch.equal(logits(adapter), routed)
    with adapter.disable_adapter():
        assert torch.equal(logits(copied), routed)
        assert routing_of(copied).enabled


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_routers_stay_in_fp32(model: PreTrainedModel, cast: str) -> None:
    adapter = adapted(model)
    before = {n: p.clone() for n, p in adapter.named_parameters() if ROUTERS in n}
    getattr(adapter, cast)()
    after = {n: p for n, p in adapter.named_parameters() if ROUTERS in n}
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert next(model.parameters()).dtype != torch.float32
    with record(adapter) as trace:
        logits(adapter)
    recorded = trace.forwards[0].units["layers.0.attn"].logits_BT
    assert recorded is not None
    assert recorded.dtype == torch.float32


def test_routers_load_in_fp32_beside_a_bf16_base(llama_folder: Path, tmp_path: Path) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    model = load_adapter(folder, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    weights = load_file(folder / WEIGHTS)
    assert weights
    for key, loaded in get_peft_model_state_dict(model).items():
        assert torch.equal(loaded, weights[key])


def test_a_router_moves_to_the_device_of_its_layer() -> None:
    layer, meta = RouterLayer(), torch.device("meta")  # the only other device without a GPU
    layer.add_router("default", nn.Linear(2, 1), meta)
    layer.keep_logits["default"].to_empty(device="cpu")  # as low_cpu_mem_usage leaves it
    layer._move_adapter_to_device_of_base_layer("default")
    assert all(p.device == meta for p in layer.parameters())
    assert not hasattr(layer, "weight")  # PEFT's own looks for it in itself, without end
    assert not hasattr(layer, "bias")


@pytest.mark.parametrize("loader", CHECKED)
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_hidden_layers": 3}, "num_layers 4 there, 3 here"),
        ({"hidden_size": 64}, "hidden_size 32 there, 64 here"),
        ({"seed": 5}, "same shape, other numbers"),
    ],
    ids=["layers", "hidden", "weights"],
)
def test_another_base_is_refused_before_anything_is_loaded(
    llama_folder: Path, tmp_path: Path, other: dict[str, Any], words: str, loader: str
) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    model = tiny_model("llama", **other)
    before = traces(model)
    with pytest.raises(BaseModelMismatchError, match=words):
        LOADERS[loader](model, folder)
    assert traces(model) == before


def test_another_base_is_refused_for_a_second_adapter(llama_folder: Path, tmp_path: Path) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    model = adapted(tiny_model("llama", seed=5))
    routed, before = logits(model), traces(model)
    for load in (
        lambda: model.load_adapter(folder, "two"),
        lambda: load_adapter(folder, model, adapter_name="two"),
    ):
        with pytest.raises(BaseModelMismatchError):
            load()
        assert list(model.peft_config) == ["default"]
        assert traces(model) == before
    assert torch.equal(logits(model), routed)


def test_changed_weights_can_be_allowed(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, routed = saved(llama_folder, tmp_path)
    model = load_adapter(folder, tiny_model("llama", seed=5), allow_changed_weights=True)
    assert not torch.equal(logits(model), routed)
    monkeypatch.setenv("ROUTER_TUNING_ALLOW_CHANGED_WEIGHTS", "1")
    PeftModel.from_pretrained(tiny_model("llama", seed=5), folder)


def test_one_config_serves_two_models(model: PreTrainedModel) -> None:
    config = RouterTuningConfig()
    get_peft_model(model, config)
    first = config.base
    get_peft_model(tiny_model("gemma3"), config)
    assert first is not None
    assert config.base is not None
    assert config.base["model_type"] != first["model_type"]


@pytest.mark.parametrize("loader", CHECKED)
@pytest.mark.parametrize("keep", [0, 400, -1])
def test_truncated_weights_are_refused(
    llama_folder: Path, tmp_path: Path, loader: str, keep: int
) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:keep])
    with pytest.raises(AdapterError, match=WEIGHTS):
        LOADERS[loader](base_from(llama_folder), folder)


def test_missing_files_are_named(llama_folder: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nothing-here", str(tmp_path / "nothing-here"), "./nope", Path("a/b")):
        for load in (load_adapter, RouterTuningConfig.from_pretrained):
            with pytest.raises(AdapterError, match=f"the folder .*{Path(place)} does not exist"):
                load(place)  # type: ignore[operator]
    for load in (load_adapter, RouterTuningConfig.from_pretrained):
        with pytest.raises(AdapterError, match=f"{tmp_path} holds no {CONFIG}.*another folder"):
            load(tmp_path)  # type: ignore[operator]
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="file is a file; wanted the folder"):
        load_adapter(tmp_path / "file")
    folder, _ = saved(llama_folder, tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"{WEIGHTS} cannot be read"):
        load_adapter(folder)


def test_a_name_that_may_be_the_hubs_is_told_of_as_both() -> None:
    """No hub is asked here."""
    with pytest.raises(AdapterError, match="folder some/nope does not exist here, and no hub rep"):
        load_adapter("some/nope")


def test_an_adapter_one_folder_further_down_is_pointed_at(
    llama_folder: Path, tmp_path: Path
) -> None:
    """PEFT saves an adapter of another name than "default" into a folder of that name."""
    get_peft_model(base_from(llama_folder), RouterTuningConfig(), "mine").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="there is one in its folder mine"):
        load_adapter(tmp_path)
    load_adapter(tmp_path / "mine")


@pytest.mark.parametrize("text", ["", '{"peft_type": "ROUTER_TU', "[1, 2]", "\x00\x01"])
def test_half_written_config_is_refused(llama_folder: Path, tmp_path: Path, text: str) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    (folder / CONFIG).write_text(text)
    with pytest.raises(AdapterError, match=rf"{CONFIG}.*cut short"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format_version": 2, "a_new_field": 1}, "format version 2.*upgrade"),
        ({"kv": "some"}, "kv must be one of"),
        ({"init_bias": "large"}, "no adapter can be read.*init_bias must be positive.*'large'"),
        ({"format_version": "2"}, "format_version must be a whole number.*'2'"),
        ({"layers": 3}, "layers must be a list"),
        ({"calibration": [{"budget": 0.5}]}, r"calibration\[0\] must be a dict"),
    ],
)
def test_config_that_is_not_understood_is_refused(
    llama_folder: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    change_config(folder, **fields)
    for loader in CHECKED:
        with pytest.raises(AdapterError, match=words):
            LOADERS[loader](base_from(llama_folder), folder)


def test_adapter_of_another_type_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    lora = get_peft_model(base_from(llama_folder), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="LORA"):
        load_adapter(tmp_path, base_from(llama_folder))


@pytest.mark.parametrize("loader", CHECKED)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(KEY.format(2)), r"lacks 1 of the 8 .*layers\.2\.skip_router_attn"),
        (lambda w: w.update({KEY.format(7): torch.ones(1, 32)}), r"no router.*layers\.7\."),
        (lambda w: w.update({KEY.format(1): torch.ones(1, 8)}), r"layers\.1\..*shape \(1, 8\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused_and_taken_off(
    llama_folder: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    words: str,
    loader: str,
) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    change_weights(folder, change)
    base = base_from(llama_folder)
    before = traces(base)
    with pytest.raises(AdapterError, match=words):
        LOADERS[loader](base, folder)
    assert traces(base) == before


def test_config_for_more_layers_than_were_saved_is_refused(
    llama_folder: Path, tmp_path: Path
) -> None:
    folder, _ = saved(llama_folder, tmp_path, layers=[0, 1])
    change_config(folder, layers=[0, 1, 3])
    with pytest.raises(AdapterError, match=r"layers\.3\."):
        load_adapter(folder)


def test_a_bad_second_adapter_leaves_the_first(llama_folder: Path, tmp_path: Path) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    change_weights(folder, lambda w: w.pop(KEY.format(2)))
    model = adapted(base_from(llama_folder))
    routed = logits(model)
    with pytest.raises(AdapterError, match="lacks 1"):
        model.load_adapter(folder, "two")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), routed)


def test_bad_weights_for_an_adapter_in_use_leave_it(llama_folder: Path, tmp_path: Path) -> None:
    folder, routed = saved(llama_folder, tmp_path)
    model = PeftModel.from_pretrained(base_from(llama_folder), folder)
    change_weights(folder, lambda w: w.pop(KEY.format(2)))
    with pytest.raises(AdapterError, match="lacks 1"):
        model.load_adapter(folder, "default")  # as a Trainer resumes
    assert torch.equal(logits(model), routed)


def test_save_adapter_writes_the_same_files(llama_folder: Path, tmp_path: Path) -> None:
    model = adapted(base_from(llama_folder), "mine")
    save_adapter(model, tmp_path / "new" / "folder")
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {
        CONFIG,
        WEIGHTS,
        "README.md",
    }
    assert torch.equal(logits(load_adapter(tmp_path / "new" / "folder")), logits(model))


def test_full_disk_keeps_the_old_adapter(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base_from(llama_folder))
    save_adapter(model, tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    randomise(model, seed=2)

    def full(tensors: dict[str, Tensor], path: str, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.peft_model, "safe_save_file", full)
    with pytest.raises(AdapterError, match=r"No space left on device.*still whole"):
        save_adapter(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_interrupted_save_pretrained_keeps_the_old_config(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base_from(llama_folder))
    model.save_pretrained(tmp_path)
    old = (tmp_path / CONFIG).read_bytes()
    model.peft_config["default"].default_budget = 0.5

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert (tmp_path / CONFIG).read_bytes() == old
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


def test_a_place_that_cannot_be_written_is_named(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    adapter = adapted(model)
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(AdapterError, match=f"cannot write the adapter to {place}"):
            save_adapter(adapter, place)


def test_saving_again_keeps_what_people_wrote(llama_folder: Path, tmp_path: Path) -> None:
    model = adapted(base_from(llama_folder))
    for save in (save_adapter, lambda m, folder: m.save_pretrained(folder)):
        save(model, tmp_path)
        card = tmp_path / "README.md"
        card.write_text(card.read_text() + "\nBy hand.\n")
        save(model, tmp_path)
        assert "\nBy hand.\n" in card.read_text()


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        ({"target_modules": ["layers.1.self_attn", "3.self_attn"]}, [1, 3]),
        ({"target_modules": r".*\.[02]\.self_attn"}, [0, 2]),
        ({"exclude_modules": ["0.self_attn"]}, [1, 2, 3]),
    ],
)
def test_module_patterns_become_layers(
    model: PreTrainedModel, patterns: dict[str, Any], layers: list[int]
) -> None:
    adapter = get_peft_model(model, RouterTuningConfig(**patterns))
    assert routing_of(adapter).config.layers == layers
    assert [u.layer_idx for u in routing_of(adapter).units] == layers
    has_router = [hasattr(layer, "skip_router_attn") for layer in model.model.layers]
    assert [i for i, has in enumerate(has_router) if has] == layers


def test_patterns_cannot_route_half_a_layer(model: PreTrainedModel) -> None:
    config = RouterTuningConfig(
        granularity=["attn_token", "mlp_token"], target_modules=["1.self_attn", "1.mlp", "2.mlp"]
    )
    before = traces(model)
    with pytest.raises(ConfigError, match=r"leaves out others \(model.layers.2.self_attn\)"):
        get_peft_model(model, config)
    assert traces(model) == before
    config = RouterTuningConfig(granularity="mlp_token", target_modules=["2.mlp"])
    assert [u.name for u in routing_of(get_peft_model(model, config)).units] == ["layers.2.mlp"]


def test_model_routed_by_the_engine_is_refused(model: PreTrainedModel) -> None:
    config = RouterTuningConfig()
    attach(model, config)
    with pytest.raises(ConfigError, match="detach"):
        get_peft_model(model, config)


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def lora_on(base: PreTrainedModel) -> PeftModel:
    """A LoRA that changes the logits, the same each time."""
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(**LORA)).eval()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_and_routers_in_either_order(base_folder: Path, lora_first: bool) -> None:
    base = base_from(base_folder)
    dense = logits(base)
    if lora_first:
        lora = lora_on(base)
        lora_only = logits(lora)
        routed = get_peft_model(base, RouterTuningConfig(), "routers")
        assert torch.equal(logits(routed), lora_only)
        assert sum("lora_" in n for n, p in routed.named_parameters() if p.requires_grad) == 16
    else:
        routed = get_peft_model(base, RouterTuningConfig(), "routers")
        lora = lora_on(base)
        lora_only = logits(lora)
    assert not torch.equal(lora_only, dense)
    randomise(base, "routers")
    assert not torch.equal(logits(routed), lora_only)
    assert torch.equal(logits(routed), logits(lora))
    with routed.disable_adapter():  # PEFT's switch is the whole model's
        assert torch.equal(logits(base), dense)
    assert set(get_peft_model_state_dict(routed, adapter_name="routers")) >= {KEY.format(0)}
    keys = [*get_peft_model_state_dict(routed, adapter_name="routers")]
    assert not any("lora_" in key for key in keys)
    assert not any(ROUTERS in key for key in get_peft_model_state_dict(lora))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_routers_saved_over_a_lora_load_over_it(llama_folder: Path, tmp_path: Path) -> None:
    lora = lora_on(base_from(llama_folder))
    routed = get_peft_model(lora.get_base_model(), RouterTuningConfig(), "routers")
    randomise(routed, "routers")
    save_adapter(routed, tmp_path / "routers", "routers")
    lora.save_pretrained(tmp_path / "lora", selected_adapters=["default"])
    again = PeftModel.from_pretrained(base_from(llama_folder), tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = load_adapter(tmp_path / "routers", again, adapter_name="routers")
    assert torch.equal(logits(both), logits(routed))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_unloading_routers_leaves_a_lora_and_the_reverse(llama_folder: Path) -> None:
    lora = lora_on(base_from(llama_folder))
    base, lora_only = lora.get_base_model(), logits(lora)
    routed = adapted(base, "routers")
    assert routed.unload() is base
    assert torch.equal(logits(lora), lora_only)
    assert list(lora.peft_config) == ["default"]
    with pytest.raises(ConfigError, match="layer 9"):
        adapted(base, "routers", layers=[9])
    assert list(lora.peft_config) == ["default"]
    routed = adapted(base, "routers")
    both = logits(routed)
    lora.merge_adapter()
    torch.testing.assert_close(logits(lora), both, atol=1e-3, rtol=1e-3)
    lora.unmerge_adapter()
    merged = lora.merge_and_unload()
    torch.testing.assert_close(logits(merged), both, atol=1e-3, rtol=1e-3)
    assert not any("lora_" in name for name, _ in merged.named_parameters())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_name_that_a_lora_has_is_refused(llama_folder: Path) -> None:
    lora = lora_on(base_from(llama_folder))
    with pytest.raises(ConfigError, match=r"'default' already, of type LORA"):
        get_peft_model(lora.get_base_model(), RouterTuningConfig())
    assert isinstance(lora.peft_config["default"], LoraConfig)


def test_injecting_without_a_peft_model(llama_folder: Path, tmp_path: Path) -> None:
    folder, routed = saved(llama_folder, tmp_path)
    weights = load_file(folder / WEIGHTS)
    model = base_from(llama_folder)
    inject_adapter_in_model(RouterTuningConfig(), model, state_dict=weights)
    result = set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys
    assert torch.equal(logits(model), routed)
    assert get_peft_model_state_dict(model).keys() == {
        key.removeprefix("base_model.model.") for key in weights
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_own_loader(llama_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder, routed = saved(llama_folder, tmp_path)
    model = base_from(llama_folder, dtype=dtype)
    model.load_adapter(folder)
    from_adapter = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    weights = load_file(folder / WEIGHTS)
    for loaded in (model, from_adapter):
        found = {n: p for n, p in loaded.named_parameters() if ROUTERS in n}
        assert len(found) == len(weights)
        for name, parameter in found.items():
            saved_key = f"base_model.model.{name.replace('.default', '')}"
            assert torch.equal(parameter, weights[saved_key])
        if dtype == torch.float32:
            assert torch.equal(logits(loaded), routed)


def test_transformers_own_loader_refuses_another_base(llama_folder: Path, tmp_path: Path) -> None:
    folder, _ = saved(llama_folder, tmp_path)
    with pytest.raises(BaseModelMismatchError):
        tiny_model("llama", seed=5).load_adapter(folder)


def test_trainer_checkpoints_resume_and_load(llama_folder: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(8, 12)]

    def trainer(steps: int) -> Trainer:
        torch.manual_seed(0)
        model = get_peft_model(base_from(llama_folder), RouterTuningConfig(init_bias=0.01))
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=rows)

    straight = trainer(4)
    straight.train()
    folder = tmp_path / "checkpoint-2"
    assert {CONFIG, WEIGHTS, "README.md"} <= {p.name for p in folder.iterdir()}
    halfway = logits(load_adapter(folder))
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(folder))
    assert torch.equal(logits(resumed.model.eval()), logits(straight.model.eval()))
    assert not torch.equal(logits(straight.model), halfway)


@pytest.fixture
def alias(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An alias "tiny" whose model lies in the cache; returns the list of what is resolved."""
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(embedded.ALIASES, "tiny", embedded.ALIASES["smollm2-135m"])
    asked: list[str] = []

    def resolve(name: str) -> str:
        asked.append(name)
        folder = tmp_path / "cache" / "models" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            folder.symlink_to(llama_folder)
        return str(folder)

    monkeypatch.setattr(embedded, "resolve", resolve)
    monkeypatch.setattr(peft_config, "resolve", resolve)
    return asked


def test_an_alias_is_saved_by_its_name_and_loads_everywhere(
    tmp_path: Path, alias: list[str]
) -> None:
    model = adapted(embedded.load_model("tiny"))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["base"]["name"] == "tiny"
    assert "Routers for `tiny`" in (folder / "README.md").read_text()
    assert str(tmp_path) not in (folder / "README.md").read_text()
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(folder),
        load_adapter(folder),
        load_adapter(save_adapter(load_adapter(folder), tmp_path / "again")),
    ):
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.peft_config["default"].base_model_name == "tiny"
    again = AutoPeftModelForCausalLM.from_pretrained(folder)
    again.save_pretrained(tmp_path / "third")
    assert json.loads((tmp_path / "third" / CONFIG).read_text()) == config


def test_the_cache_folder_of_an_alias_is_called_by_its_name(
    tmp_path: Path, alias: list[str]
) -> None:
    embedded.load_model("tiny")
    folder = tmp_path / "cache" / "models" / "tiny"
    model = adapted(base_from(folder))
    assert model.peft_config["default"].base_model_name == "tiny"
    assert model.peft_config["default"].base["name"] == "tiny"
    folder.unlink()
    alias.clear()
    with pytest.warns(UserWarning, match="Could not find a config file in tiny"):  # PEFT's own
        model.save_pretrained(tmp_path / "adapter")
    assert alias == []  # saving a model that is there already fetches none


def test_looking_at_a_config_fetches_no_model(alias: list[str], tmp_path: Path) -> None:
    config = RouterTuningConfig(base_model_name_or_path="tiny")
    config.save_pretrained(str(tmp_path / "adapter"))
    read = RouterTuningConfig.from_pretrained(str(tmp_path / "adapter"))
    assert "RouterTuningConfig(" in repr(read)
    assert read == config
    assert read.to_dict() == config.to_dict()
    copy.deepcopy(read)
    assert alias == []
    found = PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path
    assert found == str(tmp_path / "cache" / "models" / "tiny")
    assert alias == ["tiny"]
