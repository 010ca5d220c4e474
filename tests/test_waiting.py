"""A forward leaves nothing behind that waits for Python's search for cycles: the tensors of a layer
are given back before the next one runs, so that a long prompt holds what the dense model's does.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from laws import POLICIES, Case, batch, routed_model, run
from tiny import FOUND


@pytest.fixture
def collector() -> Iterator[None]:
    """Python's search for cycles keeps what it finds, and runs when it is told to."""
    gc.collect()
    gc.freeze()  # what is there already is not searched
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield
    gc.set_debug(0)
    gc.enable()
    gc.unfreeze()
    gc.garbage.clear()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence", "block_token"])
@pytest.mark.parametrize("family", ["llama", "gemma3", FOUND[0], "deepseek_v3"])
def test_no_tensor_of_a_forward_waits_for_the_collector(
    family: str, granularity: str, policy: dict[str, object], collector: None
) -> None:
    model = routed_model(Case(family, granularity, **policy))  # type: ignore[arg-type]
    given = batch()
    gc.collect()
    gc.garbage.clear()
    result = run(model, given, [7, 11, 1, 1])
    assert result.trace.kept_of_routed() < 1
    del result
    gc.collect()
    waiting = [thing for thing in gc.garbage if isinstance(thing, torch.Tensor)]
    assert not waiting
