"""Attention in training that tells each token's decision what the token's key is worth.

With kv="kept" a decision is also whether later tokens see this one's key (decision 0011). Let key j
have the weight k_j before the softmax of query i; then d out_i / d k_j = w_ij (v_j - out_i), where
w_ij is the part that the key has in the softmax. A skipped key has none. It gets the one it would
have if it alone were shown beside the kept ones; then w_ij (v_j - out_i) is just what the output
would change by.

The forward pass is the family's own attention function, whatever it is; the backward pass here is
that of any softmax attention, worked out in blocks of queries from what went in, so that no
probabilities are stored.

Shapes: B batch, T tokens, H heads, G key heads, R query heads of a key head, L queries of a block,
K keys up to its last one, D head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from router_tuning.execution.visibility import additive

BLOCK = 128
"""Queries whose probabilities are held at a time in the backward pass."""


@dataclass(frozen=True)
class KeyWeights:
    """Which key each query sees, and which of these pairs are a decision's doing."""

    gate_BT: Tensor
    """Zeros whose gradient is that of each token's decision."""
    shown: Tensor
    """bool (B, 1, T, T), causal."""
    decided: Tensor
    """bool (B or 1, 1, T, T): pairs in sight that the key's decision shows or hides."""

    def mask(self, dtype: torch.dtype) -> Tensor:
        """The mask to add to scores, with the logarithms of kept keys' weights (zeros): gradients
        reach what is shown alone. For attentions that no other function can stand in for.
        """
        return additive(self.shown, dtype) + (self.gate_BT[:, None, None] * self.decided).to(dtype)


class WeighedRun:
    """One call of a unit whose attention tells what keys are worth."""

    def __init__(self, attention: nn.Module, weights: KeyWeights) -> None:
        self.attention, self.weights = attention, weights

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """(B, H, T, D) -> (B, T, H, D), under the mask of `weights`."""
        attend = self._own(query.dtype, kwargs)
        if kwargs.get("dropout") or kwargs.get("position_bias") is not None:
            # What the backward pass would have to know of is gone, or not known here.
            return attend(query, key, value, self.weights.mask(query.dtype))
        scores = _Scores(
            kwargs.get("scaling") or query.shape[-1] ** -0.5,
            kwargs.get("softcap"),
            kwargs.get("s_aux"),
        )
        output: Tensor = _Weighed.apply(  # type: ignore[no-untyped-call]
            query, key, value, self.weights.gate_BT, self.weights, scores, attend
        )
        return output

    def _own(self, dtype: torch.dtype, kwargs: dict[str, Any]) -> Callable[..., Tensor]:
        """The attention function that the model asks for; its mask is that of `weights`."""
        asked = self.attention.config._attn_implementation  # type: ignore[union-attr]
        shown = self.weights.shown
        if asked == "eager":
            function = sys.modules[type(self.attention).__module__].eager_attention_forward
            shown = additive(shown, dtype)
        else:
            function = ALL_ATTENTION_FUNCTIONS[asked]

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor = shown) -> Tensor:
            output: Tensor = function(self.attention, query, key, value, mask, **kwargs)[0]
            return output

        return attend


@dataclass(frozen=True)
class _Scores:
    """How scores come from queries and keys."""

    scaling: float
    cap: float | None
    sink_H: Tensor | None
    """Logits of what a query may attend to beside its keys."""

    def of(self, query_q: Tensor, key_k: Tensor) -> Tensor:
        """(B, G, R, L, D), (B, G, K, D) -> (B, G, R, L, K), in float32 at least."""
        flat = query_q.flatten(2, 3) @ key_k.transpose(-1, -2)
        score = _wide(flat).unflatten(2, query_q.shape[2:4]) * self.scaling
        return score if self.cap is None else torch.tanh(score / self.cap) * self.cap

    def total(self, shown_score: Tensor) -> Tensor:
        """The logarithm of the softmax's denominator: (B, G, R, L, 1)."""
        total = shown_score.logsumexp(-1, keepdim=True)
        if self.sink_H is None:
            return total
        sink = _wide(self.sink_H.detach()).view(1, *shown_score.shape[1:3], 1, 1)
        return torch.logaddexp(total, sink)

    def slope(self, score: Tensor) -> Tensor | float:
        """Of a score by the product of query and key."""
        if self.cap is None:
            return self.scaling
        return self.scaling * (1 - (score / self.cap).square())


