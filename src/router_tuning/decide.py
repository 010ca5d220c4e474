"""From logits to decisions: threshold, straight-through gradient, pooling. Pure functions.

A unit runs for a token where `always | (logit >= threshold)`. Token granularities use each token's
own logit; sequence granularities let the mean logit of a sequence's first tokens stand for all
later ones, or that of its prompt for all tokens.

Shapes: B batch, T tokens of this forward, S packed sequences of a row, N prompt tokens of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """What decides for each token: its logit, and whether it runs in any case."""

    logits_BT: Tensor
    always_BT: Tensor | None = None

    def keep(self, threshold_B1: Tensor) -> Tensor:
        """True where the unit runs: (B, T)."""
        keep_BT = self.logits_BT >= threshold_B1
        return keep_BT if self.always_BT is None else keep_BT | self.always_BT

    def straight_through(self, threshold_B1: Tensor) -> Tensor:
        """1.0 where the unit runs, else 0.0; its gradient is that of sigmoid(logit - threshold):
        (B, T).

        A threshold of -inf (budget 1) has no finite sigmoid argument, so the gradient uses the bare
        logit.
        """
        hard_BT = self.keep(threshold_B1).to(self.logits_BT.dtype)
        soft_BT = torch.sigmoid(self.logits_BT - threshold_B1.clamp(min=-1e4))
        if self.always_BT is not None:
            soft_BT = soft_BT.masked_fill(self.always_BT, 1.0)
        # The brackets keep the value exactly 0 or 1: an attached model must stay neutral to the
        # bit.
        return hard_BT + (soft_BT - soft_BT.detach())


@dataclass(frozen=True)
class PrefixSums:
    """Sum and number of the prefix logits that earlier forwards of the same sequences have seen:
    (B,).
    """

    sum_B: Tensor
    count_B: Tensor


def pool_prefix(
    logits_BT: Tensor,
    position_BT: Tensor,
    real_BT: Tensor,
    decide_after: int,
    past: PrefixSums | None = None,
    sequence_BT: Tensor | None = None,
) -> Decision:
    """Let the mean logit of each sequence's first `decide_after` real tokens decide for its later
    tokens.

    Args:
        logits_BT: the router's logits.
        position_BT: index of each token among the real tokens of its sequence (earlier forwards
            included).
        real_BT: False at padding.
        decide_after: how many tokens always run.
        past: prefix logits of earlier forwards, from the cache.
        sequence_BT: index of the packed sequence each token belongs to; None where a row is one
            sequence.
    """
    prefix_BT = real_BT & (position_BT < decide_after)
    group_BT = torch.zeros_like(position_BT) if sequence_BT is None else sequence_BT
    shape = (logits_BT.shape[0], int(group_BT.max()) + 1 if sequence_BT is not None else 1)
    prefix_logits_BT = logits_BT.masked_fill(~prefix_BT, 0)
    sum_BS = logits_BT.new_zeros(shape).scatter_add(1, group_BT, prefix_logits_BT)
    count_BS = logits_BT.new_zeros(shape).scatter_add(1, group_BT, prefix_BT.to(logits_BT.dtype))
    if past is not None:
        sum_BS = sum_BS + past.sum_B[:, None]
        count_BS = count_BS + past.count_B[:, None].to(count_BS.dtype)
    mean_BS = sum_BS / count_BS.clamp(min=1)
    # A sequence that the dense model began has no logits to go by, and runs on as it began.
    unseen_BT = (count_BS == 0).gather(1, group_BT)
    return Decision(mean_BS.gather(1, group_BT), prefix_BT | unseen_BT)


def pool_prompt(logits_N: Tensor, prompt_BT: Tensor) -> Tensor:
    """The mean logit of each row's prompt: (B,).

    Args:
        logits_N: the router's logits of the prompts' tokens, in order of row and token.
        prompt_BT: True at these tokens; at least one a row.
    """
    logits_BT = logits_N.new_zeros(prompt_BT.shape).masked_scatter(prompt_BT, logits_N)
    return logits_BT.sum(1) / prompt_BT.sum(1)
