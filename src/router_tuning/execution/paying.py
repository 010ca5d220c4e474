"""Where leaving tokens out takes longer than computing them, so that an attention runs whole.

With kv="all" only queries are saved, and they are saved at a price: kept ones attend in blocks
under masks, and keys of kept and skipped tokens are made apart and put together again. Where few
are skipped, the dense call is faster; what it gives for skipped tokens is thrown away. Keys are
made for all tokens either way, so nothing else changes.

With kv="kept" and a window, keys of skipped tokens are made apart too, and blocks need masks. In
short prompts one call on all tokens, under a mask over all pairs, is faster. Without a window
skipped keys are not made, kept tokens are plainly causal, and that call gains next to nothing.

The only place where that is chosen. Measured with SmolLM2-135M in bf16 by two threads, under random
masks, whose times vary by some per cent (decision 0014):

- A CPU without AMX (Zen 4; benchmarks/results/paying.json): at 256 tokens not even skipping half
  of them paid, at 512 and 1,024 skipping a little more than 0.3, at 2,048 skipping 0.2 or 0.3.
- A CPU with AMX (benchmarks/results/paying-amx.json): the dense call in bf16 takes a fraction of
  that time, and masks and gathering do not. At 512 not even skipping 0.8 paid, at 1,024 and 2,048
  skipping a little more than 0.6, at 4,096 half.
- Kept keys with a window, without AMX (benchmarks/results/paying-kept-window.json): at 256 tokens
  not even skipping 0.3 paid, at 512 skipping 0.2, by one row and by four.

Single tokens are left out of it: there a dense call attends for all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from router_tuning.execution.call import Decided
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.flat import can_run_flat
from router_tuning.processor import has_amx
from router_tuning.units import Unit

LEAST_SHARE, LEAST_SHARE_AMX = 0.25, 0.45
"""Of a row's tokens that have to be skipped, in long rows."""
LEAST_TOKENS, LEAST_TOKENS_AMX = 64, 256
"""That have to be skipped in a row beside those, for what blocks and gathering cost at any length.
"""
LEAST_PAIRS, LEAST_SHARE_WINDOW, LONGEST = 40_000, 0.4, 512
"""With a window: pairs of a skipped token and another that a row has to leave out, or this share of
its tokens, and from which length on it need not, since the mask is over all pairs.
"""


def runs_whole(
    attention: nn.Module, decided: Decided, x_BTD: Tensor, unit: Unit, context: ForwardContext
) -> bool:
    """Whether an attention is to run on all tokens of a forward, though some are skipped."""
    if unit.kind != "attn" or not context.may_run_whole:
        return False
    if unit.kind in context.sequence_kinds:  # whole rows are skipped, which needs no masks
        return False
    rows, length = decided.keep_BT.shape
    if length == 1 or not decided.num_kept:
        return False
    skipped = rows * length - decided.num_kept  # padding too: a dense call computes it
    if context.config.kv == "kept":
        least = rows * min(LEAST_PAIRS / length, LEAST_SHARE_WINDOW * length)
        few = skipped < least and length <= LONGEST
        return few and bool(context.config.kv_window) and _may_hide_keys(attention, context)
    share, tokens = _least(x_BTD)
    return skipped < rows * (share * length + tokens)


def _may_hide_keys(attention: nn.Module, context: ForwardContext) -> bool:
    """Whether one mask over all pairs of a forward can say which keys are seen."""
    implementation = attention.config._attn_implementation  # type: ignore[union-attr]
    maskable = implementation in ("sdpa", "eager") and can_run_flat(attention, context)
    return maskable and not context.start


def _least(x_BTD: Tensor) -> tuple[float, int]:
    if x_BTD.device.type == "cpu" and x_BTD.dtype == torch.bfloat16 and has_amx():
        return LEAST_SHARE_AMX, LEAST_TOKENS_AMX
    return LEAST_SHARE, LEAST_TOKENS
