"""Places of tokens in a forward, as lists: where the kept ones stand, or those whose keys are made.

Which tokens these are is worked out on the host, so that a decision is brought there once and never
asked for again.

Shapes: B batch, T tokens of this forward, N chosen tokens, S segments (rows, or the packed texts of
rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Some tokens of a forward, in order of row and column; row and token lie on the host."""

    row_N: Tensor
    token_N: Tensor
    size: tuple[int, int]
    """B and T."""
    device: torch.device
    """Of the forward."""

    @classmethod
    def where(cls, mask_BT: Tensor, device: torch.device) -> Places:
        """The tokens where a mask on the host is True."""
        row_N, token_N = mask_BT.nonzero(as_tuple=True)
        return cls(row_N, token_N, (mask_BT.shape[0], mask_BT.shape[1]), device)

    def __len__(self) -> int:
        return self.row_N.numel()

    @cached_property
    def there(self) -> tuple[Tensor, Tensor]:
        """Row and token on the forward's device."""
        return self.row_N.to(self.device), self.token_N.to(self.device)

    @cached_property
    def row_counts(self) -> list[int]:
        """How many of the tokens each row has."""
        if self.size[0] == 1:
            return [len(self)]
        counts: list[int] = torch.bincount(self.row_N, minlength=self.size[0]).tolist()
        return counts

    @cached_property
    def _index_N(self) -> Tensor:
        """Of each token among all tokens of the forward, on its device."""
        return (self.row_N * self.size[1] + self.token_N).to(self.device)

    @cached_property
    def _slot_P(self) -> Tensor:
        """For each place in the forward the slot of its token, N where there is none."""
        slot_P = torch.full((self.size[0] * self.size[1],), len(self))
        slot_P[self.row_N * self.size[1] + self.token_N] = torch.arange(len(self))
        return slot_P.to(self.device)

    def pick(self, x_BT: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...); a first dimension of 1 stands for all rows.

        One index into rows of memory: on a CPU two indices take longer.
        """
        index_N = self._index_N if x_BT.shape[0] == self.size[0] else self.there[1]
        return x_BT.flatten(0, 1).index_select(0, index_N)

    def flat(self, x_BT: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...), as one row."""
        return self.pick(x_BT)[None]

    def put(self, x_N: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), zero where there is none. By the same kind of index."""
        if len(self) == self.size[0] * self.size[1]:  # in order, so there is nothing to move
            return x_N.unflatten(0, self.size)
        padded = torch.cat([x_N, x_N.new_zeros((1, *x_N.shape[1:]))])
        return padded.index_select(0, self._slot_P).unflatten(0, self.size)

    def pack(self, x_N: Tensor, fill: float = 0) -> Tensor:
        """(N, ...) -> (B, longest, ...), each row's side by side, `fill` behind shorter ones."""
        counts_B = torch.tensor(self.row_counts)
        first_B = counts_B.cumsum(0) - counts_B
        slot_N = torch.arange(len(self)) - first_B[self.row_N]
        out = x_N.new_full((self.size[0], int(counts_B.max()), *x_N.shape[1:]), fill)
        out[self.there[0], slot_N.to(self.device)] = x_N
        return out


@dataclass(frozen=True)
class MadeKeys:
    """Keys and values that a forward has made: (N, H, D) each, at their places."""

    places: Places
    key_NHD: Tensor
    value_NHD: Tensor

    def joined(self, other: MadeKeys | None) -> MadeKeys:
        """Both together, in order of row and column; no place is in both."""
        if other is None:
            return self
        row_N, token_N = (
            torch.cat([getattr(self.places, name), getattr(other.places, name)])
            for name in ("row_N", "token_N")
        )
        order_N = (row_N * self.places.size[1] + token_N).argsort()
        places = Places(row_N[order_N], token_N[order_N], self.places.size, self.places.device)
        there_N = order_N.to(self.places.device)
        key_NHD = torch.cat([self.key_NHD, other.key_NHD]).index_select(0, there_N)
        value_NHD = torch.cat([self.value_NHD, other.value_NHD]).index_select(0, there_N)
        return MadeKeys(places, key_NHD, value_NHD)
