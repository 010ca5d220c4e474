"""The cache layer of a routed attention: which keys are kept, and what a sequence decision needs to
remember.

`RoutedCacheLayer` takes the place of a layer of a transformers cache on first touch. As long as
nothing has been skipped it passes everything to the layer it replaced, so that results stay equal
to the dense model's to the bit. With the first skipped token it moves to `KeptKeys`, which holds
only the keys that the policy names, each with the column (token index in the cache, pads included)
that it had.

Shapes: B batch, H key/value heads, S slots, N tokens written, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from router_tuning.decide import PrefixSums
from router_tuning.errors import UnsupportedCallError

# Tokens that a cache with kv_window can be cropped by: so many keys stay that have left the window.
CROP_SLACK = 64
GROWTH = 64

GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
FIXED = (StaticLayer, StaticSlidingWindowLayer)  # have a place for every token, kept or not


class KeptKeys:
    """Keys and values of the kept tokens of each row; rows may hold different numbers.

    Kept and sink tokens last: they are appended from slot `passing` on. The slots before it (with
    kv_window > 0 only) hold the latest skipped tokens, the last of them in slot passing-1, so that
    a query that sees some of these and all lasting keys reads one stretch. What lies where is noted
    on the host.
    """

    def __init__(self, batch: int, window: int, sliding: int | None) -> None:
        self.window = window
        self.passing = window + CROP_SLACK if window else 0
        self.sliding = sliding
        self.seen = 0
        self.furthest = 0  # most columns seen; of the latest before this one all skipped are here
        self.forgotten = 0  # columns below this were dropped by a sliding layer
        self.lengths = [0] * batch
        self.keys: Tensor | None = None  # (B, H, S, D), once the first token is written
        self.values: Tensor | None = None
        self.columns_BS = torch.full((batch, self.passing), -1)

    @property
    def used(self) -> int:
        """Slots in use by the longest row."""
        return self.passing + max(self.lengths, default=0)

    def view(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys (B, H, S, D), values and columns (B, S) in use; column -1 marks an empty slot. None
        before the first token is written.
        """
        if self.keys is None or self.values is None:
            return None
        used = self.used
        return self.keys[:, :, :used], self.values[:, :, :used], self.columns_BS[:, :used]

    def lasting_S(self) -> Tensor:
        """True at slots whose key stays visible, False before them."""
        return torch.arange(self.used) >= self.passing

    def latest(self) -> list[slice]:
        """For each row the slots that its latest token sees: all lasting ones, and as many before
        them as were skipped in its window.
        """
        ends = [self.passing + length for length in self.lengths]
        if not self.window:
            return [slice(0, end) for end in ends]
        oldest = max(self.seen - self.window, 0)
        near_BS = self.columns_BS[:, self.passing - self.window : self.passing] >= oldest
        numbers = near_BS.sum(1).tolist()
        return [slice(self.passing - n, end) for n, end in zip(numbers, ends, strict=True)]

    def append(
        self,
        row_N: Tensor,
        column_N: Tensor,
        lasting_N: Tensor,
        key_NHD: Tensor,
        value_NHD: Tensor,
    ) -> None:
        """Write tokens, ordered by row and then by column; row, column and whether they stay
        visible lie on the host. `seen` is advanced by `advance`, not here.
        """
        written: tuple[Tensor, ...] = (row_N, column_N, key_NHD, value_NHD)
        stays = bool(lasting_N.all())
        lasting = written if stays else _those(lasting_N, *written)
        counts = self._by_row(lasting[0])
        if self.keys is None:
            self._begin(key_NHD, value_NHD, max(counts))
        if not stays:  # with a window
            self._pass(*_those(~lasting_N, *written))
        self._make_room(counts)
        if len(counts) > 1 and max(counts) == 1:
            self._put_one_each(*lasting)
        else:
            for row, some in _stretches(counts):
                first = self.passing + self.lengths[row]
                slots = slice(first, first + counts[row])
                self._put(row, slots, *(x[some] for x in lasting[1:]))
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]

    def _begin(self, key_NHD: Tensor, value_NHD: Tensor, number: int) -> None:
        """Make room for the first tokens: so many lasting ones in a row."""
        slots = self.passing + number
        self.keys, self.values = (
            x_NHD.new_zeros((len(self.lengths), x_NHD.shape[1], slots, x_NHD.shape[2]))
            for x_NHD in (key_NHD, value_NHD)
        )
        self.columns_BS = torch.nn.functional.pad(self.columns_BS, (0, number), value=-1)

    def _pass(self, row_N: Tensor, column_N: Tensor, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Put skipped tokens behind those before them, which move up: few keys, and an attention
        that need not be told which slots it sees. Rows that skip equally many go together.
        """
        assert self.keys is not None
        assert self.values is not None
        counts = self._by_row(row_N)
        for number in set(counts) - {0}:
            chosen_B = torch.tensor(counts) == number
            written: tuple[Tensor, ...] = (column_N, key_NHD, value_NHD)
            rows: slice | Tensor = slice(None)
            if not bool(chosen_B.all()):
                rows, written = chosen_B.nonzero()[:, 0], _those(chosen_B[row_N], *written)
            column_RL, key, value = (x.unflatten(0, (-1, number)) for x in written)
            _push(self.columns_BS[:, : self.passing], rows, column_RL, 1)
            _push(self.keys[:, :, : self.passing], rows, key.transpose(1, 2), 2)
            _push(self.values[:, :, : self.passing], rows, value.transpose(1, 2), 2)

    def _by_row(self, row_N: Tensor) -> list[int]:
        """How many of some tokens each row has."""
        if len(self.lengths) == 1:
            return [len(row_N)]
        counts: list[int] = torch.bincount(row_N, minlength=len(self.lengths)).tolist()
        return counts

    def _put(self, row: int, slots: slice, column_N: Tensor, key: Tensor, value: Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys[row, :, slots] = key.transpose(0, 1)
        self.values[row, :, slots] = value.transpose(0, 1)
        self.columns_BS[row, slots] = column_N

    def _put_one_each(
        self, row_N: Tensor, column_N: Tensor, key_NHD: Tensor, value_NHD: Tensor
    ) -> None:
        """Put a token behind those of each of some rows, as decoding does: all in one operation."""
        assert self.keys is not None
        assert self.values is not None
        slot_N = torch.tensor([self.passing + self.lengths[row] for row in row_N.tolist()])
        self.columns_BS[row_N, slot_N] = column_N
        there = row_N.to(self.keys.device), slice(None), slot_N.to(self.keys.device)
        self.keys[there] = key_NHD.to(self.keys.dtype)
        self.values[there] = value_NHD.to(self.values.dtype)

    def advance(self, tokens: int) -> None:
        """Note that `tokens` more columns have gone by, written or not."""
        self.seen += tokens
        self.furthest = max(self.furthest, self.seen)

    def held(self) -> int:
        """Keys that the policy names now: kept and sink ones (within a sliding window), and the
        latest skipped.
        """
        columns_BS = self.columns_BS[:, : self.used]
        oldest = self.seen - self.window + 1
        held_BS = (columns_BS >= 0) & (self.lasting_S() | (columns_BS >= oldest))
        if self.sliding is not None:
            held_BS &= columns_BS > self.seen - self.sliding
        return int(held_BS.sum())

    def crop(self, length: int) -> None:
        """Forget the columns from `length` on."""
        if length >= self.seen:
            return
        gone = self.furthest > self.passing and self.furthest - length > CROP_SLACK
        if self.passing and gone:
            raise UnsupportedCallError(
                f"a cache with kv_window={self.window} can be cropped to at most {CROP_SLACK} "
                "tokens before its "
                f"furthest token ({self.furthest}), asked for {length}; start a new cache, or use "
                "kv_window=0"
            )
        if self.sliding is not None and max(length - self.sliding + 1, 0) < self.forgotten:
            raise UnsupportedCallError(
                f"cannot crop to {length} tokens: keys before column {self.forgotten} have left "
                "the sliding "
                f"window of {self.sliding}; start a new cache"
            )
        cropped_BS = self.columns_BS >= length
        for row, number in enumerate(cropped_BS[:, : self.passing].sum(1).tolist()):
            if number:
                self._take_back(row, number)
        lasting_BS = self.columns_BS[:, self.passing :]
        lasting_BS[cropped_BS[:, self.passing :]] = -1
        self.lengths = (lasting_BS >= 0).sum(1).tolist()
        self.seen = length

    def _take_back(self, row: int, number: int) -> None:
        """Forget the latest skipped tokens of a row, and move those before them to their place."""
        assert self.keys is not None
        assert self.values is not None
        end = self.passing
        for slots in (self.keys[row], self.values[row], self.columns_BS[row][None, :, None]):
            slots[:, number:end] = slots[:, : end - number].clone()
        self.columns_BS[row, :number] = -1

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Rearrange the rows: `pick` maps a tensor with a batch dimension to the new one."""
        self.lengths = pick(torch.tensor(self.lengths)).tolist()
        if self.keys is not None and self.values is not None:
            self.keys, self.values = pick(self.keys), pick(self.values)
        self.columns_BS = pick(self.columns_BS)

    def _make_room(self, counts: list[int]) -> None:
        missing = self._missing(counts)
        if missing > 0 and self.sliding is not None and self.seen >= self.sliding:
            self._drop_expired(self.seen - self.sliding + 1)
            missing = self._missing(counts)
        if missing > 0:
            # A prefill is stored to measure; decoding grows by steps, so that it seldom copies.
            assert self.keys is not None
            assert self.values is not None
            grow = max(missing, GROWTH) if any(self.lengths) else missing
            self.keys, self.values = _pad_slots(self.keys, grow), _pad_slots(self.values, grow)
            self.columns_BS = torch.nn.functional.pad(self.columns_BS, (0, grow), value=-1)

    def _missing(self, counts: list[int]) -> int:
        needed = max(n + c for n, c in zip(self.lengths, counts, strict=True))
        return self.passing + needed - self.columns_BS.shape[1]

    def _drop_expired(self, first: int) -> None:
        """Give up the permanent slots of columns before `first` and close the rows up."""
        stay_BS = self.columns_BS[:, self.passing :] >= first
        order_BS = (~stay_BS).to(torch.int8).sort(dim=1, stable=True).indices
        size = int(stay_BS.sum(1).max())
        gather = self.passing + order_BS[:, :size]
        rows = torch.arange(len(self.lengths))[:, None]
        for name in ("keys", "values"):
            old = getattr(self, name)
            kept = old[rows, :, gather].transpose(1, 2)
            setattr(self, name, torch.cat([old[:, :, : self.passing], kept], dim=2))
        columns = self.columns_BS[rows, gather].masked_fill(
            ~stay_BS.gather(1, order_BS[:, :size]), -1
        )
        self.columns_BS = torch.cat([self.columns_BS[:, : self.passing], columns], dim=1)
        self.lengths = stay_BS.sum(1).tolist()
        self.forgotten = max(self.forgotten, first)


def _those(chosen_N: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Some of the tokens; `chosen_N` lies on the host, the parts where they like."""
    index_N = chosen_N.nonzero()[:, 0]
    return tuple(part.index_select(0, index_N.to(part.device)) for part in parts)


def _push(slots: Tensor, rows: slice | Tensor, new: Tensor, dim: int) -> None:
    """Put what is new behind what some rows hold, and let as much go at the front."""
    size = slots.shape[dim]
    joined = torch.cat([slots[rows], new.to(slots.dtype)], dim)
    slots[rows] = joined.narrow(dim, joined.shape[dim] - size, size)


def _stretches(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """The rows that have any of some tokens, and where theirs lie: side by side, here and there."""
    begin = 0
    for row, number in enumerate(counts):
        if number:
            yield row, slice(begin, begin + number)
        begin += number


def _pad_slots(x_BHSD: Tensor, grow: int) -> Tensor:
    return torch.nn.functional.pad(x_BHSD, (0, 0, 0, grow))


class PrefixLogits:
    """The router logits of each row's first tokens, with their columns, so that a crop can take
    them back. Once all rows have their prefix, its mean is kept on the host: what is decided is
    then never asked of the device again.
    """

    def __init__(self, batch: int, decide_after: int, device: torch.device) -> None:
        self.logits_BP = torch.zeros((batch, decide_after), dtype=torch.float32, device=device)
        self.columns_BP = torch.full((batch, decide_after), -1)
        self.settled_B: Tensor | None = None

    def add(
        self, logits_BT: Tensor, position_BT: Tensor, prefix_BT: Tensor, column_T: Tensor
    ) -> None:
        """Store the logits of the tokens where prefix_BT is True, by their position in the
        sequence. All but the logits lies on the host.
        """
        row, token = prefix_BT.nonzero(as_tuple=True)
        position = position_BT[row, token]
        self.logits_BP[row, position] = logits_BT[row, token].detach()
        self.columns_BP[row, position] = column_T[token]
        self._settle()

    def sums(self) -> PrefixSums:
        """What has been seen so far."""
        seen_BP = (self.columns_BP >= 0).to(self.logits_BP.device)
        return PrefixSums((self.logits_BP * seen_BP).sum(1), seen_BP.sum(1))

    def crop(self, length: int) -> None:
        """Forget the tokens from column `length` on."""
        self.columns_BP[self.columns_BP >= length] = -1
        self._settle()

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Rearrange the rows."""
        self.logits_BP, self.columns_BP = pick(self.logits_BP), pick(self.columns_BP)
        if self.settled_B is not None:
            self.settled_B = pick(self.settled_B)
        else:
            self._settle()  # the rows that were not whole may be gone

    def _settle(self) -> None:
        whole = bool((self.columns_BP >= 0).all())
        self.settled_B = self.logits_BP.mean(1).cpu() if whole else None


class PromptLogit:
    """What each row's prompt decided, on the host: its mean router logit, and the column that the
    prompt ends before.
    """

    def __init__(self, logit_B: Tensor, end_B: Tensor) -> None:
        self.logit_B = logit_B
        self.end_B = end_B

    @classmethod
    def of(cls, logit_B: Tensor, prompt_BT: Tensor, column_T: Tensor) -> PromptLogit:
        """From the tokens of the prompts."""
        return cls(logit_B.detach().cpu(), (prompt_BT * (column_T + 1)).amax(1).cpu())

    def outlives(self, length: int) -> bool:
        """Whether all prompts end within the first `length` columns."""
        return bool((self.end_B <= length).all())

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Rearrange the rows."""
        self.logit_B, self.end_B = pick(self.logit_B), pick(self.end_B)


class RoutedCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The cache layer of a routed attention. `inner` serves until the first token is skipped,
    `store` after.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, inner: Any) -> None:
        # Typed loosely: the base class of transformers' layers does not name all they share.
        self.inner = inner
        self.adapter = ""
        """Whose routers filled it."""
        self.store: KeptKeys | None = None
        self.prefixes: dict[str, PrefixLogits] = {}  # by unit's name
        self.prompts: dict[str, PromptLogit] = {}

    @property
    def is_bound(self) -> bool:
        """Whether it holds what only the adapter that filled it can go on with: some of the keys,
        or the beginning of its decisions.
        """
        return self.store is not None or bool(self.prefixes or self.prompts)

    @property
    def sliding_window(self) -> int | None:
        """Window of a sliding layer, in columns; None where all earlier keys are visible."""
        return getattr(self.inner, "sliding_window", None)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """True over a static layer. Masks go by it: places that are not filled must be hidden."""
        return self.store is None and bool(self.inner.is_compileable)

    @property
    def is_sliding(self) -> bool:
        return bool(getattr(self.inner, "is_sliding", False))

    # transformers reads these three as plain attributes of a layer.
    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.store is not None or bool(self.inner.is_initialized)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return self._held(0) if self.store is not None else self.inner.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self._held(1) if self.store is not None else self.inner.values

    def _held(self, index: int) -> Tensor | None:
        view = None if self.store is None else self.store.view()
        return None if view is None else view[index]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.inner.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add every token's key and value, as the dense model does."""
        if self.store is not None:
            raise UnsupportedCallError(
                "this cache was filled by a routed model that skipped tokens, and the dense model "
                "needs every "
                "token's keys; start a new cache (or leave the adapter enabled)"
            )
        keys, values = self.inner.update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self) -> int:
        return self.store.seen if self.store is not None else int(self.inner.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.store is None:
            length, offset = self.inner.get_mask_sizes(query_length)
            return length, offset
        seen, window = self.store.seen, self.sliding_window
        offset = 0 if window is None else max(seen - window + 1, 0)
        return seen - offset + query_length, offset

    def get_max_length(self) -> int:
        return int(self.inner.get_max_length())

    # The name of get_max_length before transformers 5.20.
    def get_max_cache_shape(self) -> int:
        return int(getattr(self.inner, "get_max_cache_shape", self.inner.get_max_length)())

    def begin_skipping(self, batch: int, window: int, real_BC: Tensor | None) -> KeptKeys:
        """Move what the dense layer holds (all of it kept) to a KeptKeys, leaving the pads
        behind; `real_BC` lies on the host.
        """
        if self.store is not None:
            return self.store
        self.store = KeptKeys(batch, window, self.sliding_window)
        seen = int(self.inner.get_seq_length())
        if seen:
            held = self.inner.keys.shape[2]
            columns = torch.arange(seen - held, seen)
            real_BT = real_columns(real_BC, columns, batch)
            row, token = real_BT.nonzero(as_tuple=True)
            keys, values = self.inner.keys[row, :, token], self.inner.values[row, :, token]
            self.store.append(
                row, columns[token], torch.ones_like(row, dtype=torch.bool), keys, values
            )
            self.store.advance(seen)
            self.store.forgotten = seen - held
        _empty(self.inner)
        return self.store

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens (a positive number, before 5.20, is the length
        to keep).
        """
        if tokens_to_remove >= 0 and not self.is_bound:
            self.inner.crop(tokens_to_remove)
            return
        seen = self.get_seq_length()
        length = seen + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, seen)
        if self.store is not None:
            self.store.crop(length)
        else:
            self.inner.crop(tokens_to_remove)
        for prefix in self.prefixes.values():
            prefix.crop(length)
        # Of a part of a prompt nothing is known, also not in rows whose prompts are shorter.
        self.prompts = {name: p for name, p in self.prompts.items() if p.outlives(length)}

    def reset(self) -> None:
        _empty(self.inner)
        self.store = None
        self.prefixes, self.prompts = {}, {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))
        self.inner.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))
        self.inner.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)])
        self.inner.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        activate = getattr(self.inner, "activate_past_recording", None)
        if activate is not None:
            activate()

    def offload(self) -> None:
        raise UnsupportedCallError(
            "offloaded caches cannot be routed; use the default dynamic cache"
        )

    def _select(self, pick: Callable[[Tensor], Tensor]) -> None:
        for part in (self.store, *self.prefixes.values(), *self.prompts.values()):
            if part is not None:
                part.select(pick)


def _empty(layer: Any) -> None:
    """Let go of a layer's keys; in older transformers its own reset only zeroes them."""
    layer.reset()
    layer.keys = layer.values = None
    layer.is_initialized = False


def touch(
    cache: object, layer_idx: int, *, every_key: bool = False, adapter: str = ""
) -> RoutedCacheLayer:
    """The routed layer of a cache, put in the place of the ordinary one on first touch; `adapter`
    is noted as the one that fills it.

    Raises:
        UnsupportedCallError: a cache whose layers cannot be routed (see check_layer).
    """
    layers: list[Any] = getattr(cache, "layers", [])
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    if isinstance(layer, RoutedCacheLayer) and layer.adapter == adapter:
        return layer  # as the door found it fit to be (check_cache)
    layer = check_layer(cache, layer_idx, every_key=every_key)
    routed = layer if isinstance(layer, RoutedCacheLayer) else RoutedCacheLayer(layer)
    routed.adapter = adapter
    cache.layers[layer_idx] = routed  # type: ignore[attr-defined]
    return routed


def check_cache(cache: object, layers: Mapping[int, bool], adapter: str = "") -> None:
    """Refuse a cache whose routed layers routing cannot serve, before anything is read from it.

    Args:
        layers: whether each of these layers has to hold the key of every token.
        adapter: the one that is to go on with the cache.

    Raises:
        UnsupportedCallError: paged, offloaded, quantised, static where only kept keys are held, no
            cache of transformers, or one that another adapter filled and left keys out of.
    """
    if cache is None:
        return
    for layer_idx, every_key in layers.items():
        check_layer(cache, layer_idx, every_key=every_key)
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, RoutedCacheLayer) and layer.is_bound and layer.adapter != adapter:
            raise UnsupportedCallError(
                f"this cache was filled under the adapter {layer.adapter!r}, by its decisions and "
                f"its policy for keys, and {adapter!r} cannot go on with it; start a new cache, or "
                f"set_adapter({layer.adapter!r})"
            )


def check_layer(cache: object, layer_idx: int, *, every_key: bool = False) -> Any:
    """The layer of a cache, or an error that says what to use instead."""
    if not isinstance(cache, Cache) or cache.offloading:
        kind = "an offloaded cache" if isinstance(cache, Cache) else f"a {type(cache).__name__}"
        raise UnsupportedCallError(
            f"routing cannot serve {kind}; use the default dynamic cache "
            f"(no cache_implementation, no continuous batching)"
        )
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    serving = layer.inner if isinstance(layer, RoutedCacheLayer) else layer
    if type(serving) not in GROWING and not (every_key and type(serving) in FIXED):
        why = 'kv="kept" leaves keys out, and a static layer has a place for each; '
        raise UnsupportedCallError(
            f"routing cannot serve a cache layer of type {type(serving).__name__} (layer "
            f"{layer_idx}); {why if type(serving) in FIXED else ''}"
            "use the default dynamic cache: leave cache_implementation unset, or pass "
            "DynamicCache(config=...)"
        )
    return layer


def real_columns(real_BC: Tensor | None, column_C: Tensor, batch: int) -> Tensor:
    """Which of some columns are real tokens in each row: (B, len(column_C))."""
    if real_BC is None:
        return torch.ones((batch, column_C.numel()), dtype=torch.bool, device=column_C.device)
    return real_BC[:, column_C]
