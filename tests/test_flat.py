"""Which attentions run on flat tokens, and what decoding no longer asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laws import Case, batch, calibrate_by_hand, forward, over, routed_model, run
from router_tuning import record
from router_tuning.execution import skipping
from router_tuning.execution.context import routers_of
from tiny import FAMILIES, FOUND_HERE

IN_GROUPS = {"falcon", "deepseek_v3"}
"""Families of the table that cannot be called so: their own attention function, latent keys."""


@pytest.mark.parametrize("family", [*FAMILIES, *FOUND_HERE])
def test_families_of_the_table_run_on_flat_tokens(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, groups = routed_model(Case(family)), []

    def grouped_run(*args: Any) -> Any:
        groups.append(1)
        return plain(*args)

    plain = skipping.grouped_run
    monkeypatch.setattr(skipping, "grouped_run", grouped_run)
    result = run(model, batch(), [12] + [1] * 8)
    assert 0.1 < result.trace.kept_of_routed() < 0.9
    assert bool(groups) == (family in IN_GROUPS or family in FOUND_HERE)


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence"])
def test_routers_are_not_asked_again_once_sequences_have_decided(granularity: str) -> None:
    model, given = routed_model(Case(granularity=granularity)), batch()
    calibrate_by_hand(model)
    cache = run(model, given, [20]).cache
    asked: list[int] = []
    for router in routers_of(model).values():
        router.register_forward_hook(lambda *_: asked.append(1))
    cache.crop(-2)
    with torch.no_grad(), record(model) as trace:
        for column in (18, 19):
            forward(model, given, column, column + 1, **over(cache), use_cache=True)
        assert not asked
        kept = [u.keep_BT for f in trace.forwards for u in f.units.values()]
        assert any(k.any() for k in kept)
        cache.crop(-19)  # into the prefix: now they are asked again
        forward(model, given, 1, 8, **over(cache), use_cache=True)
    assert asked
