"""How the queries of one row attend to its keys: plainly causal, in blocks, or as one query.

The only place where that is chosen. What sets the choices was measured on a CPU (Zen 4, one thread,
bf16, 9 heads over 3 key heads of 64; benchmarks/results/attention-choices.json):

- A mask costs all pairs, hidden ones too. So queries that are exactly the keys' tokens take the
  kernel's own causal form, and others go in blocks that see only the keys up to their last one.
- Of large blocks there are fewer to begin. Among 4,096 keys they are faster too; among 2,048 they
  are up to 7 % slower in the kernel alone.
- With a window the keys of a long prompt go in two parts, the lasting ones causally and those of
  skipped tokens by themselves (window.py): by two threads 7 to 11 % faster among 4,096 keys, at
  most 5 % among 2,048, and slower among 512 (attention-choices-2-threads.json).
- A single query of grouped heads is put to its key head as so many rows. Kernels that are told of
  the groups (enable_gqa) read a key once a head.

Columns and what is visible are worked out on the host. Shapes: L queries and K keys of one row, H
heads, G key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from router_tuning.execution.visibility import additive
from router_tuning.execution.window import attend_in_two, tells_sums

LARGEST_HEAD = 256
"""Of the kernels of CUDA that are told of groups."""
BLOCK, LONG_BLOCK, LONG = 64, 256, 2048
"""Queries that share a mask, and how many do among so many keys or more."""
MANY = 700
"""Queries from which on a window's keys go apart."""
FEW = 64
"""Lasting keys beside the queries' own that may then ask along, for nothing."""


@dataclass(frozen=True)
class RowKeys:
    """Keys and values of one row (1, G, K, D) and what tells which query sees which."""

    key: Tensor
    value: Tensor
    column_K: Tensor | None = None
    """On the host; -1 at an empty slot. None where a single query sees all of them, and where the
    keys are exactly the queries' tokens.
    """
    lasting_K: Tensor | None = None
    """On the host: whether a key is visible beyond the window. None where all are."""


@dataclass(frozen=True)
class Reach:
    """How far back a query sees, in columns."""

    window: int
    """Skipped tokens (kv_window)."""
    sliding: int | None
    """Any token, by the model's own design; None for all."""

    def sees(self, query_L: Tensor, keys: RowKeys, of_K: Tensor) -> Tensor:
        """Whether each query sees each of some keys: (L, K)."""
        assert keys.column_K is not None
        query_L1, key_K = query_L[:, None], keys.column_K[of_K]
        seen = (key_K >= 0) & (key_K <= query_L1)
        if self.sliding is not None:
            seen &= key_K > query_L1 - self.sliding
        if keys.lasting_K is not None:
            seen &= keys.lasting_K[of_K] | (key_K > query_L1 - self.window)
        return seen

    def may_see(self, first: int, last: int, keys: RowKeys) -> Tensor:
        """Indices of the keys that a query between two columns may see: (K',)."""
        key_K = keys.column_K
        assert key_K is not None
        seen_K = (key_K >= 0) & (key_K <= last)
        if self.sliding is not None:
            seen_K &= key_K > first - self.sliding
        if keys.lasting_K is not None:
            seen_K &= keys.lasting_K | (key_K > first - self.window)
        return seen_K.nonzero()[:, 0]


class Kernel:
    """What computes attention over given keys: SDPA, or a family's own eager function."""

    def __init__(
        self, eager: Callable[..., Any] | None, module: Any, kwargs: dict[str, Any]
    ) -> None:
        self.eager, self.module, self.kwargs = eager, module, kwargs

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask_LK: Tensor | None) -> Tensor:
        """(1, H, L, D) -> (1, L, H, D). Without a mask: causal over the same tokens, or one query
        that sees all.
        """
        if self.eager is None:
            return self._sdpa(query, key, value, mask_LK).transpose(1, 2)
        if mask_LK is None:
            mask_LK = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(
                key.shape[2] - query.shape[2]
            )
        mask = additive(mask_LK.to(query.device), query.dtype)[None, None]
        output: Tensor = self.eager(self.module, query, key, value, mask, **self.kwargs)[0]
        return output

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask_LK: Tensor | None) -> Tensor:
        heads, length = query.shape[1:3]
        groups = heads // key.shape[1]
        mask = None if mask_LK is None else mask_LK.to(query.device)[None, None]
        options = {
            "scale": self.kwargs.get("scaling"),
            "dropout_p": self.kwargs.get("dropout", 0.0),
        }
        if length == 1 and groups > 1:
            query = query.unflatten(1, (key.shape[1], groups))[:, :, :, 0]
            output = scaled_dot_product_attention(query, key, value, mask, **options)
            return output.flatten(1, 2)[:, :, None]
        told = mask is None and key.shape[-1] == value.shape[-1] <= LARGEST_HEAD
        if groups > 1 and query.is_cuda and not told:
            # Only a kernel that takes neither masks nor large heads is told of groups there.
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            groups = 1
        causal = mask is None and length > 1
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, enable_gqa=groups > 1, **options
        )


