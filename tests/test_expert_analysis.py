"""What experts are assigned and what they execute: counts are those of what runs, known counts give
known measures, and the verb writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from laws import Case, routed_model
from router_tuning import RouterTuningConfig, load_model, replay, save_adapter
from router_tuning.cli import app
from router_tuning.data import Windows
from router_tuning.errors import ConfigError, UnsupportedModelError
from router_tuning.evaluation.expert_analysis import (
    ExpertCounts,
    count_experts,
    entropy,
    executed_stability,
    expert_use,
    specialisation,
)
from router_tuning.evaluation.routing_analysis import DomainText, decide, read_text
from router_tuning.execution.context import routers_of
from router_tuning.report.expert_figures import expert_figure
from router_tuning.units import decoder_of, mixture_layers
from tiny import SENTENCES, tiny_model, token_ids

CASES = [
    Case("mixtral", "mlp_token", "all"),
    Case("qwen3_moe", "mlp_token", "all"),  # a layer without experts among the others
    Case("olmoe", "block_token", "kept"),
    Case("deepseek_v3", "block_token", "kept", 2, 3),
    Case("gpt_oss", "mlp_token", "all"),
    Case("olmoe", "attn_token+mlp_token", "kept"),
    Case("olmoe", "attn_token", "kept"),
]
TWO_OF_FOUR = {"num_experts_per_tok": 2}


def windows(number: int, seed: int = 0) -> Windows:
    ids = token_ids(number, 16, seed=seed)
    return Windows(ids, torch.zeros_like(ids, dtype=torch.bool))


def text_for(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> DomainText:
    return read_text(model, tokenizer, {"news": windows(5), "plays": windows(2, seed=1)})


def watched(model: PreTrainedModel, ids: Tensor) -> dict[int, Tensor]:
    """The tokens that come to each expert while a model runs as it does."""
    found: dict[int, Tensor] = {}
    hooks = []
    for index, experts in mixture_layers(decoder_of(model)).items():

        def come(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
            came = torch.bincount(args[1].flatten(), minlength=4)
            found[index] = found.get(index, 0) + came

        hooks.append(experts.register_forward_pre_hook(come))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_counts_are_those_of_what_runs(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    model = routed_model(case, **TWO_OF_FOUR)
    text = text_for(model, tokenizer)
    decisions = decide(model, text, 0.6)
    found = count_experts(model, text, decisions, batch_size=2)
    kept = dict(zip(decisions.unit_names, decisions.keep_UNL, strict=True))
    with replay(model, kept):
        ran = watched(model, text.windows.ids)
    assert found.layers == tuple(ran)
    for place, tokens_E in enumerate(ran.values()):
        assert torch.equal(found.executed[place].sum(0), tokens_E)
        assert (found.executed[place] <= found.assigned[place]).all()
        assert found.assigned[place].sum(1).tolist() == [5 * 16 * 2, 2 * 16 * 2]
    skipped = [a.sum() - e.sum() for a, e in zip(found.assigned, found.executed, strict=True)]
    assert all(number > 0 for number in skipped) == (case.granularity != "attn_token")


def test_the_dense_model_executes_what_it_assigns(tokenizer: PreTrainedTokenizerFast) -> None:
    """With routers attached, which are off, and without any."""
    routed = routed_model(CASES[0], **TWO_OF_FOUR)
    text = text_for(routed, tokenizer)
    plain = tiny_model("mixtral", **TWO_OF_FOUR)
    done: list[tuple[int, int]] = []
    for model in (routed, plain):
        found = count_experts(model, text, batch_size=2, progress=lambda *n: done.append(n))
        ran = watched(plain, text.windows.ids)
        for place, tokens_E in enumerate(ran.values()):
            assert torch.equal(found.assigned[place].sum(0), tokens_E)
            assert torch.equal(found.executed[place], found.assigned[place])
    assert done[:4] == [(2, 7), (4, 7), (5, 7), (7, 7)]


def test_models_whose_experts_cannot_be_counted_are_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model("llama")
    text = text_for(model, tokenizer)
    with pytest.raises(UnsupportedModelError, match="no MLP of LlamaModel has any"):
        count_experts(model, text)
    mixture: Any = tiny_model("mixtral")
    for layer in mixture.model.layers:  # as a kernel that computes a mixture as a whole
        layer.mlp.forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match="MixtralExperts is not called with the num"):
        count_experts(mixture, text)
    mixture = tiny_model("mixtral")
    mixture.model.layers[0].mlp.forward = lambda x, experts=mixture.model.layers[0].mlp.experts: (
        experts(x)
    )
    with pytest.raises(UnsupportedModelError, match="wanted experts behind a top-k router"):
        count_experts(mixture, text)


# --- Measures ---


def test_entropy_by_hand() -> None:
    assert entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1)
    assert entropy(torch.tensor([0, 7, 0, 0])) == 0
    assert entropy(torch.tensor([2, 2, 0, 0])) == pytest.approx(0.5)
    assert entropy(torch.tensor([0, 0])) is None


def test_specialisation_by_hand() -> None:
    assert specialisation(torch.tensor([[3, 1], [30, 10]])) == pytest.approx(0, abs=1e-12)
    # Domains of other sizes weigh the same.
    assert specialisation(torch.tensor([[4, 4, 0, 0], [0, 0, 0, 100]])) == pytest.approx(1)
    # Experts of p = (1/2, 1/4, 1/4), of which the first tells nothing: half a bit of one.
    assert specialisation(torch.tensor([[2, 2, 0], [2, 0, 2]])) == pytest.approx(0.5)
    assert specialisation(torch.tensor([[3, 1]])) is None
    assert specialisation(torch.tensor([[3, 1], [0, 0]])) is None


def counts(*executed: list[int]) -> ExpertCounts:
    """Layers of three experts with ten assigned tokens each, of one domain."""
    assigned = [torch.full((1, 3), 10) for _ in executed]
    return ExpertCounts(
        tuple(range(len(executed))), ("all",), assigned, [torch.tensor([of]) for of in executed]
    )


def test_use_by_hand() -> None:
    (layer,) = expert_use(counts([10, 5, 0]))
    assert layer["executed_fraction"] == 0.5
    assert layer["assigned"]["load"] == [1, 1, 1]
    assert layer["executed"]["load"] == [1, 0.5, 0]
    assert layer["executed"]["tokens"] == [10, 5, 0]
    assert layer["assigned"]["entropy"] == pytest.approx(1)
    assert layer["executed"]["specialisation"] is None
    assert layer["domains"] == {"all": {"assigned": [10, 10, 10], "executed": [10, 5, 0]}}


def test_stability_by_hand() -> None:
    a, b = counts([10, 8, 6], [4, 2, 0]), counts([9, 8, 7], [5, 4, 3])
    same = executed_stability(a, b)
    assert same["within_layers"] == pytest.approx(1)
    assert same["experts_correlation"] == pytest.approx(0.44 / (0.7 * 0.28) ** 0.5)
    # Layers alike, experts the other way round.
    other = executed_stability(a, counts([6, 8, 10], [0, 2, 4]))
    assert other["within_layers"] == pytest.approx(-1)
    assert (other["experts_correlation"] or 0) > 0.5
    assert executed_stability(counts([5, 5, 5]), counts([1, 2, 3]))["within_layers"] is None
    with pytest.raises(ConfigError, match="in the same layers"):
        executed_stability(a, counts([1, 2, 3]))


# --- The verb ---


pytestmark = pytest.mark.usefixtures("progress_bars")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two adapters of a mixture, one of a dense model, and text."""
    home = tmp_path_factory.mktemp("experts")
    for family in ("olmoe", "llama"):
        tiny_model(family).save_pretrained(home / family)
        tokenizer.save_pretrained(home / family)
    for name, family, seed in (("one", "olmoe", 1), ("two", "olmoe", 2), ("plain", "llama", 1)):
        config = RouterTuningConfig(granularity="mlp_token")
        routed: Any = get_peft_model(load_model(str(home / family)), config)
        for router in routers_of(routed).values():
            score: Any = router.keep_logits["default"].score
            generator = torch.Generator().manual_seed(seed)
            score.weight.data = torch.randn(score.weight.shape, generator=generator) * 0.2
        save_adapter(routed, home / name)
    (home / "prose.txt").write_text(" ".join(SENTENCES * 12))
    (home / "numbers.txt").write_text("0 1 2 3 4 5 6 7 8 9. " * 60)
    return home


