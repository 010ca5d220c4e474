"""The README's Python runs as it stands, with a tiny model in the place of the pretrained one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from router_tuning import make_windows, record
from tiny import SENTENCES, tiny_model

README = Path(__file__).parents[1] / "README.md"
IN_PLACE_OF = {  # what the README writes, and what a tiny run on a CPU needs
    '"smollm2-135m"': '"base"',
    "max_steps=120": "max_steps=30, use_cpu=True, report_to=[], disable_tqdm=True",
    "max_new_tokens=32": "max_new_tokens=4",
}


def readme_python() -> str:
    """The README's code block, for the tiny model."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for written, needed in IN_PLACE_OF.items():
        assert written in code
        code = code.replace(written, needed)
    return str(code)


def test_readme_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    tokenizer.save_pretrained("base")
    rows = [{"prompt": f"Say it {i}", "response": SENTENCES[i % 5] * 3} for i in range(130)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, object] = {}
    exec(compile(readme_python(), str(README), "exec"), names)
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
