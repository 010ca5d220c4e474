"""The benchmark beside others' code: peers made up here, in folders such as a checkout is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import speed_peers
import speed_tables
import torch
from peer_models.checkout import LIKE_4, class_name_kept, filled
from peer_models.d_llm import _bias_at, _named_by_meta
from peer_models.mod import _scaled
from peer_models.official import _threshold_at
from peer_models.skipgpt import _always_as_likely, skipgpt
from peer_models.subject import Causal, Subject, Wanted, shared_copy
from torch import Tensor, nn

from tiny import SENTENCES, tiny_model, tiny_tokenizer, token_ids

PATCH = """
from types import MethodType

import torch


def forward(self, hidden_states, **given):
    normed = self.input_layernorm(hidden_states)
    mask = (torch.sigmoid(self.router(normed)) >= self.threshold).to(normed.dtype)
    self._last_mod_capacity = mask.mean().item()
    attended, _, _ = self.self_attn(normed, **given)
    hidden_states = hidden_states + mask * attended
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), None


def apply_router_tuning_patch(model):
    assert model.config.is_mod == [True] * 4 and model.config.granularity == "attn_token"
    for layer in model.model.layers:
        layer.router = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
        layer.forward = MethodType(forward, layer)
"""
"""A patch with the names of the official code's, in a few lines of our own."""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A tiny base, a text, a peer that runs and one that cannot be imported."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    write(tmp_path / "runs/utils/model/model_patch.py", PATCH)
    broken = "raise ImportError('no Thing in /opt/old/lib/things.py\\nand more')"
    write(tmp_path / "broken/MoD/MoD.py", broken)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


def measured(folders: Path, *more: str) -> dict[str, Any]:
    result = folders / "found.json"
    arguments = ["--model", str(folders / "base"), "--text", str(folders / "text.txt")]
    arguments += ["--dtype", "float32", "--prompt-tokens", "40", "--batch-size", "1,2"]
    arguments += ["--new-tokens", "3", "--repeats", "2", "--threads", "1", "--rate", "0.75"]
    speed_peers.main([*arguments, "--json", str(result), *more])
    return dict(json.loads(result.read_text()))


def test_peers_run_beside_ours_and_the_json_says_what_stopped_one(folders: Path) -> None:
    peers = [f"--peer=official={folders / 'runs'}", f"--peer=mod={folders / 'broken'}"]
    found = measured(folders, *peers)
    assert [(c["batch_size"], c["prompt_tokens"]) for c in found["cells"]] == [(1, 40), (2, 40)]
    everything = [*speed_peers.OURS, "official"]
    for cell in found["cells"]:
        assert list(cell["prefill"]["seconds"]) == everything
        decoded = [name for name in everything if name != "ours, masked"]
        assert list(cell["decode"]["over_dense"]) == decoded
        assert cell["prefill"]["over_dense"]["dense"] == 1
        assert list(cell["prefill"]["cpu_over_dense"]) == everything
        assert cell["kept"]["ours, static"] == {"prefill": 0.75, "decode": 0.75}
        assert cell["kept"]['ours, kv="all"'] == cell["kept"]['ours, kv="kept"']
        assert 0.6 < cell["kept"]["ours, masked"]["prefill"] < 0.9
        assert cell["failed"] == {"ours, masked": {"decode": "no cache: for training"}}
    # The first text that it reads sets its thresholds.
    assert found["cells"][0]["kept"]["official"]["prefill"] == pytest.approx(0.75, abs=0.1)
    assert found["peers"]["official"]["nothing_skipped_over_dense"] == pytest.approx(0, abs=1e-5)
    assert found["peers"]["official"]["ran_with"] == [LIKE_4]
    assert found["peers"]["mod"]["failed"] == "ImportError: no Thing in things.py"
    assert str(folders) not in json.dumps(found)
    assert "official=runs" in found["run"]["command"]
    assert {"seeds", "versions", "device", "dtype", "threads"} <= set(found["run"])

    table = speed_tables.peers(folders / "found.json", "")
    assert "| official | nothing: a mask multiplies |" in table
    assert table.endswith("What did not run: `mod: ImportError: no Thing in things.py`.")
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 7


def test_only_leaves_ours_out_so_that_another_transformers_can_run_a_peer(folders: Path) -> None:
    found = measured(folders, "--only", "dense,official", f"--peer=official={folders / 'runs'}")
    assert list(found["skips"]) == ["dense", "official"]


def test_a_peer_that_nobody_knows_or_without_a_folder_is_refused(folders: Path) -> None:
    for peer in ("other=.", "official=nowhere"):
        with pytest.raises(SystemExit):
            measured(folders, f"--peer={peer}")


# Turns


class Said:
    """A run that notes what it was asked, and may fail."""

    def __init__(self, name: str, log: list[str], fails: str = "") -> None:
        self.name, self.log, self.fails = name, log, fails

    def prefill(self, ids_BT: Tensor) -> int:
        return self.note("prefill")

    def decode(self, ids_B1: Tensor, column: int, state: int) -> int:
        assert state == len(self.name)
        return self.note("decode")

    def note(self, phase: str) -> int:
        if phase == self.fails:
            raise TypeError(f"cannot {phase}")
        self.log.append(f"{self.name} {phase}")
        return len(self.name)

    def logits(self, ids_BT: Tensor) -> Tensor:
        return torch.zeros(len(ids_BT), 1)


