"""A long prompt's attention under `kv_window`, in two parts: plainly causal over the keys that
last, and over the few skipped tokens' keys that lie in a query's window.

One call over all of these needs masks, whose hidden pairs cost what visible ones do. Each part has
its own softmax; the logarithms of their sums say what share each has of the whole, as where flash
attention goes from one block of keys to the next (Dao et al., 2022, section 3.1).

Columns and what is visible are worked out on the host. Shapes: L queries and K keys of one row, H
heads, G key heads, R query heads of each, D head dimension; N blocks of Q queries, each beside P
skipped tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 32
"""Queries that share a stretch of skipped tokens."""
NEVER = torch.iinfo(torch.int64).max
"""A column that no query reaches."""


def tells_sums(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel that tells the logarithms of its sums, and no gradient is asked
    for: torch's public function tells none, of its kernels only the CPU's was tried. Autocast does
    not know it.
    """
    parts = query, key, value
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in parts)
    alike = key.shape[-1] == value.shape[-1] and len({x.dtype for x in parts}) == 1
    plain = query.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and alike and not wanted and _flash_tells_sums()


@functools.cache
def _flash_tells_sums() -> bool:
    """Whether this torch has the CPU's kernel, for grouped heads too. It is not public."""
    query = torch.zeros(1, 4, 2, 8)
    value = torch.tensor([1.0, 3.0])[None, :, None, None].expand(1, 2, 2, 8)  # of two groups
    try:
        output, sums = _flash(query, value, value, None)
        of_heads = output[0, :, 1, 0].tolist() == [1.0, 1.0, 3.0, 3.0]
        return of_heads and bool((sums[0, :, 1] - math.log(2)).abs().max() < 1e-6)
    except (AttributeError, RuntimeError):
        return False


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """What causal queries read (1, H, L, D), and the logarithms of their sums (1, H, L)."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, sums = kernel(query, key, value, is_causal=True, scale=scale)
    return output, sums


def attend_in_two(
    query: Tensor,
    column_L: Tensor,
    key: Tensor,
    value: Tensor,
    column_K: Tensor,
    lasting_K: Tensor,
    window: int,
    scale: float | None,
) -> Tensor:
    """What the queries (1, H, L, D) read of keys (1, G, K, D), of which the lasting ones are
    their own and some of tokens that do not ask (the sink): (1, L, H, D).
    """
    own_K = lasting_K.nonzero()[:, 0]
    output, sums = _causal(
        query, column_L, _at(key, own_K), _at(value, own_K), column_K[own_K], scale
    )
    skipped_K = (~lasting_K).nonzero()[:, 0]
    near = _Near.of(column_L, column_K[skipped_K], window)
    if near is None:
        return output.transpose(1, 2)
    slot_NP = skipped_K[near.index_NP]
    passing, passing_sums = near.read(query, _at(key, slot_NP), _at(value, slot_NP), scale)
    share = torch.sigmoid(passing_sums - sums)[..., None].to(output.dtype)
    return output.lerp(passing, share.expand_as(output)).transpose(1, 2)


def _at(x: Tensor, slots: Tensor) -> Tensor:
    """Some slots of (1, G, K, D): (1, G, *slots, D)."""
    return x.index_select(2, slots.flatten().to(x.device)).unflatten(2, slots.shape)


def _causal(
    query: Tensor,
    column_L: Tensor,
    key: Tensor,
    value: Tensor,
    column_K: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Each query over the keys up to its own: (1, H, L, D), and the logarithms of the sums
    (1, H, L). Tokens that do not ask stand in with a query of zeros.
    """
    place_L = None
    if len(column_K) > len(column_L):
        place_L = torch.searchsorted(column_K, column_L).to(query.device)
        query = query.new_zeros((*query.shape[:2], len(column_K), query.shape[3])).index_copy(
            2, place_L, query
        )
    output, sums = _flash(query, key, value, scale)
    if place_L is not None:
        output, sums = output.index_select(2, place_L), sums.index_select(2, place_L)
    return output, sums


def _in_a_window(column_L: Tensor, skipped_K: Tensor, window: int) -> Tensor:
    """Indices of the skipped tokens that a query sees: of a long stretch only the end."""
    behind_K = torch.searchsorted(column_L, skipped_K).clamp(max=len(column_L) - 1)
    away_K = column_L[behind_K] - skipped_K  # the first query behind a token
    return ((away_K >= 0) & (away_K < window)).nonzero()[:, 0]


@dataclass(frozen=True)
class _Near:
    """Which skipped tokens the blocks of queries lie beside, and which of these each query sees."""

    index_NP: Tensor
    """Among the skipped tokens."""
    seen_NQP: Tensor
    length: int
    """L."""

    @classmethod
    def of(cls, column_L: Tensor, skipped_K: Tensor, window: int) -> _Near | None:
        """For queries at these columns; None where none sees a skipped token."""
        near_K = _in_a_window(column_L, skipped_K, window)
        if not len(near_K):
            return None
        skipped_K = skipped_K[near_K]
        filling = -len(column_L) % BLOCK
        column_NQ = torch.cat([column_L, column_L[-1:].expand(filling)]).view(-1, BLOCK)
        first_N = torch.searchsorted(skipped_K, column_NQ[:, 0] - window, right=True)
        end_N = torch.searchsorted(skipped_K, column_NQ[:, -1].contiguous())
        most = int((end_N - first_N).max())
        index_NP = first_N[:, None] + torch.arange(most)
        beyond_NP = index_NP >= end_N[:, None]
        index_NP = index_NP.clamp(max=len(skipped_K) - 1)
        near_NP = skipped_K[index_NP].masked_fill(beyond_NP, NEVER)
        index_NP = near_K[index_NP]
        away_NQP = column_NQ[:, :, None] - near_NP[:, None]
        return cls(index_NP, (away_NQP >= 0) & (away_NQP < window), len(column_L))

    def read(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Of keys (1, G, N, P, D) what the queries (1, H, L, D) see: (1, H, L, D), and the
        logarithms of the sums (1, H, L), the lowest number where a query sees none.
        """
        heads, groups = query.shape[1], key.shape[1]
        number = len(self.index_NP)
        filled = pad(query[0], (0, 0, 0, number * BLOCK - self.length))
        query_GNRQD = filled.view(groups, heads // groups, number, BLOCK, -1).transpose(1, 2)
        scaled = query_GNRQD.flatten(2, 3).float() * (scale or query.shape[-1] ** -0.5)
        scores = scaled @ key[0].float().transpose(-1, -2)
        hidden_NQP = ~self.seen_NQP.to(query.device)
        rows = scores.unflatten(2, (-1, BLOCK)).masked_fill_(
            hidden_NQP[:, None], torch.finfo(torch.float32).min
        )
        top = rows.amax(-1, keepdim=True)
        weights = rows.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        sums = (top + total.log())[..., 0]
        weights = weights.div_(total).to(value.dtype)
        read = (weights.flatten(2, 3) @ value[0]).unflatten(2, (-1, BLOCK))
        back, back_sums = (x.transpose(1, 2).flatten(2, 3).flatten(0, 1) for x in (read, sums))
        return back[None, :, : self.length], back_sums[None, :, : self.length]
