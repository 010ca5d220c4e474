"""Static export: what is written loads without this package, and computes what skipping computed.

Calibrations are written by hand here: which blocks a budget hardly runs is the tests' to say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging
from typer.testing import CliRunner

from router_tuning import export
from router_tuning.adapter_folder import save_adapter
from router_tuning.baselines import StaticDrop
from router_tuning.cli import app
from router_tuning.data import load_examples, make_windows
from router_tuning.errors import (
    BudgetError,
    ConfigError,
    RouterTuningError,
    UnsupportedModelError,
)
from router_tuning.evaluation.perplexity import window_loss
from router_tuning.execution.context import decided_by
from router_tuning.export import blocks_below, check_droppable, write_shallow
from router_tuning.peft_config import RouterTuningConfig
from tiny import SENTENCES, tiny_model, token_ids

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

IDS = token_ids(2, 20, seed=3)
KEPT = {
    0.9: {"layers.0.block": 1.0, "layers.1.block": 0.6, "layers.2.block": 1.0},
    0.5: {"layers.0.block": 1.0, "layers.1.block": 0.0, "layers.2.block": 0.04},
}


def calibrated(**fields: Any) -> RouterTuningConfig:
    """A config of three routed blocks of four, of which budget 0.5 hardly runs two."""
    entries = [
        {"budget": budget, "threshold": 0.0, "kept_fraction": budget, "kept_per_unit": kept}
        for budget, kept in sorted(KEPT.items())
    ]
    given = {"granularity": "block_token", "layers": [0, 1, 2], "calibration": entries, **fields}
    return RouterTuningConfig(**given)


def routed(family: str = "llama", **fields: Any) -> PeftModel:
    model = get_peft_model(tiny_model(family, **fields), calibrated())
    assert isinstance(model, PeftModel)
    return model.eval()


def static_logits(model: PeftModel, dropped: list[str]) -> Tensor:
    with torch.no_grad(), decided_by(model, StaticDrop(dropped)):
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def plain_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits: Tensor = loaded(input_ids=IDS, use_cache=False).logits
    return logits


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


# --- Which blocks ---


def test_blocks_below_a_share() -> None:
    assert blocks_below(calibrated(), 0.05, 0.5) == {"layers.1.block": 0.0, "layers.2.block": 0.04}
    assert blocks_below(calibrated(), 0.01, 0.5) == {"layers.1.block": 0.0}
    assert blocks_below(calibrated(default_budget=0.9), 0.7) == {"layers.1.block": 0.6}


@pytest.mark.parametrize(
    ("fields", "below", "budget", "error", "words"),
    [
        ({"granularity": "attn_token"}, 0.05, 0.5, ConfigError, "only whole blocks"),
        ({"granularity": ["attn_token", "mlp_token"]}, 0.05, 0.5, ConfigError, "or no MLP"),
        ({"calibration": []}, 0.05, 0.5, BudgetError, "router-tuning calibrate"),
        ({}, 0.05, 0.7, BudgetError, "name one of 0.5, 0.9"),
        ({}, 0.05, None, BudgetError, "no default budget"),
        ({}, 0.05, 0.9, ConfigError, r"the least is layers\.1\.block with 0\.600"),
        ({"granularity": "block_sequence"}, 0.05, 0.9, ConfigError, "first 32 tokens"),
        ({}, 0.0, 0.5, ConfigError, "--drop-below is a share"),
        ({}, 1.5, 0.5, ConfigError, "--drop-below is a share"),
    ],
)
def test_blocks_below_says_what_to_do(
    fields: dict[str, Any], below: float, budget: float | None, error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        blocks_below(calibrated(**fields), below, budget)


# --- What is written ---


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"layer_types": None}),
        ("gemma3", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}),
        ("qwen3_moe", {"mlp_only_layers": []}),
        ("deepseek_v3", {"first_k_dense_replace": 1}),
        ("gpt2", {"n_layer": 3}),
    ],
)
def test_export_loads_plainly_and_equals_the_static_drop(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    model = routed(family)
    loaded = write_shallow(model, ["layers.1.block"], tmp_path / "out")
    wanted = static_logits(model, ["layers.1.block"])
    torch.testing.assert_close(plain_logits(tmp_path / "out"), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, static_logits(model, []), atol=1e-2)  # the block did work
    found = config_of(tmp_path / "out")
    assert {name: found.get(name) for name in fields} == fields
    assert not any("skip_router" in name for name, _ in loaded.named_parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_dropping_two_blocks_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = routed("gemma3")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    write_shallow(model, ["layers.0.block", "layers.2.block"], tmp_path / "out")
    wanted = static_logits(model, ["layers.0.block", "layers.2.block"])
    torch.testing.assert_close(plain_logits(tmp_path / "out"), wanted, rtol=1e-5, atol=1e-5)
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 2
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_an_export_is_not_marked_as_quantised(tmp_path: Path) -> None:
    """What transformers loads from GGUF is, though its weights are plain numbers."""
    model = routed()
    model.get_base_model().config.quantization_config = {"quant_method": "gguf"}
    write_shallow(model, ["layers.1.block"], tmp_path / "out")
    assert "quantization_config" not in config_of(tmp_path / "out")


def test_tokenizer_and_notices_are_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "LICENSE").write_text("yours")
    notices = [tmp_path / "LICENSE"]
    write_shallow(
        routed(), ["layers.1.block"], tmp_path / "out", tokenizer=tokenizer, notices=notices
    )
    text = SENTENCES[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == tokenizer(text)
    assert (tmp_path / "out" / "LICENSE").read_text() == "yours"


# --- What is refused ---


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "model.safetensors").exists()  # half of it is there
            raise OSError(28, "No space left on device")

    with pytest.raises(RouterTuningError, match=r"No space left on device\. Nothing"):
        write_shallow(routed(), ["layers.1.block"], tmp_path / "out", tokenizer=Full())
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_says_other_things_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a family with lists by layer that are not known here."""
    plain = export.shorter_config

    def forgetful(config: Any, gone: list[int]) -> Any:
        shorter = plain(config, gone)
        shorter.layer_types = shorter.layer_types[::-1]
        return shorter

    monkeypatch.setattr(export, "shorter_config", forgetful)
    with pytest.raises(UnsupportedModelError, match="gives other logits"):
        write_shallow(routed("gemma3"), ["layers.1.block"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_layers_of_another_make_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LEADING_COUNTS", ())  # so its count still speaks of layer 0
    model = routed("deepseek_v3")
    with pytest.raises(UnsupportedModelError, match="no ordinary checkpoint can express"):
        write_shallow(model, ["layers.0.block"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_dropping_everything_or_nothing_is_refused() -> None:
    model = get_peft_model(tiny_model(), RouterTuningConfig(granularity="block_token"))
    with pytest.raises(ConfigError, match="all 4 blocks would be left out"):
        check_droppable(model, [f"layers.{i}.block" for i in range(4)])
    with pytest.raises(ConfigError, match="no block to leave out"):
        check_droppable(model, [])
    with pytest.raises(ConfigError, match=r"names 'layers\.9\.block'"):
        check_droppable(model, ["layers.9.block"])


def test_packed_weights_are_refused() -> None:
    model = routed()
    base: Any = model.get_base_model()
    weight = base.model.layers[0].mlp.up_proj.weight
    base.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        weight.to(torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj\.weight are quantised"):
        check_droppable(model, ["layers.1.block"])


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_lora_on_the_base_is_refused() -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    model = get_peft_model(adapted.base_model.model, calibrated(), adapter_name="routers")
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        check_droppable(model, ["layers.1.block"])


def test_a_full_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        write_shallow(routed(), ["layers.1.block"], tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        write_shallow(routed(), ["layers.1.block"], tmp_path / "mine")


# --- The verb ---


def test_export_verb_measures_before_and_after(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = tmp_path / "base"
    tiny_model("gemma3").save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "NOTICE.md").write_text("whose it is")
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 3))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), calibrated())
    assert isinstance(model, PeftModel)
    save_adapter(model, tmp_path / "adapter")
    options = ["--adapter", tmp_path / "adapter", "--budget", "0.5", "--length", "32"]
    options += ["--data", tmp_path / "text.txt", "--out", tmp_path / "out"]
    options += ["--json", tmp_path / "out.json"]
    done = CliRunner().invoke(app, ["export", *map(str, options)])
    assert done.exit_code == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["dropped"] == {"layers.1.block": 0.0, "layers.2.block": 0.04}
    assert (result["layers"], result["exported"]["layers"]) == (4, 2)
    windows = make_windows(tokenizer, load_examples(str(tmp_path / "text.txt")), length=32)
    with decided_by(model, StaticDrop(["layers.1.block", "layers.2.block"])):
        static = window_loss(model.eval(), windows)
    assert result["exported"]["loss"] == pytest.approx(static.loss, abs=1e-5)
    assert result["dense"]["loss"] == pytest.approx(result["routed"]["loss"], abs=1e-5)  # fresh
    assert result["exported"]["loss"] != pytest.approx(result["dense"]["loss"], abs=1e-3)
    assert result["exported"]["parameters"] < result["parameters"]
    assert (tmp_path / "out" / "NOTICE.md").exists()
    assert "without 2 blocks" in done.stdout
    again = CliRunner().invoke(app, ["export", *map(str, options)])
    assert again.exit_code == 2
    assert "is not empty" in again.stderr
