"""What is kept of which tokens, and how far two adapters agree: known decisions give known numbers,
and the verb writes them.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from laws import Case, randomize, routed_model
from router_tuning import RouterTuningConfig, decided_by, load_model, routing_of, save_adapter
from router_tuning.baselines import StaticDrop
from router_tuning.calibration import TOLERANCE, calibrate_windows
from router_tuning.cli import app
from router_tuning.cli.analyse import adapter_names
from router_tuning.data import Windows
from router_tuning.errors import BudgetError, ConfigError, DataError, UnsupportedCallError
from router_tuning.evaluation.decision_statistics import (
    agreement,
    correlation,
    settled_units,
    units_per_token,
    variance,
)
from router_tuning.evaluation.perplexity import window_loss
from router_tuning.evaluation.routing_analysis import (
    DomainText,
    decide,
    read_text,
    routing,
    stability,
)
from router_tuning.evaluation.token_groups import KINDS, frequency_quarters, kinds, loss_quarters
from router_tuning.execution.context import routers_of
from router_tuning.report.routing_figures import routing_figure
from tiny import SENTENCES, tiny_model, token_ids

LENGTH = 24


def windows(number: int, length: int = LENGTH, seed: int = 0) -> Windows:
    ids = token_ids(number, length, seed=seed)
    return Windows(ids, torch.zeros_like(ids, dtype=torch.bool))


@pytest.fixture
def text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> DomainText:
    """Two domains, of two windows and of one."""
    return read_text(model, tokenizer, {"news": windows(2), "plays": windows(1, seed=1)})


def noise(rate: float, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate


# --- Numbers about decisions ---


def test_variance_of_a_choice_of_layers_is_between_units() -> None:
    keep_UM = torch.tensor([[True], [True], [False], [True]]).expand(4, 50)
    parts = variance(keep_UM)
    assert parts == pytest.approx({"units": 1, "tokens": 0, "rest": 0, "tokens_by_chance": 0})
    assert settled_units(keep_UM) == {"always": 3, "never": 1}
    assert units_per_token(keep_UM) == [0, 0, 0, 50, 0]


def test_variance_of_all_or_nothing_is_between_tokens() -> None:
    keep_UM = (torch.arange(40) % 4 > 0).expand(5, 40)
    parts = variance(keep_UM)
    expected = {"units": 0, "tokens": 1, "rest": 0, "tokens_by_chance": 1 / 5}
    assert parts == pytest.approx(expected)
    assert units_per_token(keep_UM) == [10, 0, 0, 0, 0, 30]
    assert settled_units(keep_UM) == {"always": 0, "never": 0}


def test_variance_of_chance_is_as_chance_has_it() -> None:
    rates = torch.tensor([[0.2], [0.5], [0.7], [0.9]])
    keep_UM = torch.rand((4, 20000), generator=torch.Generator().manual_seed(0)) < rates
    parts = {name: value or 0.0 for name, value in variance(keep_UM).items()}
    assert parts["tokens"] == pytest.approx(parts["tokens_by_chance"], abs=0.005)
    assert parts["units"] + parts["tokens"] + parts["rest"] == pytest.approx(1)
    assert parts["units"] == pytest.approx(
        float(rates.var(correction=0)) / (0.575 * 0.425), abs=0.01
    )


def test_decisions_that_do_not_vary_have_no_parts() -> None:
    assert set(variance(torch.ones(3, 5, dtype=torch.bool)).values()) == {None}
    assert correlation(torch.ones(3), torch.rand(3)) is None


def test_the_same_decisions_agree_fully() -> None:
    found = agreement(noise(0.6, 4, 100), noise(0.6, 4, 100))
    assert found["kappa"] == found["agreement"] == found["kappa_within_units"] == 1
    assert found["units_correlation"] == pytest.approx(1)
    assert found["tokens_correlation"] == pytest.approx(1)


def test_opposite_decisions_disagree() -> None:
    keep_UM = torch.arange(100).remainder(2).bool().expand(4, 100)
    assert agreement(keep_UM, ~keep_UM)["kappa"] == pytest.approx(-1)


def test_kappa_by_hand() -> None:
    a = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()  # keeps 4 of 8
    b = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1]]).bool()  # keeps 5 of 8, 5 of them alike
    found = agreement(a, b)
    assert found["agreement"] == pytest.approx(5 / 8)
    assert found["kappa"] == pytest.approx((5 / 8 - 1 / 2) / (1 - 1 / 2))
    shuffled = ((3 / 4) * (2 / 4) + (1 / 4) * (2 / 4) + (1 / 4) * (3 / 4) + (3 / 4) * (1 / 4)) / 2
    assert found["kappa_of_units"] == pytest.approx((shuffled - 1 / 2) / (1 / 2))
    assert found["kappa_within_units"] == pytest.approx((5 / 8 - shuffled) / (1 - shuffled))
    assert found["units_correlation"] == pytest.approx(-1)


def test_shuffled_tokens_leave_the_agreement_about_layers_and_none_about_tokens() -> None:
    rates = torch.tensor([[0.1], [0.4], [0.8], [0.95]])
    a = torch.rand((4, 20000), generator=torch.Generator().manual_seed(0)) < rates
    orders = [torch.randperm(20000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    shuffled = torch.stack([row[order] for row, order in zip(a, orders, strict=True)])
    found = agreement(a, shuffled)
    assert found["kappa"] == pytest.approx(found["kappa_of_units"], abs=0.02)
    assert found["kappa"] == pytest.approx(agreement(a, a)["kappa_of_units"], abs=0.02)
    assert found["kappa_within_units"] == pytest.approx(0, abs=0.02)
    assert found["units_correlation"] == pytest.approx(1)
    assert found["tokens_correlation"] == pytest.approx(0, abs=0.02)


def test_with_layers_alike_independent_decisions_have_no_kappa() -> None:
    found = agreement(noise(0.7, 6, 20000), noise(0.7, 6, 20000, seed=1))
    assert found["kappa"] == pytest.approx(0, abs=0.02)
    assert found["kappa_within_units"] == pytest.approx(0, abs=0.02)


# --- Groups of tokens ---


def kinds_in(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[str, str]]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    groups = kinds(tokenizer, torch.tensor([ids]))
    names = [groups.names[label] for label in groups.label_NL[0]]
    return list(zip(map(tokenizer.decode, ids), names, strict=True))


def test_kinds_of_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    found = kinds_in(tokenizer, "Zq xyz, 7!\n<|im_end|>(qx  <unk>")
    assert found[0] == ("Z", "window start")
    assert found[1] == ("q", "word continuation")
    assert (",", "punctuation") in found
    assert "digit" in dict((token.strip(), kind) for token, kind in found)["7"]
    assert ("\n", "line break") in found
    assert ("<|im_end|>", "special") in found
    assert ("<unk>", "special") in found
    assert (" ", "other") in found
    letters = [kind for token, kind in found if token.strip().isalpha()]
    assert letters.count("word start") >= 2
    # A letter behind a space or a bracket begins a word, behind a letter it does not.
    for (before, _), (token, kind) in pairwise(found):
        if token.strip().isalpha():
            inside = before[-1:].isalnum() and not token.startswith(" ")
            assert kind == ("word continuation" if inside else "word start"), (before, token)


def test_a_special_token_at_the_start_is_the_start(tokenizer: PreTrainedTokenizerFast) -> None:
    assert kinds_in(tokenizer, "<|im_start|>a")[0] == ("<|im_start|>", "window start")


def test_frequencies_count_this_text() -> None:
    ids = torch.tensor([[5] * 8 + [6] * 4 + [7, 8, 9, 10]])
    groups = frequency_quarters(ids)
    names = [groups.names[label] for label in groups.label_NL[0]]
    assert names[:8] == ["most frequent"] * 8  # equal ones stay together
    assert names[8:12] == ["rare"] * 4
    assert names[12:] == ["rarest"] * 4


def test_losses_are_quartered_and_unknown_ones_left_out() -> None:
    loss = torch.tensor([[torch.nan, 0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6]])
    assert loss_quarters(loss).label_NL.tolist() == [[-1, 0, 3, 0, 3, 1, 2, 1, 2]]


# --- A model's decisions ---


def test_text_has_the_dense_loss_of_each_domain(text: DomainText, model: PreTrainedModel) -> None:
    assert text.domains == {"news": slice(0, 2), "plays": slice(2, 3)}
    assert text.loss["plays"] == pytest.approx(window_loss(model, windows(1, seed=1)).loss)
    # The token that is hard to tell is what the one before it finds hard.
    assert torch.equal(
        text.groups["loss"].label_NL[:, 1:], text.groups["next_loss"].label_NL[:, :-1]
    )
    assert bool((text.groups["loss"].label_NL[:, 0] == -1).all())


def test_a_routed_models_text_is_read_without_its_routers(
    text: DomainText, tokenizer: PreTrainedTokenizerFast
) -> None:
    again = read_text(routed_model(), tokenizer, {"news": windows(2)})
    assert again.loss["news"] == pytest.approx(text.loss["news"])


def test_static_dropping_gives_the_exact_numbers(text: DomainText) -> None:
    model = routed_model()
    with decided_by(model, StaticDrop(["layers.1.attn"])):
        found = routing(decide(model, text, batch_size=2), text)
    assert found["all"]["kept_fraction"] == found["all"]["kept_of_routed"] == 0.75
    assert found["all"]["tokens"] == 3 * LENGTH
    kept = {f"layers.{i}.attn": float(i != 1) for i in range(4)}
    assert found["domains"]["plays"]["kept_per_unit"] == kept
    assert found["domains"]["plays"]["units_per_token"] == [0, 0, 0, LENGTH, 0]
    assert found["all"]["variance"]["units"] == pytest.approx(1)
    for groups in found["groups"].values():
        for group in groups.values():
            assert group["kept_of_routed"] == (0.75 if group["tokens"] else None)


def test_what_is_kept_of_a_kind_is_told_by_kind_and_domain(text: DomainText) -> None:
    model = routed_model()

    def first_tokens(unit: Any, x_BTD: Tensor, forward: Any) -> Tensor:
        return (forward.position_BT == 0) | (unit.layer_idx == 3)

    with decided_by(model, first_tokens):
        found = routing(decide(model, text), text)
    by_kind = found["groups"]["kind"]
    start = {"tokens": 2, "kept_of_routed": 1.0}
    assert by_kind["window start"]["domains"]["news"] == start
    assert by_kind["window start"]["tokens"] == 3
    others = [g for name, g in by_kind.items() if name != "window start" and g["tokens"]]
    assert {g["kept_of_routed"] for g in others} == {0.25}
    assert sum(g["tokens"] for g in by_kind.values()) == 3 * LENGTH
    assert list(by_kind) == list(KINDS)
    assert found["all"]["units_per_token"] == [0, 3 * (LENGTH - 1), 0, 0, 3]


def test_the_whole_text_is_kept_at_the_budget_and_the_config_is_as_before(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    domains = {"a": windows(16, 64), "b": windows(16, 64, seed=1)}
    text = read_text(model, tokenizer, domains)
    routed = routed_model()
    config = routing_of(routed).config
    config.calibration = [{"budget": 0.7, "threshold": 0.5}]
    config.default_budget = 0.7
    told: list[tuple[int, int]] = []
    decisions = decide(routed, text, 0.6, progress=lambda *at: told.append(at))
    assert abs(routing(decisions, text)["all"]["kept_fraction"] - 0.6) <= TOLERANCE
    assert config.calibration == [{"budget": 0.7, "threshold": 0.5}]
    assert config.default_budget == 0.7
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_calibrated_thresholds_are_the_adapters_own(text: DomainText) -> None:
    model = routed_model()
    (entry,) = calibrate_windows(model, windows(8, 64, seed=7), [0.6])
    assert decide(model, text, 0.6, calibrated=True).threshold == entry["threshold"]
    assert decide(model, text).threshold == 0.0
    with pytest.raises(BudgetError, match="outside the calibrated range"):
        decide(model, text, 0.2, calibrated=True)


def test_unrouted_layers_count_as_kept(text: DomainText) -> None:
    model = tiny_model()
    routed = get_peft_model(model, RouterTuningConfig(layers=[0, 1]))  # type: ignore[arg-type]
    with decided_by(routed, StaticDrop(["layers.0.attn"])):
        found = routing(decide(routed, text), text)
    assert found["all"]["kept_fraction"] == 0.75
    assert found["all"]["kept_of_routed"] == 0.5


def test_a_model_agrees_with_itself_and_not_with_other_routers(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    text = read_text(model, tokenizer, {"a": windows(16, 64)})
    routed = routed_model()
    a, same = decide(routed, text, 0.6), decide(routed, text, 0.6)
    randomize(routed, seed=2)
    other = decide(routed, text, 0.6)
    assert stability(a, same, text)["all"]["kappa"] == 1
    found = stability(a, other, text)
    assert abs(found["all"]["kappa_within_units"]) < 0.25
    assert found["domains"]["a"] == found["all"]


def test_different_units_cannot_be_compared(text: DomainText) -> None:
    attention = decide(routed_model(), text, 0.6)
    mlps = decide(routed_model(Case(granularity="mlp_token", kv="all")), text, 0.6)
    with pytest.raises(ConfigError, match=r"layers\.0\.attn.*layers\.0\.mlp"):
        stability(attention, mlps, text)


def test_bad_text_and_budgets_are_refused(
    text: DomainText, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = routed_model()
    with pytest.raises(DataError, match="'b', 12"):
        read_text(model, tokenizer, {"a": windows(2), "b": windows(1, 12)})
    with pytest.raises(DataError, match="no windows"):
        read_text(model, tokenizer, {})
    for budget in (0.0, 1.5):
        with pytest.raises(BudgetError, match="above 0"):
            decide(model, text, budget)
    prompts = routed_model()
    routing_of(prompts).config.granularity, routing_of(prompts).config.pooling = (
        "attn_sequence",
        "prompt",
    )
    with pytest.raises(UnsupportedCallError, match="prompt"):
        decide(prompts, text, 0.6)


# --- The verb ---


pytestmark = pytest.mark.usefixtures("progress_bars")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two adapters of one model with random routers, one of another model, and text."""
    home = tmp_path_factory.mktemp("analysis")
    for name, seed in (("model", 0), ("stranger", 1)):
        tiny_model("llama", seed=seed).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    for name, base, seed in (("one", "model", 1), ("two", "model", 2), ("far", "stranger", 1)):
        _save(home, name, base, seed)
    _save(home, "mlps", "model", 1, granularity="mlp_token")
    _save(home, "other_kv", "model", 1, kv="all")
    (home / "prose.txt").write_text(" ".join(SENTENCES * 12))
    chats = [{"prompt": f"What is {i}?", "response": SENTENCES[i % 5]} for i in range(30)]
    (home / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return home


def _save(home: Path, name: str, base: str, seed: int, **fields: Any) -> None:
    config = RouterTuningConfig(**{"granularity": "attn_token", "kv": "kept", **fields})
    routed = get_peft_model(load_model(str(home / base)), config)
    generator = torch.Generator().manual_seed(seed)
    for router in routers_of(routed).values():
        score: Any = router.keep_logits["default"].score  # type: ignore[index, union-attr]
        score.weight.data = torch.randn(score.weight.shape, generator=generator) * 0.2
        score.bias.data.zero_()
    save_adapter(routed, home / name)  # type: ignore[arg-type]


def options(home: Path, *adapters: str) -> list[str]:
    chosen = [part for name in adapters for part in ("--adapter", str(home / name))]
    data = ["--data", f"prose={home / 'prose.txt'}", "--data", f"chats={home / 'chats.jsonl'}"]
    return ["analyse", *chosen, *data, "--budget", "0.7", "--length", "32", "--limit", "4"]


def refused(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert "Traceback" not in done.stderr
    return done.exit_code, " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def result(home: Path) -> dict[str, Any]:
    """The JSON of two adapters and their start."""
    out = ["--json", str(home / "routing.json"), "--figure", str(home / "routing.png")]
    fit = ["--start-from", str(home / "chats.jsonl"), "--start-rows", "6", "--seed", "3"]
    done = CliRunner().invoke(app, [*options(home, "one", "two"), *fit, *out])
    assert done.exit_code == 0, done.stderr
    for words in ("one, two", "start, one", "word start", "var. layers", "measured text"):
        assert words in done.stdout
    found: dict[str, Any] = json.loads((home / "routing.json").read_text())
    return found


def test_the_verb_writes_json(result: dict[str, Any]) -> None:
    assert [a["name"] for a in result["adapters"]] == ["one", "two"]
    assert result["start"]["name"] == "start"
    assert [(p["a"], p["b"]) for p in result["pairs"]] == [
        ("start", "one"),
        ("start", "two"),
        ("one", "two"),
    ]
    assert set(result["text"]) == {"prose", "chats"}
    assert result["text"]["prose"]["windows"] == 4
    assert result["text"]["chats"]["tokens"] == 4 * 32
    for adapter in (result["start"], *result["adapters"]):
        assert adapter["all"]["kept_fraction"] == pytest.approx(0.7, abs=0.01)
        assert set(adapter["domains"]["prose"]["kept_per_unit"]) == {
            f"layers.{i}.attn" for i in range(4)
        }
    kinds_found = result["adapters"][0]["groups"]["kind"]
    assert kinds_found["special"]["domains"]["chats"]["tokens"] > 0
    assert kinds_found["special"]["domains"]["prose"]["tokens"] == 0
    assert result["run"]["seeds"] == [3]
    assert result["run"]["dtype"] == "float32"
    assert {"measured: prose", "measured: chats", "start"} == set(result["run"]["data"])


def test_each_adapter_decides_for_itself(result: dict[str, Any]) -> None:
    """Not all as the first, or as the start; and the start is fitted, so it is no fresh router."""
    one, two = result["adapters"]
    assert one["threshold"] != two["threshold"]
    assert result["pairs"][2]["all"]["kappa"] < 0.9
    assert result["start"]["all"]["variance"]["rest"] > 0


def test_the_figure_is_drawn(result: dict[str, Any], home: Path) -> None:
    assert (home / "routing.png").read_bytes().startswith(b"\x89PNG")
    svg = routing_figure({**result, "start": None}, home / "routing.svg", "Title").read_text()
    for words in ("Title", "attn 3", "prose", "word start", "how often", "two"):
        assert f"<!-- {words}" in svg or words in svg
    assert "start</" not in svg


def test_one_adapter_is_no_pair_and_options_come_from_a_file(home: Path) -> None:
    config = {
        "adapter": [str(home / "one")],
        "data": f"prose={home / 'prose.txt'}",  # one of what may be several
        "budget": 0.7,
        "length": 32,
        "limit": 3,
        "json": str(home / "alone.json"),
    }
    (home / "alone.yaml").write_text(json.dumps(config))  # JSON is YAML
    done = CliRunner().invoke(app, ["analyse", "--config", str(home / "alone.yaml")])
    assert done.exit_code == 0, done.stderr
    assert "kappa" not in done.stdout.splitlines()[0]
    alone = json.loads((home / "alone.json").read_text())
    assert alone["pairs"] == []
    assert alone["start"] is None
    assert alone["text"]["prose"]["windows"] == 3


def test_adapters_are_called_by_their_folders_where_these_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a/seed", "b/seed", "b/other", "start"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert adapter_names(["a/seed", "b/other"]) == ["seed", "other"]
    assert adapter_names(["a/seed", "b/seed"]) == ["a/seed", "b/seed"]
    assert adapter_names(["./start"]) == ["./start"]
    with pytest.raises(ConfigError, match=r"write \./start"):
        adapter_names(["start"])


def test_bad_input_is_an_error_of_one_line(home: Path) -> None:
    one = options(home, "one")
    cases = [
        (2, "no such file", [*one, "--data", "gone=/nowhere/gone.txt"]),
        (2, "NAME=FILE", [*one, "--data", "prose.txt"]),
        (2, "two files of the name 'prose'", [*one, "--data", "prose=x.txt"]),
        (2, "above 0 and at most 1", [*one, "--budget", "1.2"]),
        (2, "nothing to analyse", [*one, "--budget", "1"]),
        (2, "no budget is calibrated", [*one, "--calibrated"]),
        (2, "leave --calibrated out", [*one, "--calibrated", "--start-from", "x.txt"]),
        (2, "one adapter twice", options(home, "one", "one")),
        (1, "does not exist", options(home, "missing")),
        (1, "on one base model", options(home, "one", "far")),
        (2, "granularity 'attn_token'", options(home, "one", "mlps")),
        (
            2,
            "kv 'kept'",
            [*options(home, "one", "other_kv"), "--start-from", str(home / "chats.jsonl")],
        ),
    ]
    for code, words, arguments in cases:
        found, said = refused(*arguments)
        assert found == code, (words, said)
        assert words in said


def test_adapters_of_other_key_policies_are_compared_without_a_start(home: Path) -> None:
    done = CliRunner().invoke(app, options(home, "one", "other_kv"))
    assert done.exit_code == 0, done.stderr