def attend(kernel: Kernel, query: Tensor, column_L: Tensor, keys: RowKeys, reach: Reach) -> Tensor:
    """What the queries (1, H, L, D) of a row at these columns read: (1, L, H, D)."""
    if keys.column_K is None:
        return kernel(query, keys.key, keys.value, None)
    if _goes_in_two(kernel, query, column_L, keys, reach):
        return _in_two(kernel, query, column_L, keys, reach)
    first = _first_of_a_stretch(keys)
    size = BLOCK if len(keys.column_K) < LONG else LONG_BLOCK
    parts = [
        _block(kernel, query_b, column_b, keys, reach)
        if first is None
        else _block_of_a_stretch(kernel, query_b, column_b, keys, first, reach)
        for query_b, column_b in zip(query.split(size, 2), column_L.split(size), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _goes_in_two(
    kernel: Kernel, query: Tensor, column_L: Tensor, keys: RowKeys, reach: Reach
) -> bool:
    """Whether the queries are many, and nearly all lasting keys their own, in order and in reach:
    a prompt from its start.
    """
    column_K = keys.column_K
    assert column_K is not None
    if keys.lasting_K is None or len(column_L) < MANY or kernel.eager is not None:
        return False
    others = int(keys.lasting_K.sum()) - len(column_L)
    first, last = int(column_K[0]), int(column_K[-1])
    in_reach = reach.sliding is None or last - first < reach.sliding
    ordered = first >= 0 and bool((column_K[1:] > column_K[:-1]).all())
    dropout = kernel.kwargs.get("dropout", 0.0)
    served = not dropout and tells_sums(query, keys.key, keys.value)
    return others < FEW and in_reach and ordered and served


def _in_two(kernel: Kernel, query: Tensor, column_L: Tensor, keys: RowKeys, reach: Reach) -> Tensor:
    column_K, lasting_K, scale = keys.column_K, keys.lasting_K, kernel.kwargs.get("scaling")
    assert column_K is not None
    assert lasting_K is not None
    return attend_in_two(
        query, column_L, keys.key, keys.value, column_K, lasting_K, reach.window, scale
    )


def _first_of_a_stretch(keys: RowKeys) -> int | None:
    """The first column where the keys are those of a stretch of columns, none left out or hidden;
    else None.
    """
    column_K = keys.column_K
    assert column_K is not None
    first = int(column_K[0])
    if first < 0 or keys.lasting_K is not None:
        return None
    stretch_K = torch.arange(first, first + len(column_K))  # pads in the middle are none
    return first if torch.equal(column_K, stretch_K) else None


def _block_of_a_stretch(
    kernel: Kernel, query: Tensor, column_L: Tensor, keys: RowKeys, first: int, reach: Reach
) -> Tensor:
    """The same as `_block`, where what a query sees follows from its column, so that no key has
    to be asked: with kv="all" there are many blocks.
    """
    sliding = reach.sliding
    low, end = int(column_L[0]), int(column_L[-1]) + 1 - first
    begin = 0 if sliding is None else max(low - sliding + 1 - first, 0)
    some = slice(begin, end)
    seen_LK = None
    if len(column_L) > 1:
        assert keys.column_K is not None
        query_L1, key_K = column_L[:, None], keys.column_K[some]
        seen_LK = key_K <= query_L1
        if sliding is not None:
            seen_LK &= key_K > query_L1 - sliding
    return kernel(query, keys.key[:, :, some], keys.value[:, :, some], seen_LK)


def _block(kernel: Kernel, query: Tensor, column_L: Tensor, keys: RowKeys, reach: Reach) -> Tensor:
    """Attend to those keys only that one of the queries may see."""
    of_K = reach.may_see(int(column_L[0]), int(column_L[-1]), keys)
    first, end = int(of_K[0]), int(of_K[-1]) + 1
    if len(column_L) == 1 and end - first <= 2 * len(of_K):
        # A query reads hidden keys in less time than a copy of the others takes.
        of_K = torch.arange(first, end)
    seen_LK: Tensor | None = reach.sees(column_L, keys, of_K)
    if len(column_L) == 1 and bool(seen_LK.all()):  # type: ignore[union-attr]
        seen_LK = None
    key, value = _some(keys.key, of_K), _some(keys.value, of_K)
    return kernel(query, key, value, seen_LK)


def _some(x: Tensor, of_K: Tensor) -> Tensor:
    """Some slots of (1, G, K, D): a view where they lie side by side."""
    first, number = int(of_K[0]), len(of_K)
    if int(of_K[-1]) - first + 1 == number:
        return x[:, :, first : first + number]
    return x.index_select(2, of_K.to(x.device))
