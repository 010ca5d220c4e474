"""Random requests one after another on shared models: long prompts, mixed batches, budgets a row,
half of them broken off. Each agrees with the masked path under its own decisions; memory stays
flat, and nothing is left on modules.
"""

from __future__ import annotations

import gc
import random
import resource
from typing import Any

import pytest
import torch
from torch import nn

from laws import Batch, Case, Run, calibrate_by_hand, difference, routed_model, run
from tiny import token_ids

CASES = (
    Case("llama", "attn_token", "kept"),
    Case("llama", "attn_token", "kept", 5, 3),
    Case("llama", "attn_token", "all"),
    Case("gemma3", "attn_token", "kept", 0, 3),
    Case("gemma3", "attn_sequence", "all"),
    Case("qwen3", "attn_sequence", "kept"),
    Case("qwen2", "mlp_token"),
    Case("mistral", "block_token", "kept", 5, 3),
    Case("llama", "block_sequence", "all"),
    Case("gpt_neox", "attn_token", "all"),
    Case("deepseek_v3", "attn_token", "kept"),
)
TOLERANCE = 1e-4
"""Sums over 1,500 keys differ by more than those over 20."""
MEMORY = 300 * 2**10
"""Growth of the process in KiB, once each model has answered its first requests."""


@pytest.fixture(autouse=True)
def skipping_pays() -> None:
    """Here it is measured whether it does, as everywhere outside the tests."""


@pytest.mark.parametrize(
    ("requests", "longest"),
    [(44, 260), pytest.param(2000, 1500, marks=pytest.mark.slow)],
)
def test_a_soak_of_requests_agrees_with_the_masked_path(requests: int, longest: int) -> None:
    draw = random.Random(0)
    models = {case: _prepared(case) for case in CASES}
    before = {case: _left_on(model) for case, model in models.items()}
    settled = 0
    for number in range(requests):
        case = CASES[number % len(CASES)]
        _answer(models[case], draw, longest, broken_off=number % 2 == 1)
        if number == requests // 2:
            gc.collect()
            settled = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case, model in models.items():
        assert _left_on(model) == before[case], case
    gc.collect()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - settled < MEMORY


def _prepared(case: Case) -> Any:
    model = routed_model(case, max_position_embeddings=2048)
    calibrate_by_hand(model)
    return model


def _answer(model: Any, draw: random.Random, longest: int, broken_off: bool) -> None:
    """Prefill in a few chunks and decode, at budgets a row; then the masked path over the same."""
    rows = draw.choice([1, 1, 2, 3, 8])
    length = draw.randint(1, max(longest // rows, 1) if draw.random() < 0.5 else longest // 8)
    new = draw.randint(1, 6)
    ids = token_ids(rows, length + new, seed=draw.randrange(1000))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : draw.randint(0, length - 1)] = 0
    cuts = sorted({length, *(draw.randint(1, length) for _ in range(draw.choice([0, 0, 2])))})
    chunks = [end - start for start, end in zip([0, *cuts], cuts, strict=False)] + [1] * new
    budgets = [draw.choice([0.1, 0.5, 0.9, 1.0]) for _ in range(rows)]
    given = Batch(ids * mask, mask)
    if broken_off:
        _break_off(model, given, chunks, budgets, draw)
        return
    answered: Run = run(model, given, chunks, budget=budgets)
    decisions = answered.trace.decisions()
    masked = run(model, given, path="masked", decisions=decisions, budget=budgets)
    assert difference(answered.logits, masked.logits, given.real) < TOLERANCE


class _ClientIsGone(Exception):
    pass


def _break_off(
    model: Any, given: Batch, chunks: list[int], budgets: list[float], draw: random.Random
) -> None:
    """The client leaves in the middle of a forward."""
    modules = [m for m in model.modules() if not list(m.children())]
    victim, calls = draw.choice(modules), draw.randint(1, len(chunks))

    def leave(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls -= 1
        if not calls:
            raise _ClientIsGone

    hook = victim.register_forward_pre_hook(leave)
    try:
        run(model, given, chunks, budget=budgets)
    except _ClientIsGone:
        pass
    finally:
        hook.remove()


def _left_on(model: nn.Module) -> dict[str, set[str]]:
    """The attributes of each module."""
    return {name: set(vars(module)) for name, module in model.named_modules()}
