"""Which key a query may see, in columns (token indices in the cache, pads included). Pure
functions.

Shapes: B batch, Q queries, K keys, T tokens of this forward. A column of -1 marks an empty slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.context import ForwardContext


def causal(query_BQ: Tensor, key_BK: Tensor, sliding: int | None) -> Tensor:
    """Keys that exist, are not later than the query, and lie in the sliding window: (B, Q, K)."""
    query, key = query_BQ[:, :, None], key_BK[:, None, :]
    seen = (key >= 0) & (key <= query)
    return seen if sliding is None else seen & (key > query - sliding)


def recent(query_BQ: Tensor, key_BK: Tensor, window: int) -> Tensor:
    """Keys among the latest `window` columns of the query, itself included: (B, Q, K)."""
    return query_BQ[:, :, None] - key_BK[:, None, :] < window


def sliding_window_of(attention: Any) -> int | None:
    """How many latest columns an attention sees by the model's own design; None where it sees all.

    Layer types say which layers slide, where a config has them: some attentions keep the number
    though they do not slide. Most families have it on the attention, others in the config only.
    """
    types = getattr(attention.config, "layer_types", None)
    if types is not None and types[attention.layer_idx] != "sliding_attention":
        return None
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


def permanent(keep_BT: Tensor, context: ForwardContext) -> Tensor:
    """Tokens of this forward whose keys stay visible: the kept and the sink ones (B, T)."""
    if not context.config.kv_sink:
        return keep_BT
    return keep_BT | (context.real_BT & (context.position_BT < context.config.kv_sink))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as eager attention adds it to its scores: 0 where True, else the lowest number."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def allowed_keys(attention: nn.Module, mask: Any, context: ForwardContext) -> Tensor:
    """What an attention's own mask shows over an empty cache, as bool: (B or 1, 1, T, T)."""
    if mask is None:
        column_1T = context.column_T[None]
        return causal(column_1T, column_1T, sliding_window_of(attention))[:, None]
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnsupportedCallError(
            f"expected a 4-D attention mask from the model, got {type(mask).__name__}; "
            f'load the model with attn_implementation="sdpa" or "eager"'
        )
    return mask if mask.dtype == torch.bool else mask >= 0


def kept_keys(allowed: Tensor, keep_BT: Tensor, context: ForwardContext) -> Tensor:
    """The same without the keys of skipped tokens: (B, 1, T, T)."""
    return shown_keys(allowed, near_keys(allowed, context), keep_BT, context)


def shown_keys(allowed: Tensor, near: Tensor, keep_BT: Tensor, context: ForwardContext) -> Tensor:
    """The same where the near keys are known."""
    return near | allowed & permanent(keep_BT, context)[:, None, None]


def near_keys(allowed: Tensor, context: ForwardContext) -> Tensor:
    """What of it shows whatever is decided, the window and a token's own key: (B or 1, 1, T, T).
    A skipped query before any kept key would else see nothing and give NaN; its own key is
    harmless, since nobody reads what it gives.
    """
    column_1T = context.column_T[None]
    near = recent(column_1T, column_1T, context.config.kv_window)[:, None]
    diagonal = torch.eye(near.shape[-1], dtype=torch.bool, device=near.device)
    return allowed & near | diagonal


def check_packed(mask: Any, context: ForwardContext) -> None:
    """Refuse packed texts that a model's own mask (B or 1, h, T, K) does not tell apart. Without a
    mask, flash attention goes by positions, and the others by nothing.
    """
    if context.sequence_BT is None:
        return
    if isinstance(mask, Tensor) and mask.ndim == 4:
        visible = mask if mask.dtype == torch.bool else mask >= 0
        across_BTT = context.sequence_BT[:, :, None] != context.sequence_BT[:, None, :]
        mixed = bool((visible & across_BTT[:, None]).any())
    else:
        implementation = context.decoder.config._attn_implementation  # type: ignore[union-attr]
        mixed = mask is None and implementation in ("sdpa", "eager")
    if mixed:
        raise UnsupportedCallError(
            f"position_ids start again within a row, as where texts are packed, but "
            f"{type(context.decoder).__name__} lets each see the one before; give each text a row "
            "of its own, or position_ids that go on"
        )
