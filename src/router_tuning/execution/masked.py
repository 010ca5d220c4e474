"""The differentiable path: every unit is computed, and what was skipped is hidden.

Saves nothing. Used for training, where the gradient must also reach skipped tokens, and as the
reference that the skipping path is tested against.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.visibility import (
    additive,
    causal,
    permanent,
    recent,
    sliding_window_of,
)
from router_tuning.units import Unit


def masked_call(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    unit: Unit,
    context: ForwardContext,
) -> Any:
    """What an attention, or a layer around it, returns for every token; its gate has still to be
    applied.
    """
    keep_BT = decided.keep_BT
    write_BT = context.real_BT if context.config.kv == "all" else permanent(keep_BT, context)
    context.note(unit, decided.record(write_BT, context))
    mask = call.mask
    # Nothing hidden: the dense call itself, so that fresh routers change no bit.
    if context.config.kv == "kept" and (
        context.weighed_keys or int(keep_BT.sum()) < context.num_real
    ):
        mask = _kept_keys_mask(attention, call, keep_BT, context)
        if context.weighed_keys and decided.soft_BT is not None:
            mask = _weighed(mask, decided.soft_BT, call.x_BTD.dtype, context)
    return call.without_cache(mask).run(dense_forward)


def _kept_keys_mask(
    attention: nn.Module, call: UnitCall, keep_BT: Tensor, context: ForwardContext
) -> Tensor:
    """The attention's own mask without the keys of skipped tokens: (B, 1, T, T), bool or
    additive.
    """
    implementation = attention.config._attn_implementation  # type: ignore[union-attr]
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedCallError(
            f'kv="kept" hides keys by a mask while training, which attention implementation '
            f'{implementation!r} does not take; load the model with attn_implementation="sdpa" or '
            '"eager"'
        )
    column_1T = context.column_T[None]
    visible = permanent(keep_BT, context)[:, None, :] | recent(
        column_1T, column_1T, context.config.kv_window
    )
    allowed = _as_bool(call.mask)
    if allowed is None:
        allowed = causal(column_1T, column_1T, sliding_window_of(attention))[:, None]
    # A skipped query before any kept key would see nothing and give NaN; its own key is harmless,
    # since its output is gated to zero.
    diagonal = torch.eye(keep_BT.shape[1], dtype=torch.bool, device=keep_BT.device)
    mask = allowed & visible[:, None] | diagonal
    if implementation == "sdpa":
        return mask
    return additive(mask, call.x_BTD.dtype)


def _weighed(mask: Tensor, soft_BT: Tensor, dtype: torch.dtype, context: ForwardContext) -> Tensor:
    """The same mask, additive, through which a key's logarithmic weight hands its gradient to its
    token's decision: (B, 1, T, T).

    With weight k_j before the softmax, d out_i / d k_j = w_ij (v_j - out_i) at k_j = 1.
    """
    column_T = context.column_T
    lasting_TT = ~recent(column_T[None], column_T[None], max(context.config.kv_window, 1))[0]
    sink_BT = context.position_BT < context.config.kv_sink
    weight_BT = (soft_BT - soft_BT.detach()).masked_fill(sink_BT, 0.0)
    if mask.dtype == torch.bool:
        mask = additive(mask, dtype)
    return mask + (weight_BT[:, None, None] * lasting_TT).to(dtype)


def _as_bool(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnsupportedCallError(
            f"expected a 4-D attention mask from the model, got {type(mask).__name__}; "
            f'load the model with attn_implementation="sdpa" or "eager"'
        )
    return mask if mask.dtype == torch.bool else mask >= 0
