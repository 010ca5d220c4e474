"""The three ways to run a batch agree, whatever the batch, its padding, its chunks and the policy.

One routed model a family x granularity x key/value policy is made and shared; hypothesis draws the
rest. Outputs are compared under replayed decisions, decisions apart, as in the law tests.
"""

from __future__ import annotations

import functools

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from laws import DELTA, Batch, Case, Run, assert_close, calibrate_by_hand, routed_model, run
from router_tuning.config import GRANULARITIES
from router_tuning.record import same_decisions
from tiny import FAMILIES, token_ids

EXAMPLES = 500
LONGEST = 20
SEVERAL = ("attn_token+mlp_token", "attn_sequence+mlp_token", "attn_token+mlp_sequence")
POLICIES = [("all", 0, 0), *(("kept", sink, window) for sink in (0, 5) for window in (0, 3))]

cases = st.builds(
    lambda family, granularity, policy: Case(family, granularity, *policy),
    st.sampled_from(FAMILIES),
    st.sampled_from([*GRANULARITIES, *SEVERAL]),
    st.sampled_from(POLICIES),
)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """One to four rows, of which each has pads on the left, on the right, on both sides or none."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, LONGEST))
    ids = token_ids(rows, columns, seed=draw(st.integers(0, 9)))
    mask = torch.zeros_like(ids)
    for row in mask:
        left = draw(st.integers(0, columns - 1)) if draw(st.booleans()) else 0
        right = draw(st.integers(0, columns - 1 - left)) if draw(st.booleans()) else 0
        row[left : columns - right] = 1
    return Batch(ids * mask, mask)


@st.composite
def examples(draw: st.DrawFn) -> tuple[Case, Batch, list[int], list[float]]:
    """A case, a batch, how it is cut for the cache, and a budget for each row."""
    one = draw(batches())
    rows, columns = one.ids.shape
    prefill = draw(st.integers(1, columns))
    cuts = draw(st.sets(st.integers(1, prefill), max_size=4))
    ends = sorted({*cuts, *range(prefill, columns + 1)})  # chunks, then token by token
    chunks = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    # 1 keeps all; those between are thresholds between -1 and 1.
    budgets = draw(st.lists(st.sampled_from([0.1, 0.5, 0.9, 1.0]), min_size=rows, max_size=rows))
    return draw(cases), one, chunks, budgets


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(examples())
def test_masked_skipping_and_cached_agree(
    example: tuple[Case, Batch, list[int], list[float]],
) -> None:
    case, one, chunks, budgets = example
    model = prepared(case)
    whole = run(model, one, budget=budgets)
    decisions = whole.trace.decisions()
    masked = run(model, one, path="masked", decisions=decisions, budget=budgets)
    cached = run(model, one, chunks, decisions=decisions, budget=budgets)
    assert_close(whole, masked, one.real)
    assert_close(whole, cached, one.real)
    row = len(budgets) - 1
    alone = one.row(row)
    kept = {name: keep[row][one.real[row]][None] for name, keep in decisions.items()}
    apart = run(model, alone, decisions=kept, budget=budgets[row])
    assert_close(apart, picked(whole, row, one), alone.real)
    for other in (
        run(model, one, path="masked", budget=budgets),
        run(model, one, chunks, budget=budgets),
    ):
        # A flip within delta moves what later layers decide, so the rest of such a run is not read.
        same, flips = same_decisions(whole.trace, other.trace, DELTA[torch.float32])
        event(f"threshold flips: {bool(flips)}")
        assert same or flips


@functools.cache
def prepared(case: Case) -> PreTrainedModel:
    model = routed_model(case)
    calibrate_by_hand(model)
    return model


def picked(whole: Run, row: int, one: Batch) -> Run:
    """One row of a run, without its pads."""
    return Run(whole.logits[row][one.real[row]][None], whole.trace)
