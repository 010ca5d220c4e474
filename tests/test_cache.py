"""The kept-key cache against a dictionary, and the cache layer's dealings with transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from laws import CHUNKS, SLIDING, Case, batch, over, routed_model, run
from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.cache import (
    CROP_SLACK,
    GROWTH,
    KeptKeys,
    PrefixLogits,
    RoutedCacheLayer,
    touch,
)
from tiny import CACHE_KEY

HEADS, WIDTH = 2, 3


def key_of(text: Tensor, column: Tensor) -> Tensor:
    """A key (N, H, D) that tells its text and column."""
    return (text * 1000 + column).float()[:, None, None].expand(-1, HEADS, WIDTH)


def new_store(rows: int, window: int = 0, sliding: int | None = None) -> KeptKeys:
    return KeptKeys(rows, window, sliding)


@dataclass
class Obvious:
    """The same cache as a list of dictionaries: text -> column -> is it permanent."""

    window: int
    sliding: int | None
    texts: list[int]
    rows: list[dict[int, bool]] = field(default_factory=list)
    seen: int = 0

    def visible(self, row: int, of: int | None = None) -> set[int]:
        """Columns that a query sees: the next one, or that of a column."""
        query = self.seen if of is None else of
        return {
            column
            for column, permanent in self.rows[row].items()
            if (permanent or query - column < self.window)
            and (self.sliding is None or query - column < self.sliding)
        }


def write(store: KeptKeys, obvious: Obvious, keep: Tensor) -> None:
    """One chunk: the kept tokens are permanent; with a window the others are written too."""
    written = torch.ones_like(keep) if store.window else keep
    row, token = written.nonzero(as_tuple=True)
    column = obvious.seen + token
    text = torch.tensor(obvious.texts)[row]
    store.append(row, column, keep[row, token], key_of(text, column), -key_of(text, column))
    store.advance(keep.shape[1])
    for r, c in zip(row.tolist(), column.tolist(), strict=True):
        obvious.rows[r][c] = bool(keep[r, c - obvious.seen])
    obvious.seen += keep.shape[1]


def assert_equal(store: KeptKeys, obvious: Obvious) -> None:
    """Every visible key is there once, with its column, and was not mixed up with another's."""
    view = store.view()
    if view is None:  # nothing was written yet
        assert not any(obvious.rows)
        return
    keys, values, columns_BS = view
    assert store.seen == obvious.seen
    total = 0
    for row, text in enumerate(obvious.texts):
        visible = obvious.visible(row)
        total += len(visible)
        columns = columns_BS[row]
        slots = [
            slot
            for slot, column in enumerate(columns.tolist())
            if column >= 0
            and (bool(store.lasting_S()[slot]) or store.seen - column < store.window)
            and (store.sliding is None or store.seen - column < store.sliding)
        ]
        assert sorted(columns[slots].tolist()) == sorted(visible)
        expected = key_of(torch.full_like(columns[slots], text), columns[slots])
        assert torch.equal(keys[row, :, slots].transpose(0, 1), expected)
        assert torch.equal(values[row, :, slots].transpose(0, 1), -expected)
        if store.sliding is None:
            stretch = columns_BS[row, store.latest()[row]]
            assert sorted(stretch.tolist()) == sorted(obvious.visible(row, of=store.seen - 1))
    assert store.held() == total


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 9), st.sampled_from([0.0, 0.3, 0.8, 1.0])),
        st.tuples(st.just("crop"), st.integers(1, 7), st.just(0.0)),
        st.tuples(st.just("select"), st.integers(0, 99), st.just(0.0)),
        st.tuples(st.just("decode"), st.integers(1, 40), st.sampled_from([0.1, 0.9])),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    STEPS,
    st.integers(1, 3),
    st.sampled_from([0, 1, 4]),
    st.sampled_from([None, 5, 12]),
    st.integers(0, 99),
)
def test_kept_keys_equal_a_dictionary(
    steps: list[tuple[str, int, float]], rows: int, window: int, sliding: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    store = new_store(rows, window, sliding)
    obvious = Obvious(window, sliding, list(range(rows)), [{} for _ in range(rows)])
    for what, number, rate in steps:
        if what in ("write", "decode"):
            lengths = [number] if what == "write" else [1] * number
            for length in lengths:
                keep = torch.rand((len(obvious.rows), length), generator=generator) < rate
                write(store, obvious, keep)
        elif what == "select":
            order = torch.randint(0, len(obvious.rows), (rows,), generator=generator)
            store.select(lambda x, order=order: x[order])
            obvious.rows = [dict(obvious.rows[i]) for i in order.tolist()]
            obvious.texts = [obvious.texts[i] for i in order.tolist()]
        else:
            length = max(obvious.seen - number, 0)
            try:
                store.crop(length)
            except UnsupportedCallError:  # then nothing has changed
                assert sliding is not None or window
                assert_equal(store, obvious)
                continue
            obvious.seen = length
            obvious.rows = [{c: p for c, p in row.items() if c < length} for row in obvious.rows]
        assert_equal(store, obvious)


def test_a_crop_of_the_last_chunk_always_works() -> None:
    """What assisted decoding asks for, also on sliding layers and with a window."""
    generator = torch.Generator().manual_seed(0)
    for window, sliding in ((0, None), (4, None), (0, 5), (4, 5)) * 3:
        store = new_store(1, window, sliding)
        obvious = Obvious(window, sliding, [0], [{}])
        for _ in range(30):
            write(store, obvious, torch.rand((1, 8), generator=generator) < 0.5)
            store.crop(obvious.seen - 7)
            obvious.seen -= 7
            obvious.rows = [{c: p for c, p in obvious.rows[0].items() if c < obvious.seen}]
            assert_equal(store, obvious)


def test_skipped_tokens_are_remembered_only_so_far_back() -> None:
    store = new_store(1, window=4)
    obvious = Obvious(4, None, [0], [{}])
    write(store, obvious, torch.zeros(1, 200, dtype=torch.bool))
    with pytest.raises(UnsupportedCallError, match=f"at most {CROP_SLACK}"):
        store.crop(200 - CROP_SLACK - 1)
    store.crop(200 - CROP_SLACK)
    obvious.seen = 200 - CROP_SLACK
    obvious.rows = [{c: p for c, p in obvious.rows[0].items() if c < obvious.seen}]
    assert_equal(store, obvious)
    # It was written up to column 200: a second crop cannot bring back what had to go for that,
    # whether or not something was written in between.
    with pytest.raises(UnsupportedCallError, match=f"at most {CROP_SLACK}"):
        store.crop(200 - CROP_SLACK - 10)
    write(store, obvious, torch.zeros(1, 5, dtype=torch.bool))
    assert_equal(store, obvious)
    with pytest.raises(UnsupportedCallError, match=f"at most {CROP_SLACK}"):
        store.crop(200 - CROP_SLACK - 10)


def test_sliding_keys_are_given_up_when_room_is_needed() -> None:
    store = new_store(2, sliding=5)
    obvious = Obvious(0, 5, [0, 1], [{}, {}])
    for _ in range(300):
        write(store, obvious, torch.ones(2, 1, dtype=torch.bool))
    assert_equal(store, obvious)
    assert store.keys.shape[2] <= 2 * GROWTH + 5
    assert store.forgotten > 100


def test_decoding_seldom_copies() -> None:
    store = new_store(1)
    obvious = Obvious(0, None, [0], [{}])
    write(store, obvious, torch.ones(1, 30, dtype=torch.bool))
    assert store.keys.shape[2] == 30  # a prefill is stored to measure
    sizes = set()
    for _ in range(2 * GROWTH):
        write(store, obvious, torch.ones(1, 1, dtype=torch.bool))
        sizes.add(store.keys.shape[2])
    assert len(sizes) == 2


def test_skipping_all_holds_no_memory() -> None:
    store = new_store(3)
    write(store, Obvious(0, None, [0, 1, 2], [{}, {}, {}]), torch.zeros(3, 500, dtype=torch.bool))
    assert store.seen == 500
    assert store.held() == store.keys.numel() == 0


# Prefix logits


def test_prefix_logits_can_be_taken_back() -> None:
    prefix = PrefixLogits(2, 4, torch.device("cpu"))
    logits = torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])
    position = torch.tensor([[0, 0, 1], [0, 1, 2]])
    taken = torch.tensor([[False, True, True], [True, True, True]])
    prefix.add(logits, position, taken, torch.arange(3))
    assert prefix.sums().sum_B.tolist() == [5.0, 18.0]
    assert prefix.sums().count_B.tolist() == [2, 3]
    prefix.crop(2)
    assert prefix.sums().sum_B.tolist() == [2.0, 11.0]
    prefix.select(lambda x: x[[1, 1, 0]])
    assert prefix.sums().sum_B.tolist() == [11.0, 11.0, 2.0]
    assert prefix.sums().count_B.tolist() == [2, 2, 1]


