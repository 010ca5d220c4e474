"""Thresholds, the straight-through gradient and prefix pooling, against obvious loops."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router_tuning.decide import Decision, PrefixSums, pool_prefix


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_a_logit_on_the_threshold_is_kept() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.75], [0.5, 0.25, 0.75]])
    keep = Decision(logits).keep(column(0.5, 0.75))
    assert keep.tolist() == [[True, False, True], [False, False, True]]


def test_always_wins_over_the_logit() -> None:
    always = torch.tensor([[True, False]])
    decision = Decision(torch.tensor([[-9.0, -9.0]]), always)
    assert decision.keep(column(0.0)).tolist() == [[True, False]]
    assert decision.straight_through(column(0.0)).tolist() == [[1.0, 0.0]]


def test_infinite_thresholds_keep_all_or_nothing() -> None:
    logits = torch.randn(2, 5)
    assert Decision(logits).keep(column(-math.inf, -math.inf)).all()
    assert not Decision(logits).keep(column(math.inf, math.inf)).any()
    assert Decision(logits).straight_through(column(-math.inf, -math.inf)).isfinite().all()


def test_the_gate_is_exactly_zero_or_one() -> None:
    """Not 0.99999994: an attached model must stay neutral to the bit."""
    logits = torch.randn(50, 200) * 4
    gate = Decision(logits).straight_through(torch.randn(50, 1))
    assert set(gate.unique().tolist()) == {0.0, 1.0}


def test_the_gradient_is_the_sigmoids() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    threshold = column(0.0, 0.5, -1.0)
    weight = torch.randn(3, 7)
    (Decision(logits).straight_through(threshold) * weight).sum().backward()
    chance = torch.sigmoid(logits.detach() - threshold)
    torch.testing.assert_close(logits.grad, weight * chance * (1 - chance))


def test_what_always_runs_gives_no_gradient() -> None:
    logits = torch.randn(1, 4, requires_grad=True)
    always = torch.tensor([[True, True, False, False]])
    Decision(logits, always).straight_through(column(0.0)).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, :2].tolist() == [0.0, 0.0]
    assert logits.grad[0, 2:].all()


# Prefix pooling


def pooled_by_hand(logits: list[float], decide_after: int) -> tuple[float, list[bool]]:
    """The deciding logit of one text, and which of its tokens always run."""
    prefix = logits[:decide_after]
    return sum(prefix) / len(prefix), [i < decide_after for i in range(len(logits))]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_pooling_equals_a_loop_under_padding_packing_and_chunks(
    texts: list[list[float]], decide_after: int, left: int, cut: int
) -> None:
    expected = [pooled_by_hand(text, decide_after) for text in texts]
    # A row a text, padded on both sides; what stands at the pads must not matter.
    width = left + max(map(len, texts)) + 1
    logits = torch.full((len(texts), width), math.nan)
    position = torch.zeros((len(texts), width), dtype=torch.long)
    real = torch.zeros((len(texts), width), dtype=torch.bool)
    for row, text in enumerate(texts):
        logits[row, left : left + len(text)] = torch.tensor(text)
        position[row, left : left + len(text)] = torch.arange(len(text))
        real[row, left : left + len(text)] = True
    decision = pool_prefix(logits, position, real, decide_after)
    assert decision.always_BT is not None
    for row, (text, (mean, always)) in enumerate(zip(texts, expected, strict=True)):
        torch.testing.assert_close(
            decision.logits_BT[row, left : left + len(text)], torch.full((len(text),), mean)
        )
        assert decision.always_BT[row, left : left + len(text)].tolist() == always
    # All texts in one row.
    packed = torch.tensor([[x for text in texts for x in text]])
    number = torch.tensor([[i for i, text in enumerate(texts) for _ in text]])
    place = torch.tensor([[i for text in texts for i in range(len(text))]])
    one = pool_prefix(
        packed, place, torch.ones_like(packed, dtype=torch.bool), decide_after, None, number
    )
    assert one.always_BT is not None
    means = torch.tensor(
        [[mean for (mean, _), text in zip(expected, texts, strict=True) for _ in text]]
    )
    torch.testing.assert_close(one.logits_BT, means)
    assert one.always_BT[0].tolist() == [a for _, always in expected for a in always]
    # The first text in two chunks.
    text, (mean, _) = texts[0], expected[0]
    cut = min(cut, len(text))
    seen = torch.tensor(text[: min(cut, decide_after)])
    past = PrefixSums(seen.sum()[None], torch.tensor([len(seen)]))
    rest = torch.tensor([text[cut:]])
    if rest.numel():
        later = pool_prefix(
            rest,
            torch.arange(cut, len(text))[None],
            torch.ones_like(rest, dtype=torch.bool),
            decide_after,
            past,
        )
        torch.testing.assert_close(later.logits_BT, torch.full_like(rest, mean))


def test_pooling_gives_its_gradient_to_the_prefix_only() -> None:
    logits = torch.randn(1, 6, requires_grad=True)
    decision = pool_prefix(
        logits, torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool), decide_after=2
    )
    decision.straight_through(column(0.0)).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, :2].all()
    assert logits.grad[0, 0] == logits.grad[0, 1]
    assert not logits.grad[0, 2:].any()


def test_without_any_prefix_logit_a_sequence_runs_on() -> None:
    later = pool_prefix(
        torch.full((1, 2), -9.0), torch.tensor([[7, 8]]), torch.ones(1, 2, dtype=torch.bool), 4
    )
    assert later.keep(column(0.0)).all()
