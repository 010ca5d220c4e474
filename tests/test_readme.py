"""The README's Python and command lines run as they stand, with a tiny model in the place of the
pretrained one.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging
from typer.testing import CliRunner

from router_tuning import RouterTuningConfig, load_model, make_windows, record
from router_tuning.cli import app
from tiny import SENTENCES, tiny_model

README = Path(__file__).parents[1] / "README.md"
IN_PLACE_OF = {  # what the README writes, and what a tiny run on a CPU needs
    '"smollm2-135m"': '"base"',
    "max_steps=120": "max_steps=30, use_cpu=True, report_to=[], disable_tqdm=True",
    "max_new_tokens=32": "max_new_tokens=4",
}


IN_PLACE_OF_COMMANDS = {
    "tune --model smollm2-135m": "tune --model base --steps 4 --length 32 --held-out 4",
    "other.jsonl --out mean": "other.jsonl --length 32 --limit 4 --budgets 0.8 --out mean",
    "--budgets 0.9,0.8 --compare": "--budgets 0.9,0.8 --compare --length 32 --limit 2",
    "--tasks arc_challenge,piqa": "--tasks piqa --budgets 0.8",
    "--data chats=unseen.jsonl": "--data chats=unseen.jsonl --length 32 --limit 2",
    "--budget 0.8 --prompt": "--budget 0.8 --max-new-tokens 2 --prompt",
    "--prompt-tokens 512,2048 --batch-size 1,8": (
        "--prompt-tokens 12 --batch-size 1 --new-tokens 1 --repeats 1 --variants routed"
    ),
    "official/ --model smollm2-135m": "official/ --model base",
    "--data unseen.jsonl --out shallow": "--data unseen.jsonl --length 32 --limit 2 --out shallow",
}


def readme_block(language: str, holding: str, in_place_of: dict[str, str]) -> str:
    """The README's code block in a language that holds a text, for the tiny model."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if holding in block)
    for written, needed in in_place_of.items():
        assert written in code
        code = code.replace(written, needed)
    return str(code)


@pytest.fixture
def _here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> Iterator[None]:
    """A folder with the model and the data that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    tokenizer.save_pretrained("base")
    rows = [{"prompt": f"Say it {i}", "response": SENTENCES[i % 5] * 3} for i in range(130)]
    for name in ("chats", "other", "unseen"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {f"layers.{i}.block": float(i != 1) for i in range(4)}
    entry = {"budget": 0.6, "threshold": 0.0, "kept_per_unit": kept}
    blocks = RouterTuningConfig(granularity="block_token", calibration=[entry])
    get_peft_model(load_model("base"), blocks).save_pretrained("blocks")
    get_peft_model(load_model("base"), RouterTuningConfig()).save_pretrained("seed1")
    Path("official").mkdir()
    router = {"model.layers.2.router.weight": torch.ones(1, 32)}
    save_file(router, "official/model.safetensors")
    said = {"num_hidden_layers": 4, "is_mod": [False, False, True, False]}
    Path("official/config.json").write_text(json.dumps(said))
    Path("tasks").mkdir()
    asked = {"query": "Question: is it?", "choices": ["it is", "no"], "gold": 0}
    Path("tasks/piqa.jsonl").write_text(json.dumps(asked) + "\n")
    yield
    logging.enable_progress_bar()  # the command line switches transformers' own off


@pytest.mark.usefixtures("_here")
def test_readme_commands_run() -> None:
    """In their order: each has what those before it left."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    code = readme_block("bash", "router-tuning tune", IN_PLACE_OF_COMMANDS)
    lines = [shlex.split(line, comments=True) for line in code.splitlines()]
    commands = [line[1:] for line in lines if line[0] == "router-tuning"]
    verbs = [
        "tune",
        "calibrate",
        "average",
        "eval",
        "eval",
        "analyse",
        "generate",
        "bench",
        "export",
    ]
    verbs += ["import-official", "env"]
    assert [command[0] for command in commands] == verbs
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.stderr)


@pytest.mark.usefixtures("_here")
def test_readme_python_runs() -> None:
    names: dict[str, object] = {}
    code = readme_block("python", "import", IN_PLACE_OF)
    exec(compile(code, str(README), "exec"), names)
    trace: Any = names["trace"]
    assert len(trace.forwards) == 4  # what it generated went through the routers
    # Its prompt is no chat, so how much of that is kept is chance; of chats it is the budget.
    model: Any = names["model"]
    examples: Any = names["examples"]
    text = make_windows(names["tokenizer"], examples[:100], limit=8)  # type: ignore[arg-type]
    with torch.no_grad(), record(model) as seen:
        model(text.ids)
    assert 0.6 < seen.kept_fraction() < 0.95
    adapter = {path.name for path in Path("adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