# The cache layer


def test_layers_are_replaced_on_first_touch_only() -> None:
    cache = DynamicCache()
    layer = touch(cache, 2)
    assert isinstance(layer, RoutedCacheLayer)
    assert [type(each) for each in cache.layers] == [DynamicLayer, DynamicLayer, RoutedCacheLayer]
    assert touch(cache, 2) is layer


def test_a_cache_made_without_a_config_serves_sliding_layers_too() -> None:
    for case in (Case("mistral", sink=5, window=3), Case("gemma3", kv="all"), Case("gemma3")):
        model, text = routed_model(case), batch()
        expected = run(model, text)
        for phase in CHUNKS.values():
            result = run(model, text, phase, cache=DynamicCache())
            assert (result.logits - expected.logits)[text.real].abs().max() < 3e-5


class Quantized(DynamicLayer):
    """Stands for a kind of layer that keeps its keys in another form."""


def test_layers_of_another_kind_are_refused() -> None:
    for case in (Case(kv="all"), Case(), Case(granularity="attn_sequence", kv="all")):
        model, text = routed_model(case), batch(2, padded=False)
        cache = DynamicCache(config=model.config)
        cache.layers[1] = Quantized()
        with torch.no_grad(), pytest.raises(UnsupportedCallError, match=r"Quantized \(layer 1\)"):
            model(text.ids, **over(cache))


