"""The model card: what it says, that hand-written text survives, that no local path gets in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from router_tuning.card import BEGIN, END, card_text, write_card
from router_tuning.config import RoutingConfig


def entry(budget: float) -> dict[str, object]:
    """One calibrated budget, with kept fractions that tell its units apart."""
    return {
        "budget": budget,
        "threshold": budget / 8,
        "kept_fraction": budget + 0.001,
        "kept_of_routed": budget - 0.002,
        "kept_per_unit": {"layers.0.attn": budget - 0.1, "layers.1.attn": budget + 0.05},
    }


def calibrated() -> RoutingConfig:
    """A config with two budgets."""
    return RoutingConfig(
        kv_sink=4, kv_window=16, calibration=[entry(0.7), entry(0.9)], default_budget=0.9
    )


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table line."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_card_says_what_is_routed_and_what_budgets_keep() -> None:
    text = card_text(calibrated(), "some/model")
    rows = table_rows(text)
    assert ["0.9", "0.1125", "0.901", "0.898"] in rows
    assert ["0.7", "0.0875", "0.701", "0.698"] in rows
    assert ["unit", "budget 0.9", "budget 0.7"] in rows
    assert ["layers.0.attn", "0.800", "0.600"] in rows
    assert ["layers.1.attn", "0.950", "0.750"] in rows
    assert "first 4 tokens" in text
    assert "latest 16 tokens" in text
    assert "names no budget uses 0.9" in text
    assert "set_budget(model, 0.9)" in text
    assert "import router_tuning" in text


def test_card_of_an_uncalibrated_adapter_says_so() -> None:
    text = card_text(RoutingConfig(kv="all", layers=[1, 3]), None)
    assert "Not calibrated" in text
    assert ["layers", "1, 3"] in table_rows(text)
    assert "written for every token" in text
    assert "set_budget" not in text
    assert "Kept fraction per layer" not in text


def test_card_of_a_sequence_adapter_says_when_it_decides() -> None:
    text = card_text(RoutingConfig(granularity="attn_sequence", decide_after=7), None)
    assert ["a sequence decides after", "7 tokens, which always run"] in table_rows(text)
    assert "decides once" in text


def test_metadata(tmp_path: Path) -> None:
    data = ModelCard.load(write_card(tmp_path, calibrated(), "some/model")).data
    assert data.to_dict()["library_name"] == "peft"
    assert data.base_model == "some/model"
    assert set(data.tags or []) == {
        "router-tuning",
        "layer-skipping",
        "base_model:adapter:some/model",
    }


def test_name_comes_from_the_recorded_base(tmp_path: Path) -> None:
    config = RoutingConfig(base={"name": "smollm2-135m"})
    card = ModelCard.load(write_card(tmp_path, config))
    assert card.data.base_model == "smollm2-135m"
    assert "Routers for `smollm2-135m`" in card.text


@pytest.mark.parametrize("as_path", [str, os.path.relpath])
def test_a_local_base_leaves_no_path(tmp_path: Path, as_path: Callable[[Path], str]) -> None:
    base = tmp_path / "my-model"
    base.mkdir()
    text = write_card(tmp_path, RoutingConfig(), as_path(base)).read_text()
    assert "Routers for `my-model`" in text
    assert str(tmp_path) not in text
    assert "base_model" not in text.partition(BEGIN)[0]


def test_the_unfilled_form_of_peft_is_replaced(tmp_path: Path) -> None:
    form = ModelCard.from_template(ModelCardData(license="apache-2.0"))
    form.data["tags"] = ["transformers", f"base_model:adapter:{tmp_path}"]
    form.data["base_model"] = str(tmp_path)
    form.save(tmp_path / "README.md")
    card = ModelCard.load(write_card(tmp_path, RoutingConfig(), "some/model"))
    assert "More Information Needed" not in card.text
    assert str(tmp_path) not in card.content
    assert card.data.license == "apache-2.0"
    assert "transformers" in (card.data.tags or [])


def test_what_people_wrote_survives_and_ours_is_renewed(tmp_path: Path) -> None:
    path = write_card(tmp_path, RoutingConfig(), "some/model")
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}Above.\n\n{BEGIN}{rest}\n## Results\n\nBelow.\n")
    write_card(tmp_path, calibrated(), "some/model")
    text = path.read_text()
    assert "Above.\n" in text
    assert text.endswith("## Results\n\nBelow.\n")
    assert text.count(BEGIN) == text.count(END) == 1
    assert "Not calibrated" not in text
    again = write_card(tmp_path, calibrated(), "some/model").read_text()
    assert again == text


def test_a_readme_without_marks_is_kept_below_ours(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My adapter\n\nFor my project.\n")
    text = write_card(tmp_path, RoutingConfig(), None).read_text()
    assert text.index(END) < text.index("# My adapter\n\nFor my project.")


def test_a_failed_write_leaves_the_old_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_card(tmp_path, RoutingConfig(), None)
    old = path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_card(tmp_path, calibrated(), None)
    assert path.read_text() == old
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
