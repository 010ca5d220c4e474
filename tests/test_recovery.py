"""The benchmark of routers, LoRA and both: all of it on a tiny model, and going on after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from tiny import SENTENCES, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_routers_lora_and_both_are_trained_measured_and_resumed(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name, words in (("train", 0), ("report", 3)):
        said = (SENTENCES[(i + words) % 5] for i in range(60))
        chats = [
            {
                "messages": [
                    {"role": "user", "content": s},
                    {"role": "assistant", "content": s[::-1]},
                ]
            }
            for s in said
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    result = tmp_path / "recovery.json"
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/recovery.py")]
    command += ["--model", str(tmp_path / "base"), "--json", str(result)]
    command += ["--train", str(tmp_path / "train.jsonl"), "--work", str(tmp_path / "work")]
    command += ["--report", str(tmp_path / "report.jsonl"), "--held-out", "12", "--steps", "4"]
    command += ["--windows", "4", "--length", "64", "--budget", "0.5", "--lora-r", "2"]
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}

    def run(*more: str) -> None:
        subprocess.run([*command, *more], check=True, env=environment)

    run()
    first = json.loads(result.read_text())
    routers, lora, both, after = first["runs"]
    variants = [one["variant"] for one in first["runs"]]
    assert variants == ["routers", "LoRA", "routers and LoRA", "LoRA, then routers"]
    assert routers["dense"] == both["dense"]
    assert lora["dense"]["loss"] == pytest.approx(routers["dense"]["loss"])
    assert lora["tuned"]["loss"] < lora["dense"]["loss"]
    assert after["dense"] == pytest.approx(lora["dense"])
    assert after["tuned"]["loss"] == pytest.approx(lora["tuned"]["loss"], abs=1e-3)  # bf16 merged
    for one in (routers, both, after):
        assert one["routed"][0]["kept_fraction"] < 0.9
        assert {"static_cosine", "static_greedy", "random"} <= set(one)
    assert 0 < first["resumed"]["tensors"] == first["resumed"]["equal_to_the_bit"]

    stopped = {**first, "runs": first["runs"][:2]}
    result.write_text(json.dumps(stopped))
    run("--continue")
    again = json.loads(result.read_text())
    assert [one["routed"] for one in again["runs"][2:]] == [both["routed"], after["routed"]]
    assert again["resumed"] == first["resumed"]