def test_an_offloading_cache_is_refused() -> None:
    model, text = routed_model(), batch(2, padded=False)
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="offloaded"):
        model(text.ids, **over(cache))
    with pytest.raises(UnsupportedCallError, match="offloaded"):
        RoutedCacheLayer(DynamicLayer()).offload()


def test_until_something_is_skipped_the_dense_layer_serves() -> None:
    model, text = routed_model(), batch()
    keep = {f"layers.{i}.attn": text.real for i in range(4)}
    cache = run(model, text, CHUNKS["chunked"], decisions=keep).cache
    for layer in cache.layers:
        assert isinstance(layer, RoutedCacheLayer)
        assert layer.store is None
        assert layer.keys is not None
        assert layer.keys.shape == (3, 2, 20, 8)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_what_was_dense_moves_over_at_the_first_skip(family: str) -> None:
    model, text = routed_model(Case(family)), batch()
    keep = {f"layers.{i}.attn": text.real.clone() for i in range(4)}
    keep["layers.1.attn"][:, 14:] = False
    whole = run(model, text, decisions=keep)
    for chunks in ([14, 6], [13] + [1] * 7, [7, 9, 4]):
        cached = run(model, text, chunks, decisions=keep)
        assert (cached.logits - whole.logits)[text.real].abs().max() < 3e-5
        layer = cached.cache.layers[1]
        assert layer.store is not None
        assert not layer.inner.is_initialized  # its memory is free
        assert layer.get_seq_length() == 20
        assert cached.cache.layers[0].store is None


