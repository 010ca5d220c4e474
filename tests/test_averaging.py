"""The mean of adapters: its weights, what it leaves behind, what it refuses, and its verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from router_tuning import (
    RouterTuningConfig,
    average_adapters,
    calibrate_windows,
    load_adapter,
    record,
    save_adapter,
)
from router_tuning.cli import app
from router_tuning.data import Windows
from router_tuning.errors import AdapterError, BaseModelMismatchError, BudgetError
from router_tuning.execution.context import execute, routers_of
from tiny import SENTENCES, tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("progress_bars")

IDS = token_ids(2, 16, seed=3)
BUDGET = 0.6


def saved(folder: Path, seed: int, base: nn.Module | None = None, **fields: Any) -> Path:
    """An adapter with random routers, calibrated to one budget."""
    model = get_peft_model(base or tiny_model(), RouterTuningConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    for router in routers_of(model).values():
        for parameter in router.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    windows = Windows(token_ids(8, 16), torch.zeros((8, 16), dtype=torch.bool))
    calibrate_windows(model.eval(), windows, [BUDGET])
    return save_adapter(model, folder)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
def first_logits(model: nn.Module) -> Tensor:
    """What the first router, which sees what the dense model does, says of each token."""
    with execute(model, "masked"), record(model) as trace:
        model(IDS, use_cache=False)
    logits: Tensor = next(iter(trace.forwards[0].units.values())).logits_BT
    return logits


@pytest.mark.parametrize("router", ["linear", "bottleneck", "bias"])
@pytest.mark.parametrize("number", [2, 3])
def test_weights_are_the_mean(number: int, router: str, tmp_path: Path) -> None:
    folders = [saved(tmp_path / f"{i}", i, router=router) for i in range(number)]
    parts = [weights(folder) for folder in folders]
    mean = average_adapters(folders, tiny_model())
    found = weights(save_adapter(mean, tmp_path / "mean"))
    assert found.keys() == parts[0].keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, torch.stack([p[name] for p in parts]).mean(0))
    assert all(torch.equal(weights(folders[0])[name], parts[0][name]) for name in found)


def test_logits_of_linear_routers_are_the_mean(tmp_path: Path) -> None:
    folders = [saved(tmp_path / f"{i}", i) for i in range(2)]
    parts = [first_logits(load_adapter(folder, tiny_model()).eval()) for folder in folders]
    assert not torch.allclose(parts[0], parts[1])
    mean = average_adapters(folders, tiny_model()).eval()
    torch.testing.assert_close(first_logits(mean), (parts[0] + parts[1]) / 2)


def test_the_mean_stands_alone_and_has_no_budgets(tmp_path: Path) -> None:
    folders = [saved(tmp_path / f"{i}", i) for i in range(2)]
    before = [(folder / "adapter_config.json").read_text() for folder in folders]
    mean = average_adapters(folders, tiny_model()).eval()
    assert list(mean.peft_config) == ["default"]
    assert mean.active_adapter == "default"
    assert not any(parameter.requires_grad for parameter in mean.parameters())
    with pytest.raises(BudgetError, match="calibrated"):
        mean(IDS, budget=BUDGET)
    folder = save_adapter(mean, tmp_path / "mean")
    loaded = load_adapter(folder, tiny_model()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, mean(IDS).logits)
    assert [(folder / "adapter_config.json").read_text() for folder in folders] == before


def test_budgets_tuned_to_may_differ(tmp_path: Path) -> None:
    folders = [saved(tmp_path / f"{i}", i, budget=b) for i, b in enumerate((0.8, 0.6))]
    average_adapters(folders, tiny_model())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv": "all"}, r"differ in kv \('kept' and 'all'\)"),
        ({"kv_window": 4}, r"differ in kv_window \(0 and 4\)"),
        ({"layers": [1, 2]}, "differ in layers"),
        ({"router": "bias"}, r"differ in router \('linear' and 'bias'\)"),
        ({"granularity": "mlp_token"}, "differ in granularity"),
        ({"lora": {"r": 2, "target_modules": ["q_proj"]}}, "differ in lora"),
    ],
)
def test_other_recipes_are_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    folders = [saved(tmp_path / "0", 0), saved(tmp_path / "1", 1, **fields)]
    with pytest.raises(AdapterError, match=said):
        average_adapters(folders, tiny_model())


def test_one_lora_and_another_base_are_refused(tmp_path: Path) -> None:
    one = saved(tmp_path / "0", 0)
    with pytest.raises(AdapterError, match="two adapters or more, got 1"):
        average_adapters([one], tiny_model())
    lora = {"r": 2, "target_modules": ["q_proj"]}
    both = [saved(tmp_path / f"lora-{i}", i, lora=lora) for i in range(2)]
    with pytest.raises(AdapterError, match="product of the means"):
        average_adapters(both, tiny_model())
    other = saved(tmp_path / "1", 1, base=tiny_model(seed=1))
    with pytest.raises(BaseModelMismatchError):
        average_adapters([one, other], tiny_model())


def test_the_verb_calibrates_and_saves(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 20))
    folders = [saved(tmp_path / f"{i}", i) for i in range(2)]
    words = ["average", "--adapter", folders[0], "--adapter", folders[1], "--length", 32]
    words += ["--data", tmp_path / "text.txt", "--model", tmp_path / "base", "--budgets", "0.8,0.6"]
    words += ["--out", tmp_path / "mean", "--json", tmp_path / "mean.json"]
    options = list(map(str, words))
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.stderr
    assert "the mean of 2 adapters" in done.stdout
    result = json.loads((tmp_path / "mean.json").read_text())
    assert result["averaged"] == list(map(str, folders))
    assert [row["budget"] for row in result["budgets"]] == [0.8, 0.6]
    config = load_adapter(tmp_path / "mean", tiny_model()).peft_config["default"]
    assert sorted(entry["budget"] for entry in config.calibration) == [0.6, 0.8]
    again = CliRunner().invoke(app, options)
    assert again.exit_code == 2
    assert "holds an adapter already" in again.stderr
    alone = [*options[:3], *options[5:-3], str(tmp_path / "other"), *options[-2:]]
    refused = CliRunner().invoke(app, alone)
    assert refused.exit_code == 1
    assert "two adapters or more, got 1" in refused.stderr
