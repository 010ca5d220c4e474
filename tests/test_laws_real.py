"""The core laws on a real pretrained model, SmolLM2-135M: the sizes, numbers and kernels that
people run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from laws import Batch, Case, Counter, Run, difference, randomize, run
from router_tuning import attach, dense, detach
from router_tuning.cost import cost
from router_tuning.embedded import load_model, load_tokenizer
from router_tuning.record import same_decisions

pytestmark = [pytest.mark.slow, pytest.mark.network]

TOLERANCE = 1e-2
"""Of logits of size about 20, in fp32 through 30 layers."""
DELTA = 1e-3
CHUNKS = [40, 24] + [1] * 8
CASES = [
    Case(granularity=granularity, **policy)  # type: ignore[arg-type]
    for granularity in ("attn_token", "attn_sequence")
    for policy in ({"kv": "all"}, {"kv": "kept"}, {"sink": 4, "window": 16})
]


TEXTS = (
    "The router reads the hidden state of each token and says whether attention is worth its price "
    "there. Most tokens of a sentence are easy to foresee: the end of a word, or an article. " * 2,
    "Paris is the capital of France, and Rome is the capital of Italy. " * 3,
)


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, Batch]:
    """The model in fp32, and two real texts of different lengths, padded on the left."""
    tokenizer = load_tokenizer("smollm2-135m")
    ids = torch.zeros((2, 72), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (text, length) in enumerate(zip(TEXTS, (72, 45), strict=True)):
        tokens = tokenizer(text)["input_ids"][:length]
        assert len(tokens) == length
        ids[row, 72 - length :] = torch.tensor(tokens)
        mask[row, 72 - length :] = 1
    return load_model("smollm2-135m", dtype=torch.float32), Batch(ids, mask)


@pytest.fixture(params=CASES, ids=str)
def routed(request: Any, smollm2: tuple[PreTrainedModel, Batch]) -> Iterator[tuple[Any, Batch]]:
    model, given = smollm2
    with torch.no_grad():
        before = model(given.ids, attention_mask=given.mask, position_ids=given.positions).logits
    case: Case = request.param
    config = case.config
    config.decide_after = 16
    attach(model, config)
    assert torch.equal(run(model, given).logits, before)
    assert torch.equal(run(model, given, path="masked").logits, before)
    randomize(model, seed=3, scale=4.0)
    yield model, given
    detach(model)
    with torch.no_grad():
        assert torch.equal(
            model(given.ids, attention_mask=given.mask, position_ids=given.positions).logits, before
        )


def same(a: Run, b: Run) -> int:
    """How many decisions flipped; none may lie beyond DELTA of its threshold, unless a flip came
    before it.
    """
    ok, flips = same_decisions(a.trace, b.trace, DELTA)
    assert ok or flips
    return flips


def test_the_core_laws_hold(routed: tuple[Any, Batch], request: pytest.FixtureRequest) -> None:
    model, given = routed
    with Counter(model) as counter:
        whole = run(model, given)
    decisions = whole.trace.decisions()
    assert 0.2 < whole.trace.kept_fraction() < 0.9
    with dense(model):
        assert difference(run(model, given).logits, whole.logits, given.real) > 100 * TOLERANCE

    masked = run(model, given, path="masked", decisions=decisions)
    assert difference(masked.logits, whole.logits, given.real) < TOLERANCE
    cached = run(model, given, CHUNKS, decisions=decisions)
    assert difference(cached.logits, whole.logits, given.real) < TOLERANCE
    alone = given.row(1)
    one = run(model, alone)
    flips = same(whole, run(model, given, CHUNKS)) + same(whole, run(model, given, path="masked"))
    assert flips <= 3, f"{flips} of {whole.trace.real().sum() * 60} decisions flipped"
    if all(
        torch.equal(keep[0], decisions[unit][1][given.real[1]])
        for unit, keep in one.trace.decisions().items()
    ):
        assert difference(one.logits[0], whole.logits[1][given.real[1]], alone.real[0]) < TOLERANCE
    else:
        pytest.fail("a row decided differently when it was alone")

    for index in range(30):
        keep = int(decisions[f"layers.{index}.attn"].sum())
        if keep < int(given.real.sum()):
            assert set(counter.entered(index, "query")) == {keep}
    assert cost(model, whole.trace).flops_fraction < 1