def test_all_take_turns_after_a_round_that_does_not_count() -> None:
    log: list[str] = []
    whole = f"peer{speed_peers.WHOLE}"
    names = {"dense": "", "peer": "", whole: "", "half": "decode", "none": "prefill"}
    subjects = {name: Subject(Said(name, log, fails), "") for name, fails in names.items()}
    cell = speed_peers._cell(subjects, token_ids(2, 6), 4, repeats=3)
    running = ["dense", "peer", whole, "half"]
    assert [line.rsplit(" ", 1)[0] for line in log if line.endswith("prefill")] == [
        *running,
        *running,
        *running[1:],
        running[0],
        *running[2:],
        *running[:2],
    ]
    assert log.count("dense decode") == 2 * (1 + 3)
    assert cell["failed"] == {
        "half": {"decode": "TypeError: cannot decode"},
        "none": {"prefill": "TypeError: cannot prefill"},
    }
    assert list(cell["prefill"]["seconds"]) == running
    assert list(cell["decode"]["seconds"]) == running[:3]
    assert list(cell["prefill"]["over_own"]) == ["peer"]


def test_what_stops_ours_is_raised() -> None:
    with pytest.raises(TypeError, match="cannot prefill"):
        speed_peers._cell({"dense": Subject(Said("", [], "prefill"), "")}, token_ids(1, 4), 3, 1)


def test_what_is_dropped_is_spread_and_as_much_as_the_rate_says() -> None:
    arguments = ["--json", "x", "--rate", "0.5", "--batch-size", "2,4", "--prompt-tokens", "8,16"]
    options = speed_peers._options([*arguments, "--most-tokens", "32", "--new-tokens", "3"])
    wanted = speed_peers._wanted(options, tiny_model(), token_ids(4, 19))
    assert wanted == Wanted(0.5, (0, 2), rows=4, tokens=19, seed=0)
    assert wanted.whole == Wanted(1.0, (), rows=4, tokens=19, seed=0)
    assert speed_peers._cells(options) == [(2, 8), (2, 16), (4, 8)]


# Glue


def test_a_model_that_runs_here_says_what_the_model_says() -> None:
    model, ids = tiny_model(), token_ids(2, 9)
    run = Causal(shared_copy(model))
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(run.logits(ids), whole[:, -1])
        state = run.prefill(ids[:, :8])
        heads: list[Tensor] = []
        run.model.lm_head.register_forward_hook(lambda head, args, out: heads.append(out))
        run.decode(ids[:, 8:], 8, state)
    (last_B1V,) = heads
    torch.testing.assert_close(last_B1V, whole[:, -1:])
    assert all(a is b for a, b in zip(model.parameters(), run.model.parameters(), strict=True))


@torch.no_grad()
def test_a_router_keeps_the_part_of_its_first_tokens_that_is_wanted() -> None:
    torch.manual_seed(0)
    last, x_BTD = nn.Linear(8, 2), torch.randn(2, 50, 8)
    last.register_forward_hook(_bias_at(last, 0.75))
    for logits_BT2 in (last(x_BTD), last(x_BTD)):
        assert float((logits_BT2[..., 1] >= logits_BT2[..., 0]).float().mean()) == 0.75

    layer, router = nn.Module(), nn.Linear(8, 1, bias=False)
    router.register_forward_hook(_threshold_at(layer, 0.25))
    score_BT1 = router(x_BTD).sigmoid()
    assert float((score_BT1 >= layer.threshold).float().mean()) == 0.25

    weigher = nn.Linear(8, 1)
    weigher.register_forward_hook(_scaled())
    first, again = weigher(100 * x_BTD), weigher(100 * x_BTD)
    torch.testing.assert_close(first, again)
    assert float(first.abs().max()) == pytest.approx(1)

    _always_as_likely(last, 0.75)
    assert last.bias.softmax(0)[0].item() == pytest.approx(0.75)


def test_queries_and_keys_are_turned_alike_by_halves_and_by_neighbours() -> None:
    model, width = tiny_model(), 8
    turned = _named_by_meta(model)
    x_TD, angle_TW = torch.randn(3, 32), torch.randn(3, width // 2)
    attention = model.model.layers[1].self_attn

    def halves(weight: Tensor) -> Tensor:
        x_THW = (x_TD @ weight.T).view(3, -1, width)
        a, b = x_THW.chunk(2, dim=-1)
        cos, sin = angle_TW.cos()[:, None], angle_TW.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def neighbours(weight: Tensor) -> Tensor:
        x_THW = torch.view_as_complex((x_TD @ weight.T).view(3, -1, width // 2, 2))
        turn_TW = torch.polar(torch.ones_like(angle_TW), angle_TW)[:, None]
        return torch.view_as_real(x_THW * turn_TW).flatten(-2)

    def scores(turn: Callable[[Tensor], Tensor], query: Tensor, key: Tensor) -> Tensor:
        key_THW = turn(key).repeat_interleave(2, dim=1)
        return torch.einsum("thw,shw->hts", turn(query), key_THW) / math.sqrt(width)

    with torch.no_grad():
        torch.testing.assert_close(
            scores(neighbours, *(turned[f"layers.1.attention.w{n}.weight"] for n in "qk")),
            scores(halves, attention.q_proj.weight, attention.k_proj.weight),
        )


def test_the_name_of_a_class_is_put_back() -> None:
    kind = type("Model", (), {})
    with class_name_kept(kind):
        kind.__name__ = "ModelMoD"
    assert kind.__name__ == "Model"


def test_what_a_folder_lacks_and_what_a_base_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no router_attn_mlp\.py in the peer's folder"):
        skipgpt(tmp_path, tiny_model(), Wanted(0.75, (), 1, 8, 0))
    with pytest.raises(ValueError, match="no weights for weight"):
        filled(nn.Linear(2, 2), {"bias": torch.zeros(2)})