@pytest.mark.parametrize(
    "case", [Case(), Case("mistral", sink=5, window=3), Case("gemma3")], ids=str
)
def test_mask_sizes_are_the_dense_layers(case: Case) -> None:
    """transformers makes the masks of all layers from one layer's sizes."""
    model, text = routed_model(case), batch(2, padded=False)
    nothing = {f"layers.{i}.attn": torch.zeros_like(text.real) for i in range(4)}
    everything = {f"layers.{i}.attn": text.real for i in range(4)}
    for length in (3, SLIDING - 1, SLIDING, SLIDING + 1, 20):
        part = type(text)(text.ids[:, :length], text.mask[:, :length])
        skipped = run(model, part, [length], decisions=nothing).cache
        kept = run(model, part, [length], decisions=everything).cache
        for a, b in zip(skipped.layers, kept.layers, strict=True):
            assert (a.store is None, b.store is None) == (False, True)
            for query in (1, 4):
                assert a.get_mask_sizes(query) == b.get_mask_sizes(query)
            assert a.is_sliding == b.is_sliding
        assert skipped.get_seq_length() == kept.get_seq_length() == length


def test_reset_empties_a_cache_for_another_text() -> None:
    for case in (Case(), Case(granularity="attn_sequence", sink=5, window=3)):
        model, text, other = routed_model(case), batch(), batch(seed=3)
        cache = run(model, other, CHUNKS["chunked"]).cache
        cache.reset()
        assert cache.get_seq_length() == 0
        again = run(model, text, CHUNKS["chunked"], cache=cache)
        assert torch.equal(again.logits, run(model, text, CHUNKS["chunked"]).logits)


@pytest.mark.parametrize(
    "case",
    [Case(kv="all"), Case(), Case("gemma3", sink=5, window=3), Case(granularity="attn_sequence")],
    ids=str,
)
def test_rows_are_repeated_and_selected(case: Case) -> None:
    model, text = routed_model(case), batch()
    head = type(text)(text.ids[:, :12], text.mask[:, :12])

    def rest(change: Any, order: list[int]) -> None:
        cache = run(model, head, [11, 1]).cache
        change(cache)
        longer = text.take(order)
        result, whole = run(model, longer, [1] * 8, cache=cache), run(model, longer)
        real = longer.real[:, 12:]
        assert (result.logits - whole.logits[:, 12:])[real].abs().max() < 3e-5

    rest(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    rest(lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0])
    rest(lambda cache: cache.reorder_cache(torch.tensor([1, 1, 2])), [1, 1, 2])


def test_a_copy_shares_nothing() -> None:
    model, text = routed_model(Case(sink=5, window=3)), batch()
    cache = run(model, text, CHUNKS["chunked"]).cache
    twin = copy.deepcopy(cache)
    for a, b in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        b.store.keys.zero_()
        b.store.columns_BS.zero_()
        assert not torch.equal(a.keys, b.keys)


def test_a_kept_cache_is_smaller() -> None:
    model, text = routed_model(), batch(1, padded=False)
    tenth = {f"layers.{i}.attn": torch.arange(20)[None] % 10 == 0 for i in range(4)}
    cache = run(model, text, [20], decisions=tenth).cache
    assert sum(layer.keys.numel() for layer in cache.layers) == 4 * 2 * 2 * 8


@pytest.mark.parametrize("layer", [DynamicLayer(), DynamicSlidingWindowLayer(5)], ids=repr)
def test_cropping_a_layer_that_serves_dense_is_the_dense_layers_affair(layer: Any) -> None:
    routed = RoutedCacheLayer(layer)
    keys = torch.randn(1, 2, 4, 3)
    routed.update(keys, keys)
    routed.crop(-1)
    assert routed.get_seq_length() == 3
    routed.crop(0)
    assert routed.get_seq_length() == 3
    if CACHE_KEY == "cache":  # before 5.24 transformers took a positive number for a length
        with pytest.raises(ValueError, match="positive value"):
            routed.crop(2)
