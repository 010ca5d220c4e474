"""Checkpoints of the official code: what stands in them, and that ours decides as theirs.

The official rule is written down here once more, in a plain loop over the layers, from what the
code of either year says it does; nothing of this package runs in it.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging
from typer.testing import CliRunner

from router_tuning.adapter_folder import load_adapter, save_adapter
from router_tuning.baselines import StaticDrop
from router_tuning.bench import Plan, bench
from router_tuning.calibration import calibrate_windows
from router_tuning.cli import app
from router_tuning.data import Windows
from router_tuning.errors import (
    AdapterError,
    BaseModelMismatchError,
    ConfigError,
    UnsupportedCallError,
)
from router_tuning.evaluation.perplexity import evaluate
from router_tuning.execution.context import decided_by, execute, record, routing_of
from router_tuning.official import import_official, read_official
from router_tuning.training.arguments import RouterTrainingArguments
from router_tuning.training.checks import check_model
from tiny import CACHE_KEY, tiny_model, token_ids

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

ROUTED = (1, 2)  # as there: the deepest layers but the last
IDS = token_ids(3, 14, seed=5)
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0  # padding on the right
MASK[2, 11:] = 0
SHAPE = {"num_hidden_layers": 4, "hidden_size": 32, "vocab_size": 97, "threshold": 0.5}


def routers(seed: int = 0) -> dict[int, Tensor]:
    """Weights (1, D) as the official code saves them: in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.randn((1, 32), generator=generator).bfloat16() for i in ROUTED}


