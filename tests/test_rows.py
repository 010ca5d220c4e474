"""Choices of how a row attends, against the plain formula over all pairs."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laws import (
    FIRST_FIVE,
    LOGIT_TOLERANCE,
    Case,
    assert_close,
    batch,
    difference,
    routed_model,
    run,
)
from router_tuning.execution import rows
from router_tuning.execution import window as window_module
from router_tuning.execution.rows import Kernel, Reach, RowKeys, attend
from router_tuning.execution.window import tells_sums
from router_tuning.units import decoder_layers, decoder_of
from tiny import CACHE_KEY, tiny_model, token_ids

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
SCALE = WIDTH**-0.5


def eager_of_llama() -> Kernel:
    attention = decoder_layers(decoder_of(tiny_model("llama")))[0].self_attn
    assert attention.num_key_value_groups == HEADS // KEY_HEADS
    function = sys.modules[type(attention).__module__].eager_attention_forward
    return Kernel(function, attention, {"scaling": SCALE, "dropout": 0.0})


ONE = torch.zeros(1, 1, 1, WIDTH)
needs_sums = pytest.mark.skipif(not tells_sums(ONE, ONE, ONE), reason="of a newer torch")

KERNELS = {
    "sdpa": lambda: Kernel(None, None, {"scaling": SCALE, "dropout": 0.0}),
    "eager": eager_of_llama,
}


def plainly(query: Tensor, keys: RowKeys, seen_LK: Tensor) -> Tensor:
    """Softmax over what is seen, one pair of heads at a time: (1, L, H, D)."""
    groups = query.shape[1] // keys.key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        key, value = keys.key[0, head // groups], keys.value[0, head // groups]
        scores = (query[0, head] @ key.T * SCALE).masked_fill(~seen_LK, -torch.inf)
        heads.append(scores.softmax(-1) @ value)
    return torch.stack(heads, dim=1)[None]


def visible(query: int, key: int, lasting: bool, reach: Reach) -> bool:
    near = reach.sliding is None or query - key < reach.sliding
    return 0 <= key <= query and near and (lasting or query - key < reach.window)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize(
    ("window", "sliding", "number"), list(itertools.product([0, 5], [None, 9], [1, 14]))
)
def test_blocks_read_what_the_formula_says(
    kernel: str,
    block: int,
    window: int,
    sliding: int | None,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "BLOCK", block)
    generator = torch.Generator().manual_seed(7 * number + window)
    column_K = torch.randperm(40, generator=generator)[:30].sort().values
    lasting_K = torch.rand(30, generator=generator) < 0.5
    column_L = column_K[lasting_K][-number:]  # a query's own key is always there
    empty = torch.rand(30, generator=generator) < 0.2
    empty &= ~torch.isin(column_K, column_L)
    column_K = column_K.masked_fill(empty, -1)
    order = torch.randperm(30, generator=generator)  # keys may lie in any order
    column_K, lasting_K = column_K[order], lasting_K[order]
    query = torch.randn(1, HEADS, len(column_L), WIDTH, generator=generator)
    key, value = (torch.randn(1, KEY_HEADS, 30, WIDTH, generator=generator) for _ in range(2))
    keys, reach = RowKeys(key, value, column_K, lasting_K), Reach(window, sliding)
    seen_LK = torch.tensor(
        [
            [
                visible(q, k, f, reach)
                for k, f in zip(column_K.tolist(), lasting_K.tolist(), strict=True)
            ]
            for q in column_L.tolist()
        ]
    )
    output = attend(KERNELS[kernel](), query, column_L, keys, reach)
    assert output.shape == (1, len(column_L), HEADS, WIDTH)
    assert (output - plainly(query, keys, seen_LK)).abs().max() < 1e-5


def keys_of_a_prompt(length: int, keep_T: Tensor, sink: int) -> tuple[Tensor, Tensor, RowKeys]:
    """Queries at kept tokens, their columns, and the keys of all tokens from column 3 on."""
    generator = torch.Generator().manual_seed(length)
    lasting_T = keep_T | (torch.arange(length) < sink)
    query = torch.randn(1, HEADS, int(keep_T.sum()), WIDTH, generator=generator)
    key, value = (torch.randn(1, KEY_HEADS, length, WIDTH, generator=generator) for _ in range(2))
    column_T = torch.arange(3, length + 3)
    return query, column_T[keep_T], RowKeys(key, value, column_T, lasting_T)


@needs_sums
@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize(("length", "rate", "sink"), [(90, 0.5, 4), (70, 0.9, 0), (33, 0.1, 4)])
def test_a_window_read_apart_gives_what_the_formula_says(
    window: int, length: int, rate: float, sink: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_T = torch.rand(length, generator=torch.Generator().manual_seed(window)) < rate
    keep_T[1] = False  # of the sink, before all queries or between two
    query, column_L, keys = keys_of_a_prompt(length, keep_T, sink)
    reach = Reach(window, None)
    seen_LK = reach.sees(column_L, keys, torch.arange(length))
    monkeypatch.setattr(rows, "MANY", 1)
    asked = count_calls(monkeypatch, rows, "attend_in_two")
    output = attend(KERNELS["sdpa"](), query, column_L, keys, reach)
    assert len(asked) == 1
    assert (output - plainly(query, keys, seen_LK)).abs().max() < 1e-5


@needs_sums
def test_a_long_skipped_stretch_is_not_read_where_no_query_sees_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each block of queries would be filled up to its length."""
    keep_T = torch.arange(600) % 5 != 0
    keep_T[200:500] = False
    query, column_L, keys = keys_of_a_prompt(600, keep_T, 4)
    reach = Reach(7, None)
    read: list[int] = []
    at = window_module._at

    def watched(x: Tensor, slots: Tensor) -> Tensor:
        read.append(slots.shape[-1])
        return at(x, slots)

    monkeypatch.setattr(window_module, "_at", watched)
    monkeypatch.setattr(rows, "MANY", 1)
    output = attend(KERNELS["sdpa"](), query, column_L, keys, reach)
    seen_LK = reach.sees(column_L, keys, torch.arange(600))
    assert (output - plainly(query, keys, seen_LK)).abs().max() < 1e-5
    lasting, near = 241, 13  # and of skipped ones 6 of the gap, and each fifth of 32 and a window
    assert read == [lasting, lasting, near, near]


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """One entry for each call of a module's function from now on."""
    calls: list[int] = []
    function = getattr(module, name)

    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


