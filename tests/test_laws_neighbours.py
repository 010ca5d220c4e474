"""Laws 4, 5 and 7: later tokens, padding, neighbours and other generations change nothing."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from laws import (
    CASES,
    CHUNKS,
    EFFECT,
    LOGIT_TOLERANCE,
    MORE_CASES,
    SOME_CASES,
    Batch,
    Case,
    Run,
    batch,
    calibrate_by_hand,
    difference,
    over,
    routed_model,
    run,
)
from router_tuning import record, set_budget

TOLERANCE = LOGIT_TOLERANCE[torch.float32]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
some_cases = pytest.mark.parametrize("case", SOME_CASES, ids=str)


# Law 4: causal


@pytest.mark.parametrize("path", ["skipping", "masked"])
@every_case
def test_a_changed_token_changes_nothing_before_it(case: Case, path: str) -> None:
    model, given = routed_model(case), batch(padded=False)
    before = run(model, given, path=path)
    for token in (1, 8, 19):
        ids = given.ids.clone()
        ids[:, token] = (ids[:, token] + 40) % 90 + 3
        after = run(model, Batch(ids, given.mask), path=path)
        earlier = slice(0, token)
        real = given.real[:, earlier]
        assert difference(after.logits[:, earlier], before.logits[:, earlier], real) < TOLERANCE
        for unit, keep in before.trace.decisions().items():
            assert torch.equal(after.trace.decisions()[unit][:, earlier], keep[:, earlier])
        assert difference(after.logits, before.logits, given.real) > EFFECT


# Law 5: padding and neighbours


def assert_same_row(a: Run, row_a: int, real_a: Batch, b: Run, row_b: int, real_b: Batch) -> None:
    """The same decisions and logits at the real tokens of two rows."""
    at_a, at_b = real_a.real[row_a], real_b.real[row_b]
    for unit, keep in a.trace.decisions().items():
        assert torch.equal(keep[row_a][at_a], b.trace.decisions()[unit][row_b][at_b]), unit
        assert not keep[row_a][~at_a].any()
    worst = (a.logits[row_a][at_a] - b.logits[row_b][at_b]).abs().max()
    assert worst < TOLERANCE


@pytest.mark.parametrize("path", ["skipping", "masked"])
@every_case
def test_a_row_alone_is_the_row_in_a_batch(case: Case, path: str) -> None:
    model, given = routed_model(case), batch()
    together = run(model, given, path=path)
    for row in range(3):
        for left, right in ((0, 0), (7, 0), (0, 7)):
            alone = given.row(row, left, right)
            assert_same_row(run(model, alone, path=path), 0, alone, together, row, given)


@some_cases
def test_batch_order_changes_nothing(case: Case) -> None:
    model, given = routed_model(case), batch()
    together = run(model, given)
    order = [2, 0, 1]
    turned = run(model, given.take(order))
    for row, source in enumerate(order):
        assert_same_row(turned, row, given.take(order), together, source, given)


@some_cases
def test_a_row_decoded_alone_is_the_row_decoded_in_a_padded_batch(case: Case) -> None:
    model, given = routed_model(case), batch()
    given.mask[1] = given.mask[1].flip(0)  # all padding on the left, as generate wants it
    together = run(model, given, CHUNKS["decode"])
    for row in range(3):
        alone = given.row(row)
        columns = alone.ids.shape[1]
        one = run(model, alone, [columns - 8] + [1] * 8)
        assert_same_row(one, 0, alone, together, row, given)


def test_what_stands_at_padding_changes_nothing() -> None:
    for case in (Case(kv="all"), Case(), Case(sink=5, window=3)):
        model, given = routed_model(case), batch()
        noise = Batch(torch.where(given.real, given.ids, 55), given.mask)
        for chunks in (None, CHUNKS["chunked"]):
            a, b = run(model, given, chunks), run(model, noise, chunks)
            assert difference(a.logits, b.logits, given.real) < TOLERANCE


def test_a_row_of_nothing_but_padding_disturbs_no_other() -> None:
    for case in (Case(kv="all"), Case(), Case(granularity="attn_sequence", sink=5, window=3)):
        model, given = routed_model(case), batch()
        given.mask[1] = 0
        for chunks in (None, CHUNKS["chunked"], CHUNKS["decode"]):
            together, pair = run(model, given, chunks), run(model, given.take([0, 2]), chunks)
            assert_same_row(together, 0, given, pair, 0, given.take([0, 2]))
            assert_same_row(together, 2, given, pair, 1, given.take([0, 2]))


# Law 7: no state on modules


@pytest.mark.parametrize("case", [c for c in MORE_CASES if c.kv == "all" or c.window], ids=str)
def test_interleaved_generations_do_not_know_each_other(case: Case) -> None:
    model = routed_model(case)
    calibrate_by_hand(model)
    texts = [batch(rows=2, padded=False, seed=seed) for seed in (1, 2)]
    budgets = [0.3, 0.7]
    alone = [
        run(model, text, CHUNKS["decode"], budget=budget)
        for text, budget in zip(texts, budgets, strict=True)
    ]
    caches = [DynamicCache(config=model.config) for _ in texts]
    parts: list[list[torch.Tensor]] = [[], []]
    start = 0
    with torch.no_grad():
        for length in CHUNKS["decode"]:
            for text, budget, cache, part in zip(texts, budgets, caches, parts, strict=True):
                ids = text.ids[:, start : start + length]
                part.append(model(ids, **over(cache), use_cache=True, budget=budget).logits)
            start += length
    for part, one in zip(parts, alone, strict=True):
        assert torch.equal(torch.cat(part, 1), one.logits)
    other = run(model, texts[0], CHUNKS["decode"], budget=budgets[1])
    assert alone[0].trace.kept_fraction() < other.trace.kept_fraction()


def test_a_forward_leaves_nothing_on_the_modules() -> None:
    model, given = routed_model(Case(granularity="attn_sequence", sink=5, window=3)), batch()

    def attributes() -> list[dict[str, object]]:
        return [dict(module.__dict__) for module in model.modules()]

    run(model, given)
    before = attributes()
    run(model, given, CHUNKS["decode"])
    run(model, given, path="masked")
    for old, new in zip(before, attributes(), strict=True):
        assert list(old) == list(new)
        assert all(old[name] is new[name] for name in old)


def test_threads_have_their_own_records() -> None:
    model = routed_model()
    texts = [batch(rows=1, padded=False, seed=seed) for seed in (1, 2)]
    alone = [run(model, text, CHUNKS["decode"]) for text in texts]
    found: dict[int, Run] = {}

    def work(index: int) -> None:
        found[index] = run(model, texts[index], CHUNKS["decode"])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, one in enumerate(alone):
        assert torch.equal(found[index].logits, one.logits)
        assert len(found[index].trace.forwards) == len(CHUNKS["decode"])
        for unit, keep in one.trace.decisions().items():
            assert torch.equal(found[index].trace.decisions()[unit], keep)


def interrupted_block(model: Any, given: Batch) -> Any:
    """What a block recorded that an error ended."""
    try:
        with record(model) as outer:
            run(model, given, path="masked")
            raise RuntimeError("stop")
    except RuntimeError:
        return outer


def test_options_of_a_block_end_with_it_also_after_an_error() -> None:
    model, given = routed_model(), batch()
    before = run(model, given)
    outer = interrupted_block(model, given)
    after = run(model, given)
    assert torch.equal(before.logits, after.logits)
    assert not outer.forwards  # the inner record took them
    assert len(after.trace.forwards) == 1


def test_two_models_in_one_block_do_not_mix() -> None:
    one, other, given = routed_model(router_seed=1), routed_model(router_seed=2), batch()
    expected = run(other, given)
    with torch.no_grad(), record(one) as trace:
        result = run(other, given)
    assert not trace.forwards
    assert torch.equal(result.logits, expected.logits)


def test_copies_of_a_cache_go_their_own_ways() -> None:
    """A cached system prompt is copied for each conversation."""
    for case in (Case(kv="all"), Case(sink=5, window=3), Case(granularity="attn_sequence")):
        model, given = routed_model(case), batch(padded=False)
        other = Batch(given.ids.clone(), given.mask)
        other.ids[:, 14:] = other.ids[:, 14:].flip(1)
        head = Batch(given.ids[:, :14], given.mask[:, :14])
        prompt = run(model, head, [2, 12]).cache
        for text in (given, other, given):
            rest = run(model, text, [1] * 6, cache=copy.deepcopy(prompt))
            whole = run(model, text)
            assert difference(rest.logits, whole.logits[:, 14:], text.real[:, 14:]) < TOLERANCE
        assert prompt.get_seq_length() == 14


def test_set_budget_applies_to_calls_that_give_none() -> None:
    model, given = routed_model(), batch()
    calibrate_by_hand(model)
    own, low, high = run(model, given), run(model, given, budget=0.3), run(model, given, budget=0.7)
    set_budget(model, 0.3)
    assert torch.equal(run(model, given).logits, low.logits)
    assert torch.equal(run(model, given, budget=0.7).logits, high.logits)
    set_budget(model, None)
    assert torch.equal(run(model, given).logits, own.logits)
