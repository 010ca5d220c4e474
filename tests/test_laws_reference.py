"""Both paths against a slow and obvious reference, and against each other on random inputs.

The reference is a Llama written out as a loop over tokens, one row at a time, without padding,
cache or masks: `x <- x + keep * attention`, where the keys that a token sees are listed one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from laws import (
    LOGIT_TOLERANCE,
    SLIDING,
    Batch,
    Case,
    assert_same_decisions,
    batch,
    difference,
    held_columns,
    routed_model,
    run,
)
from router_tuning.execution.visibility import sliding_window_of
from tiny import token_ids

TOLERANCE = LOGIT_TOLERANCE[torch.float32]


@dataclass(frozen=True)
class Reference:
    """One row through a Llama or a Mistral, given what to keep."""

    model: Any
    case: Case
    sliding: int | None

    def logits(self, ids: Tensor, keep: dict[int, list[bool]]) -> Tensor:
        """Logits (T, V) of the row's tokens; `keep` says for each layer which tokens run its
        attention.
        """
        decoder = self.model.model
        states = [decoder.embed_tokens.weight[token] for token in ids.tolist()]
        for index, layer in enumerate(decoder.layers):
            normed = [norm(layer.input_layernorm, x) for x in states]
            keys = [rotate(heads(layer.self_attn.k_proj, x), t) for t, x in enumerate(normed)]
            values = [heads(layer.self_attn.v_proj, x) for x in normed]
            for t, x in enumerate(normed):
                if keep[index][t]:
                    query = rotate(heads(layer.self_attn.q_proj, x), t)
                    seen = [k for k in range(t + 1) if self.sees(t, k, keep[index])]
                    mixed = attend(query, [keys[k] for k in seen], [values[k] for k in seen])
                    states[t] = states[t] + layer.self_attn.o_proj.weight @ mixed
            for t, x in enumerate(states):
                inner = norm(layer.post_attention_layernorm, x)
                gate = torch.nn.functional.silu(layer.mlp.gate_proj.weight @ inner)
                up = layer.mlp.up_proj.weight @ inner
                states[t] = x + layer.mlp.down_proj.weight @ (gate * up)
        return torch.stack([self.model.lm_head.weight @ norm(decoder.norm, x) for x in states])

    def sees(self, query: int, key: int, keep: list[bool]) -> bool:
        """Whether a query that runs sees a key: by the key/value policy, and in the sliding
        window.
        """
        if self.sliding is not None and query - key >= self.sliding:
            return False
        if self.case.kv == "all" or keep[key]:
            return True
        return key < self.case.sink or query - key < self.case.window


def norm(module: Any, x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + module.variance_epsilon) * module.weight


def heads(projection: Any, x: Tensor) -> Tensor:
    return (projection.weight @ x).view(-1, 8)


def rotate(x: Tensor, position: int) -> Tensor:
    """Rotary embedding of heads of width 8: pairs (i, i + 4) turn by position * 10000^(-i/4)."""
    out = x.clone()
    for i in range(4):
        angle = position * 10000.0 ** (-i / 4)
        cos, sin = math.cos(angle), math.sin(angle)
        out[:, i] = x[:, i] * cos - x[:, i + 4] * sin
        out[:, i + 4] = x[:, i + 4] * cos + x[:, i] * sin
    return out


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Four query heads over two key heads."""
    mixed = []
    for head in range(4):
        key = torch.stack([k[head // 2] for k in keys])
        value = torch.stack([v[head // 2] for v in values])
        weights = torch.softmax(key @ query[head] / math.sqrt(8), dim=0)
        mixed.append(weights @ value)
    return torch.cat(mixed)


POLICIES = ({"kv": "all"}, {}, {"sink": 3}, {"window": 4}, {"sink": 2, "window": 3})


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_path_equals_the_loop(family: str, policy: dict[str, Any], granularity: str) -> None:
    case = Case(family=family, granularity=granularity, **policy)
    model, text = routed_model(case), batch(rows=3, length=14)
    whole = run(model, text)
    decisions = whole.trace.decisions()
    assert 0.2 < whole.trace.kept_fraction() < 0.9
    runs = [
        whole,
        run(model, text, path="masked"),
        run(model, text, [14]),
        run(model, text, [6, 1, 7]),
        run(model, text, [5] + [1] * 9),
    ]
    reference = Reference(model, case, SLIDING if family == "mistral" else None)
    for row, real in enumerate(text.real):
        keep = {i: decisions[f"layers.{i}.attn"][row][real].tolist() for i in range(4)}
        with torch.no_grad():
            expected = reference.logits(text.ids[row][real], keep)
        for result in runs:
            assert (result.logits[row][real] - expected).abs().max() < TOLERANCE


@dataclass(frozen=True)
class Example:
    """A random model set-up, batch, decisions and chunking."""

    case: Case
    text: Batch
    decisions: dict[str, Tensor]
    chunks: list[int]


@st.composite
def examples(draw: st.DrawFn) -> Example:
    kv = draw(st.sampled_from(["all", "kept", "kept"]))
    kept = kv == "kept"
    case = Case(
        family=draw(st.sampled_from(["llama", "mistral", "gemma3"])),
        granularity=draw(st.sampled_from(["attn_token", "attn_sequence"])),
        kv=kv,
        sink=draw(st.integers(0, 4)) if kept else 0,
        window=draw(st.integers(0, 5)) if kept else 0,
    )
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    mask = torch.ones((rows, length), dtype=torch.long)
    for row in range(rows):
        side = draw(st.sampled_from(["none", "left", "right", "both", "anywhere"]))
        if side == "anywhere":
            for column in range(length):
                mask[row, column] = draw(st.integers(0, 3)) > 0
        left = draw(st.integers(0, length - 1)) if side in ("left", "both") else 0
        right = draw(st.integers(0, length - 1)) if side in ("right", "both") else 0
        mask[row, :left] = 0
        mask[row, length - right :] = 0
        if not mask[row].any():
            mask[row, draw(st.integers(0, length - 1))] = 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rate = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    decisions = {
        f"layers.{i}.attn": (torch.rand((rows, length), generator=generator) < rate) & mask.bool()
        for i in range(4)
    }
    cuts = sorted(draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=length)) - {length})
    edges = [0, *(c for c in cuts if c < length), length]
    chunks = [b - a for a, b in pairwise(edges)]
    ids = token_ids(rows, length, seed=draw(st.integers(0, 9)))
    return Example(case, Batch(ids, mask), decisions, chunks)


MODEST = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@MODEST
@given(examples())
def test_cached_equals_uncached_equals_masked(example: Example) -> None:
    model, text = routed_model(example.case), example.text
    whole = run(model, text, decisions=example.decisions)
    masked = run(model, text, path="masked", decisions=example.decisions)
    cached = run(model, text, example.chunks, decisions=example.decisions)
    assert not whole.logits[text.real].isnan().any()
    assert difference(whole.logits, masked.logits, text.real) < TOLERANCE
    assert difference(whole.logits, cached.logits, text.real) < TOLERANCE
    if example.case.kv == "kept":
        for index, layer in enumerate(cached.cache.layers):
            if layer.store is not None:
                sliding = sliding_window_of(model.model.layers[index].self_attn)
                keep = example.decisions[f"layers.{index}.attn"]
                wanted = held_columns(example.case, keep, text.real, sliding)
                assert layer.store.held() == sum(map(len, wanted))


@MODEST
@given(examples())
def test_routers_decide_alike_however_the_text_is_cut_and_padded(example: Example) -> None:
    model, text = routed_model(example.case), example.text
    whole, cached = run(model, text), run(model, text, example.chunks)
    assert_same_decisions(whole, cached)
    assert difference(whole.logits, cached.logits, text.real) < TOLERANCE
    assert_same_decisions(whole, run(model, text, path="masked"))
