"""Every recipe is read, and names only what there is."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser

from router_tuning.cli.tuning import Settings
from router_tuning.training.trainer import RouterTrainingArguments

RECIPES = Path(__file__).parents[1] / "recipes"
RUNS = sorted((RECIPES / "runs").glob("*.yaml"))
LARGE = sorted((RECIPES / "large").glob("*.yaml"))


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("recipe_of_tune", RECIPES / "tune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_there_are_recipes() -> None:
    assert len(RUNS) >= 8
    assert {path.stem for path in LARGE} == {"llama-3-8b", "mistral-7b", "qwen2.5-7b"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_is_one_of_the_command_line(path: Path) -> None:
    options = {
        name.replace("-", "_"): value for name, value in yaml.safe_load(path.read_text()).items()
    }
    assert options.keys() <= {field.name for field in fields(Settings)}
    Settings(**options).routing()


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_run_is_one_of_the_script(path: Path, script: Any, tmp_path: Path) -> None:
    parser = HfArgumentParser((script.Recipe, RouterTrainingArguments))
    more = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--budget", "0.6"]
    recipe, args = parser.parse_args_into_dataclasses(script.words([str(path), *more]))
    assert (recipe.kv_window, recipe.length, args.max_steps) == (16, 1024, 480)
    assert args.budget == 0.6  # the command line wins
    assert path.read_text().startswith("# Untested")