@needs_sums
@pytest.mark.parametrize("why", ["sliding", "order", "other keys", "gradient", "eager", "width"])
def test_a_window_is_not_read_apart_where_that_would_be_wrong(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_T = torch.arange(200) % 3 > 0
    query, column_L, keys = keys_of_a_prompt(200, keep_T, 4)
    reach = Reach(5, 50 if why == "sliding" else None)
    if why == "order":
        parts = keys.key, keys.value, keys.column_K, keys.lasting_K
        keys = RowKeys(*(x.flip(0 if x.ndim == 1 else 2) for x in parts))  # type: ignore[union-attr]
    if why == "other keys":  # of a conversation's earlier forward
        query, column_L = query[:, :, -20:], column_L[-20:]
    if why == "width":
        keys = replace(keys, value=torch.cat([keys.value, keys.value], dim=-1))
    query.requires_grad_(why == "gradient")
    seen_LK = reach.sees(column_L, keys, torch.arange(200))
    monkeypatch.setattr(rows, "MANY", 1)
    asked = count_calls(monkeypatch, rows, "attend_in_two")
    output = attend(KERNELS["eager" if why == "eager" else "sdpa"](), query, column_L, keys, reach)
    assert not asked
    assert (output - plainly(query, keys, seen_LK)).abs().max() < 1e-5


@pytest.mark.parametrize("family", [*FIRST_FIVE, "gpt2"])
def test_under_autocast_a_window_is_read_in_blocks(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that tells its sums is not on autocast's list."""
    model, given = routed_model(Case(family, "attn_token", "kept", 5, 3)), batch(length=40)
    full = run(model, given)
    monkeypatch.setattr(rows, "MANY", 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(model, given, decisions=full.trace.decisions())
    assert difference(half.logits, full.logits, given.real) < LOGIT_TOLERANCE[torch.bfloat16]


@needs_sums
@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
@pytest.mark.parametrize("family", FIRST_FIVE)
def test_skipping_with_a_window_read_apart_equals_masking(
    family: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MANY", 1)
    asked = count_calls(monkeypatch, rows, "attend_in_two")
    model, given = routed_model(Case(family, granularity, "kept", 5, 3)), batch(length=40)
    masked = run(model, given, path="masked")
    skipping = run(model, given, [25, 15], decisions=masked.trace.decisions())
    assert asked or family == "mistral"  # all of whose layers slide
    assert_close(masked, skipping, given.real)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("number", [1, 6])
def test_without_columns_it_is_plainly_causal_or_all(kernel: str, number: int) -> None:
    torch.manual_seed(0)
    length = number if number > 1 else 9
    query = torch.randn(1, HEADS, number, WIDTH)
    keys = RowKeys(*torch.randn(2, 1, KEY_HEADS, length, WIDTH))
    seen_LK = torch.ones(number, length, dtype=torch.bool).tril(length - number)
    output = attend(KERNELS[kernel](), query, torch.arange(number), keys, Reach(0, None))
    assert (output - plainly(query, keys, seen_LK)).abs().max() < 1e-5


def test_keys_side_by_side_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """kv="all" reads a slice of the cache, however many queries skip."""
    taken: list[Tensor] = []
    kernel = KERNELS["sdpa"]()
    monkeypatch.setattr(
        Kernel, "__call__", lambda self, q, k, v, m: taken.append(k) or q.transpose(1, 2)
    )
    key = torch.randn(1, KEY_HEADS, 200, WIDTH)
    column_L = torch.arange(0, 200, 2)
    query = torch.randn(1, HEADS, 100, WIDTH)
    attend(kernel, query, column_L, RowKeys(key, key, torch.arange(200)), Reach(0, None))
    assert [k.shape[2] for k in taken] == [127, 199]  # up to the last query of a block
    assert all(k.untyped_storage().data_ptr() == key.untyped_storage().data_ptr() for k in taken)


@pytest.mark.parametrize("long", [4, 1000])
@pytest.mark.parametrize(("sliding", "first"), [(None, 0), (9, 0), (None, 5), (9, 5)])
def test_a_stretch_of_keys_reads_what_its_keys_one_by_one_do(
    sliding: int | None, first: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BLOCK", 3)
    monkeypatch.setattr(rows, "LONG_BLOCK", 7)
    monkeypatch.setattr(rows, "LONG", long)
    generator = torch.Generator().manual_seed(first)
    column_K = torch.arange(first, first + 30)
    column_L = column_K[torch.rand(30, generator=generator) < 0.6]
    query, key, value = (
        torch.randn(1, heads, number, WIDTH, generator=generator)
        for heads, number in ((HEADS, len(column_L)), (KEY_HEADS, 30), (KEY_HEADS, 30))
    )
    kernel, reach = KERNELS["sdpa"](), Reach(0, sliding)
    stretch = attend(kernel, query, column_L, RowKeys(key, value, column_K), reach)
    apart = RowKeys(key, value, column_K, torch.ones(30, dtype=torch.bool))
    torch.testing.assert_close(stretch, attend(kernel, query, column_L, apart, reach))


def test_pads_in_the_middle_are_no_part_of_a_stretch() -> None:
    generator = torch.Generator().manual_seed(0)
    column_K = torch.arange(30)
    column_K[[7, 8, 20]] = -1
    column_L = torch.tensor([3, 9, 15, 29])
    query, key, value = (
        torch.randn(1, heads, number, WIDTH, generator=generator)
        for heads, number in ((HEADS, 4), (KEY_HEADS, 30), (KEY_HEADS, 30))
    )
    seen_LK = (column_K >= 0) & (column_K <= column_L[:, None])
    keys = RowKeys(key, value, column_K)
    output = attend(KERNELS["sdpa"](), query, column_L, keys, Reach(0, None))
    assert (output - plainly(query, keys, seen_LK)).abs().max() < 1e-5


def test_one_query_reads_past_hidden_keys_without_a_copy_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, 8, generator=generator)
        for heads, length in ((4, 1), (2, 12), (2, 12))
    )
    lasting_K = torch.arange(12) % 4 != 1  # the others lie behind the window
    keys = RowKeys(key, value, torch.arange(12), lasting_K)
    seen: list[int] = []

    class Watched(Kernel):
        def __call__(
            self, query: Tensor, key: Tensor, value: Tensor, mask_LK: Tensor | None
        ) -> Tensor:
            seen.append(key.untyped_storage().data_ptr())
            return super().__call__(query, key, value, mask_LK)

    reach = Reach(window=1, sliding=None)
    kernel = Watched(None, None, {"scaling": 8**-0.5})
    found = attend(kernel, query, torch.tensor([11]), keys, reach)
    assert seen == [key.untyped_storage().data_ptr()]
    some = RowKeys(key[:, :, lasting_K], value[:, :, lasting_K])
    torch.testing.assert_close(found, attend(kernel, query, torch.tensor([11]), some, reach))


def test_a_decoded_token_of_a_window_reads_a_stretch_of_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = routed_model(Case("llama", "attn_token", "kept", 4, 3))
    ids, read = token_ids(1, 40), []
    attended = Kernel.__call__

    def watched(self: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        read.append((key.untyped_storage().data_ptr(), mask))
        return attended(self, query, key, value, mask)

    monkeypatch.setattr(Kernel, "__call__", watched)
    asked = 0
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        for column in range(20, 40):
            read.clear()
            model(ids[:, column : column + 1], **{CACHE_KEY: cache})
            held = {layer.store.keys.untyped_storage().data_ptr() for layer in cache.layers}
            assert all(place in held and mask is None for place, mask in read)
            asked += len(read)
    assert 5 < asked < 20 * len(cache.layers) - 5  # some ask, some are skipped
