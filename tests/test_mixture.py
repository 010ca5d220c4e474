"""The benchmark that trains a mixture from scratch: all of it at a tiny scale, and going on after a
stop.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import SENTENCES

ROOT = Path(__file__).parents[1]
TINY = (
    *("--layers", "2", "--hidden", "32", "--expert-width", "8", "--experts", "8"),
    *("--experts-per-token", "2", "--vocabulary", "300", "--pretrain-steps", "4"),
    *("--pretrain-batch-size", "2", "--steps", "3", "--seeds", "0,1", "--windows", "2"),
    *("--static", "1", "--budgets", "0.9,0.6"),
)


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/mixture.py"), *TINY]
    for name in ("prose", "chats"):
        suffix = "txt" if name == "prose" else "jsonl"
        command += ["--text", f"{name}={folder / name}.{suffix}"]
    command += ["--work", str(folder / "work"), "--json", str(folder / "mixture.json")]
    command += ["--figures", str(folder / "figures"), *more]
    path = f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "mixture.json").read_text()))


@pytest.mark.slow
def test_a_mixture_is_trained_routed_counted_and_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("\n".join(SENTENCES * 200))
    rows = [{"prompt": f"Say {i}", "response": SENTENCES[i % 5] * 3} for i in range(300)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mlp.experts" not in done.stderr  # as missing keys of the best checkpoint
    first = read(tmp_path)
    assert set(first["dense"]) == {"all", "prose", "chats"}
    assert [run["seed"] for run in first["runs"]] == [0, 1]
    assert {"cosine", "greedy"} == set(first["static"]["all"])
    assert [row["rate"] for row in first["random"]["all"]] == [0.9, 0.6]
    assert first["pretraining"]["text"] == ["prose.txt", "chats.jsonl"]
    assert first["pretraining"]["active_parameters"] < first["pretraining"]["parameters"]
    assert [a["name"] for a in first["experts"]["adapters"]] == ["seed 0", "seed 1"]
    layer = first["experts"]["adapters"][0]["layers"][0]
    assert set(layer["domains"]) == {"prose", "chats"}
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"experts-mixture.png", "quality-mixture.png"}

    # Stopped before the last seed and the count: what is there is not made again.
    trimmed = {name: value for name, value in first.items() if name != "experts"}
    trimmed["runs"] = first["runs"][:1]
    (tmp_path / "mixture.json").write_text(json.dumps(trimmed))
    shutil.rmtree(tmp_path / "work/adapters/mlp_token-1")
    done = run(tmp_path, "--continue")
    assert done.returncode == 0, done.stderr
    again = read(tmp_path)
    for part in ("pretraining", "dense", "static", "random", "experts"):
        assert again[part] == first[part], part
    assert again["runs"][0] == first["runs"][0]
    assert again["runs"][1]["routed"] == first["runs"][1]["routed"]

    refused = run(tmp_path, "--continue", "--pretrain-steps", "5")
    assert refused.returncode == 1
    assert "pretrain_steps differ from what the dense model was made with" in refused.stderr
