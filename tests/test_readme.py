"""The README's Python runs as it stands, with a tiny model in the place of the pretrained one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

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
    assert names["trace"].kept_fraction() < 1  # type: ignore[attr-defined]
    adapter = {path.name for path in Path("adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