def checkpoint(
    folder: Path, weights: dict[int, Tensor] | None = None, *, year: int = 2026, **fields: Any
) -> Path:
    """A folder as the official code writes it."""
    folder.mkdir(exist_ok=True)
    found = routers() if weights is None else weights
    save_file(
        {f"model.layers.{i}.router.weight": w for i, w in found.items()},
        folder / "model.safetensors",
    )
    flags = [i in found for i in range(4)]
    own = (
        {"model_type": "llama_mindskip", "is_mindskip": flags, "gradient_scale": 0.0}
        if year == 2024
        else {"model_type": "llama", "is_mod": flags, "mod_capacity": None}
    )
    config = {**SHAPE, "granularity": "attn_sequence", **own, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def official_logits(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    weights: dict[int, Tensor],
    granularity: str,
    threshold: float,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The official rule: a mean over all columns, a sigmoid, a threshold, a multiplied update."""
    base: Any = model
    h_BTD = base.model.embed_tokens(ids_BT)
    column_T = torch.arange(ids_BT.shape[1])
    rope = base.model.rotary_emb(h_BTD, column_T[None])
    seen = (column_T[:, None] >= column_T)[None, None] & mask_BT[:, None, None].bool()
    keeps = {}
    for index, layer in enumerate(base.model.layers):
        before_BTD = h_BTD
        x_BTD = layer.input_layernorm(h_BTD)
        keep_BT1 = torch.ones_like(x_BTD[..., :1])
        if index in weights:
            read = x_BTD if "token" in granularity else x_BTD.mean(dim=1, keepdim=True)
            score = torch.sigmoid(read @ weights[index].float().T)
            keep_BT1 = (score - threshold >= 0).float().expand_as(keep_BT1)
            keeps[index] = keep_BT1[..., 0].bool()
        attention_BTD = layer.self_attn(
            hidden_states=x_BTD, position_embeddings=rope, attention_mask=seen
        )[0]
        h_BTD = before_BTD + attention_BTD * (keep_BT1 if "attn" in granularity else 1)
        h_BTD = h_BTD + layer.mlp(layer.post_attention_layernorm(h_BTD))
        if "block" in granularity:
            h_BTD = before_BTD + (h_BTD - before_BTD) * keep_BT1
    logits: Tensor = base.lm_head(base.model.norm(h_BTD))
    return logits, keeps


# --- Equal to the official rule ---


@pytest.mark.parametrize(
    ("year", "granularity", "threshold"),
    [
        (2024, "attn_sequence", 0.5),
        (2026, "attn_sequence", 0.5),
        (2026, "attn_sequence", 0.6),
        (2026, "attn-token", 0.5),
        (2026, "block_sequence", 0.45),
        (2026, "block_token", 0.6),
    ],
)
@pytest.mark.filterwarnings('ignore:pooling="official" decides by the mean')
def test_masked_forwards_agree_with_the_official_rule(
    tmp_path: Path, year: int, granularity: str, threshold: float
) -> None:
    base = tiny_model()
    weights = routers(seed=4)
    folder = checkpoint(tmp_path, weights, year=year, granularity=granularity, threshold=threshold)
    with torch.no_grad():
        wanted, keeps = official_logits(base, IDS, MASK, weights, granularity, threshold)
    model = import_official(folder, base, pooling="official").eval()
    with torch.no_grad(), execute(model, "masked"), record(model) as trace:
        came = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    real = MASK.bool()
    kind = granularity[: granularity.index("attn") + 4] if "attn" in granularity else "block"
    decided = trace.decisions()
    for index, keep_BT in keeps.items():
        assert torch.equal(decided[f"layers.{index}.{kind}"][real], keep_BT[real])
    assert 0 < torch.stack([k[real] for k in keeps.values()]).float().mean() < 1
    torch.testing.assert_close(came[real], wanted[real], rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # no other path is taken without asking
        again = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(again[real], wanted[real], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings('ignore:pooling="official" decides by the mean')
def test_the_official_mean_can_be_calibrated(tmp_path: Path) -> None:
    """So that `eval` can compare it at the same kept fraction."""
    model = import_official(checkpoint(tmp_path), tiny_model(), pooling="official").eval()
    windows = Windows(token_ids(24, 16), torch.zeros((24, 16), dtype=torch.bool))
    (entry,) = calibrate_windows(model, windows, (0.75,))
    assert abs(entry["kept_fraction"] - 0.75) < 0.05
    assert evaluate(model, windows, [0.75])["routed"][0]["kept_fraction"] < 0.8


@pytest.mark.filterwarnings('ignore:pooling="official" decides by the mean')
def test_the_official_mean_sees_padding_and_answers(tmp_path: Path) -> None:
    """What a law of ours forbids, and why this pooling is for comparison alone."""
    model = import_official(checkpoint(tmp_path), tiny_model(), pooling="official").eval()
    with torch.no_grad(), record(model) as trace:
        model(input_ids=IDS[:1], attention_mask=MASK[:1])
        changed = IDS[:1].clone()
        changed[0, 7:] = changed[0, 7:].flip(0) % 90 + 3
        model(input_ids=changed)
        padded = torch.cat([IDS[:1], torch.zeros((1, 30), dtype=torch.int64)], 1)
        model(input_ids=padded, attention_mask=(padded != 0).long())
    first, other, longer = (f.units["layers.1.attn"].logits_BT for f in trace.forwards)
    assert first is not None
    assert other is not None
    assert longer is not None
    assert abs(first[0, 0] - other[0, 0]) > 1e-3
    assert abs(first[0, 0] - longer[0, 0]) > 1e-3


def test_prompt_pooling_is_the_official_prefill(tmp_path: Path) -> None:
    """A prompt alone, without padding, is all that the official prefill is given."""
    base, weights = tiny_model(), routers(seed=4)
    folder = checkpoint(tmp_path, weights)
    with torch.no_grad():
        wanted, _ = official_logits(base, IDS, MASK * 0 + 1, weights, "attn_sequence", 0.5)
    model = import_official(folder, base).eval()
    with torch.no_grad():
        came = model(input_ids=IDS, prompt_lengths=[14] * 3).logits
    torch.testing.assert_close(came, wanted, rtol=1e-4, atol=1e-4)


def test_a_saved_import_loads(tmp_path: Path) -> None:
    model = import_official(checkpoint(tmp_path / "official"), tiny_model()).eval()
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", tiny_model()).eval()
    with torch.no_grad():
        logits = [m(input_ids=IDS, prompt_lengths=[14] * 3).logits for m in (model, again)]
    assert torch.equal(*logits)


# --- What is read ---


def test_what_stands_in_either_checkpoint(tmp_path: Path) -> None:
    old = read_official(checkpoint(tmp_path / "old", year=2024, threshold=0.25))
    assert (old.granularity, old.kv, old.threshold) == ("attn_sequence", "kept", 0.25)
    assert (sorted(old.weights), old.num_layers) == ([1, 2], 4)
    new = read_official(checkpoint(tmp_path / "new", granularity="block_token", mod_capacity=0.5))
    assert (new.granularity, new.kv, new.capacity) == ("block_token", "all", 0.5)
    assert all(w.dtype == torch.float32 and w.shape == (32,) for w in new.weights.values())


def test_threshold_and_target_become_bias_and_budget(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, granularity="attn_token", threshold=0.6, mod_capacity=0.5)
    model = import_official(folder, tiny_model())
    biases = [p.detach() for name, p in model.named_parameters() if name.endswith("score.bias")]
    assert [b.item() for b in biases] == pytest.approx([-math.log(0.6 / 0.4)] * 2)
    assert routing_of(model).config.budget == 0.75  # half of two layers of four


def test_tokens_of_the_code_of_2024_are_sequences(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, year=2024, granularity="attn_token")
    with pytest.warns(UserWarning, match="becomes attn_sequence"):
        assert read_official(folder).granularity == "attn_sequence"


# --- What is refused ---


@pytest.mark.parametrize(
    ("year", "fields", "words"),
    [
        (2026, {"granularity": "mlp_token"}, "router of an MLP reads what its layer's attention"),
        (2024, {"granularity": "mlp_sequence"}, "knows attention alone"),
        (2026, {"threshold": 1.0}, "threshold is 1.0, wanted a number between 0 and 1"),
        (2026, {"threshold": None}, "threshold is None"),
        (2026, {"is_mod": [True] * 3}, "has 3 entries"),
        (2026, {"is_mod": [True] * 4}, r"routes layers \[0, 1, 2, 3\], and .* \[1, 2\]"),
        (2026, {"is_mod": None, "num_hidden_layers": 2}, "there are routers of layers"),
        (2026, {"num_hidden_layers": "4"}, "should say num_hidden_layers"),
    ],
)
def test_a_config_that_cannot_be_imported(
    tmp_path: Path, year: int, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(AdapterError, match=words):
        read_official(checkpoint(tmp_path, year=year, **fields))


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no folder"):
        read_official(tmp_path / "none")
    folder = checkpoint(tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="cut short or damaged"):
        read_official(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_official(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(AdapterError, match="holds a list"):
        read_official(folder)
    (folder / "config.json").unlink()
    with pytest.raises(AdapterError, match=r"has no config\.json"):
        read_official(folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model.norm.weight": torch.ones(3)}, "holds no router"),
        ({"model.layers.1.router.weight": torch.ones(3, 32)}, r"shape \(3, 32\)"),
        ({"model.layers.1.router.weight": torch.full((1, 32), math.nan)}, "not finite"),
        (
            {
                "model.layers.1.router.weight": torch.ones(1, 32),
                "model.layers.2.router.weight": torch.ones(1, 16),
            },
            "different widths",
        ),
        (
            {
                "model.layers.1.router.weight": torch.ones(1, 32),
                "model.layers.1.router.bias": torch.ones(1),
            },
            "have a weight and nothing else",
        ),
    ],
)
def test_weights_that_are_no_routers(
    tmp_path: Path, tensors: dict[str, Tensor], words: str
) -> None:
    folder = checkpoint(tmp_path)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(AdapterError, match=words):
        read_official(folder)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"num_hidden_layers": 6}, "layers 4 there, 6 here"),
        ("mistral", {}, "model_type llama there, mistral here"),
        ("llama", {"vocab_size": 120}, "vocabulary 97 there, 120 here"),
        ("llama", {"hidden_size": 64}, "hidden size 32 there, 64 here"),
    ],
)
def test_another_base_is_refused(
    tmp_path: Path, family: str, fields: dict[str, Any], words: str
) -> None:
    folder = checkpoint(tmp_path, year=2024)
    base = tiny_model(family, **fields)
    with pytest.raises(BaseModelMismatchError, match=words):
        import_official(folder, base)
    assert not hasattr(base, "peft_config")


def test_official_pooling_warns_and_serves_no_cache(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="for comparison alone"):
        model = import_official(checkpoint(tmp_path), tiny_model(), pooling="official").eval()
    ids = IDS[:1]
    with torch.no_grad():
        cache = model(ids).past_key_values
        assert cache is None  # none was made without a word
        for call in (
            lambda: model.generate(ids, max_new_tokens=2, attention_mask=MASK[:1]),
            lambda: model.generate(ids, max_new_tokens=2, attention_mask=MASK[:1], use_cache=False),
            lambda: model(ids, use_cache=True),
            lambda: model(ids, **{CACHE_KEY: DynamicCache(config=model.config)}),
        ):
            with pytest.raises(UnsupportedCallError, match=r"over a cache.*pooling=\"prompt\""):
                call()
        with execute(model, "skipping"), pytest.raises(UnsupportedCallError, match="over a cache"):
            model(ids, use_cache=False)
        starts = torch.arange(14)[None] % 7
        with pytest.raises(UnsupportedCallError, match="takes one text a row"):
            model(ids, position_ids=starts, use_cache=False)
        with model.disable_adapter():  # the dense model generates
            model.generate(ids, max_new_tokens=2, attention_mask=MASK[:1])
        with decided_by(model, StaticDrop(["layers.1.attn"])):  # no router decides
            model(ids, use_cache=True)


@pytest.mark.filterwarnings('ignore:pooling="official" decides by the mean')
def test_official_pooling_is_neither_trained_nor_timed(tmp_path: Path) -> None:
    model = import_official(checkpoint(tmp_path / "c"), tiny_model(), pooling="official")
    args = RouterTrainingArguments(str(tmp_path / "runs"), report_to=[], use_cpu=True)
    with pytest.raises(ConfigError, match="for comparison alone; train with"):
        check_model(model, args)
    with pytest.raises(ConfigError, match='pooling="official" it takes more than'):
        bench(model, IDS.flatten(), Plan())


# --- The verb ---


def test_import_official_verb(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = checkpoint(tmp_path / "official", year=2024)
    options = ["import-official", folder, "--model", tmp_path / "base", "--out", tmp_path / "out"]
    options += ["--json", tmp_path / "out.json"]
    try:
        done = CliRunner().invoke(app, list(map(str, options)))
        assert done.exit_code == 0, done.stderr
        assert "attn_sequence of layers 1, 2 of 4" in done.stdout
        result = json.loads((tmp_path / "out.json").read_text())
        assert (result["layers"], result["pooling"], result["kv"]) == ([1, 2], "prompt", "kept")
        assert load_adapter(tmp_path / "out").peft_config["default"].layers == [1, 2]
        again = CliRunner().invoke(app, list(map(str, options)))
        assert again.exit_code == 2
        assert "holds an adapter already" in again.stderr
        wrong = [*map(str, options[:-2]), "--pooling", "mean"]
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 2
        assert "pooling must be one of" in refused.stderr
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            other = [*map(str, options[:4]), "--out", str(tmp_path / "o"), "--pooling", "official"]
            assert CliRunner().invoke(app, other).exit_code == 0
        assert any("for comparison alone" in str(w.message) for w in said)
    finally:
        logging.enable_progress_bar()
