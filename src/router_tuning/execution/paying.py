"""Where leaving queries out takes longer than making them, so that an attention runs whole.

With kv="all" only queries are saved, and they are saved at a price: kept ones attend in blocks
under masks, and keys of kept and skipped tokens are made apart and put together again. Where few
are skipped, the dense call is faster; what it gives for skipped tokens is thrown away. Keys are
made for all tokens either way, so nothing else changes.

The only place where that is chosen. Measured on a CPU (Zen 4, two threads, bf16, SmolLM2-135M):
at 256 tokens not even skipping half of them paid, at 512 and 1,024 skipping a little more than 0.3,
at 2,048 skipping 0.2 or 0.3 (decision 0014; benchmarks/results/paying.json, whose times vary by
some per cent). Single tokens are left out of it: there a dense call attends for all rows.
"""

from __future__ import annotations

from router_tuning.execution.call import Decided
from router_tuning.execution.context import ForwardContext
from router_tuning.units import Unit

LEAST_SHARE = 0.25
"""Of a row's tokens that have to be skipped, in long rows."""
LEAST_TOKENS = 64
"""That have to be skipped in a row beside those, for what blocks and gathering cost at any length.
"""


def runs_whole(decided: Decided, unit: Unit, context: ForwardContext) -> bool:
    """Whether an attention is to run on all tokens of a forward, though some are skipped."""
    if context.config.kv != "all" or unit.kind != "attn" or not context.may_run_whole:
        return False
    if unit.kind in context.sequence_kinds:  # whole rows are skipped, which needs no masks
        return False
    rows, length = decided.keep_BT.shape
    skipped = rows * length - decided.num_kept  # padding too: a dense call computes it
    least = rows * (LEAST_SHARE * length + LEAST_TOKENS)
    return length > 1 and decided.num_kept > 0 and skipped < least