def options(home: Path, *adapters: str) -> list[str]:
    chosen = [part for name in adapters for part in ("--adapter", str(home / name))]
    data = ["--data", f"prose={home / 'prose.txt'}", "--data", f"numbers={home / 'numbers.txt'}"]
    return ["analyse", *chosen, *data, "--budget", "0.7", "--length", "32", "--limit", "4"]


def test_the_verb_writes_json_tables_and_a_figure(home: Path) -> None:
    out = ["--json", str(home / "experts.json"), "--expert-figure", str(home / "experts.png")]
    done = CliRunner().invoke(app, [*options(home, "one", "two"), "--experts", *out])
    assert done.exit_code == 0, done.stderr
    for words in ("specialisation", "r of experts", "one, two"):
        assert words in done.stdout
    found = json.loads((home / "experts.json").read_text())
    experts = found["experts"]
    assert [layer["layer"] for layer in experts["dense"]] == [0, 1, 2, 3]
    assert [adapter["name"] for adapter in experts["adapters"]] == ["one", "two"]
    (pair,) = experts["pairs"]
    assert (pair["a"], pair["b"]) == ("one", "two")
    assert -1 <= pair["within_layers"] <= 1
    for adapter, routed in zip(experts["adapters"], found["adapters"], strict=True):
        kept = routed["all"]["kept_per_unit"]
        for layer in adapter["layers"]:
            unit = f"layers.{layer['layer']}.mlp"
            assert layer["executed_fraction"] == pytest.approx(kept[unit])
            assert sum(layer["assigned"]["tokens"]) == 2 * 2 * 4 * 32
            assert set(layer["domains"]) == {"prose", "numbers"}
            assert layer["assigned"]["specialisation"] > 0
    assert (home / "experts.png").read_bytes().startswith(b"\x89PNG")
    svg = expert_figure(experts, home / "experts.svg", "Title").read_text()
    for words in ("Title", "layer 3", "assigned, dense", "executed"):
        assert f"<!-- {words}" in svg or words in svg


def test_without_the_option_nothing_is_counted(home: Path) -> None:
    out = ["--json", str(home / "none.json")]
    done = CliRunner().invoke(app, [*options(home, "one"), *out])
    assert done.exit_code == 0, done.stderr
    assert json.loads((home / "none.json").read_text())["experts"] is None
    assert "specialisation" not in done.stdout


def test_bad_input_is_an_error_of_one_line(home: Path) -> None:
    for code, words, arguments in (
        (1, "no MLP of LlamaModel has any", [*options(home, "plain"), "--experts"]),
        (2, "give --experts too", [*options(home, "one"), "--expert-figure", "x.png"]),
    ):
        done = CliRunner().invoke(app, arguments)
        assert "Traceback" not in done.stderr
        assert (done.exit_code, words in " ".join(done.stderr.split())) == (code, True), done.stderr