class _Weighed(torch.autograd.Function):
    """Attention whose backward pass also gives the gradients of the keys' weights."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate_BT: Tensor,
        weights: KeyWeights,
        scores: _Scores,
        attend: Callable[..., Tensor],
    ) -> Tensor:
        output_BTHD = attend(query, key, value)
        ctx.save_for_backward(query, key, value, output_BTHD)
        ctx.weights, ctx.scores = weights, scores
        return output_BTHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output_BTHD = ctx.saved_tensors
        gate_BT = ctx.weights.gate_BT
        query_q, output_q, grad_q = (
            x.unflatten(1, (key.shape[1], -1))
            for x in (query, output_BTHD.transpose(1, 2), grads[0].transpose(1, 2))
        )
        into_query, into_gate_BT = torch.empty_like(query_q), _wide(torch.zeros_like(gate_BT))
        into_key, into_value = torch.zeros_like(key), torch.zeros_like(value)
        for begin in range(0, query.shape[2], BLOCK):
            end = min(begin + BLOCK, query.shape[2])
            some, seen = slice(begin, end), slice(end)  # no query sees a later key
            block = _Block(
                *(x[:, :, :, some] for x in (query_q, output_q, grad_q)),
                *(x[:, :, seen] for x in (key, value)),
                *(x[:, 0, some, seen] for x in (ctx.weights.shown, ctx.weights.decided)),
            )
            gradients = block.gradients(ctx.scores)
            into_query[:, :, :, some] = gradients[0]
            into_key[:, :, seen] += gradients[1]
            into_value[:, :, seen] += gradients[2]
            into_gate_BT[:, seen] += gradients[3]
        into_query, into_gate_BT = into_query.flatten(1, 2), into_gate_BT.to(gate_BT.dtype)
        return into_query, into_key, into_value, into_gate_BT, None, None, None


@dataclass(frozen=True)
class _Block:
    """Some queries, what they attended to and got, and the gradient of that."""

    query_q: Tensor
    output_q: Tensor
    grad_q: Tensor
    """(B, G, R, L, D)."""
    key_k: Tensor
    value_k: Tensor
    """(B, G, K, D)."""
    shown_BLK: Tensor
    decided_BLK: Tensor

    def gradients(self, scores: _Scores) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of the queries, keys, values, and keys' weights."""
        heads, hidden = self.query_q.shape[2:4], ~self.shown_BLK[:, None, None]
        score = scores.of(self.query_q, self.key_k)
        part = score - scores.total(score.masked_fill(hidden, float("-inf")))
        # Of a hidden key: as if it alone were shown beside the others.
        part = torch.where(hidden, part.sigmoid(), part.exp())
        got = _wide(self.grad_q * self.output_q).sum(-1, keepdim=True)
        would_get = self.grad_q.flatten(2, 3) @ self.value_k.transpose(-1, -2)
        worth = part * (_wide(would_get).unflatten(2, heads) - got)
        into_weight_BK = (worth.sum((1, 2)) * self.decided_BLK).sum(1)
        flow = (worth * scores.slope(score)).masked_fill_(hidden, 0)
        flow = flow.to(self.query_q.dtype).flatten(2, 3)
        part = part.masked_fill_(hidden, 0).to(self.value_k.dtype).flatten(2, 3)
        return (
            (flow @ self.key_k).unflatten(2, heads),
            flow.transpose(-1, -2) @ self.query_q.flatten(2, 3),
            part.transpose(-1, -2) @ self.grad_q.flatten(2, 3),
            into_weight_BK,
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
