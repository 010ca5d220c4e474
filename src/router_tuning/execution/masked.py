"""The differentiable path: every unit is computed, and what was skipped is hidden.

Saves nothing. Used for training, where the gradient must also reach skipped tokens, and as the
reference that the skipping path is tested against.

With kv="kept" a decision is also whether later tokens see this one's key, so gradients reach it
through the keys too (decision 0011). Let a key have the weight k before the softmax; then
d out_i / d k_j = w_ij (v_j - out_i). For a kept key that is taken where it stands, for a skipped
one where no key is hidden: among the kept ones alone its w would be 0.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from router_tuning.units import Unit, first_of


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
    if context.config.kv == "all":
        return call.without_cache(call.mask).run(dense_forward)
    hidden = int(keep_BT.sum()) < context.num_real
    # Nothing hidden: the dense call itself, so that fresh routers change no bit.
    if not (hidden or context.weighed_keys):
        return call.without_cache(call.mask).run(dense_forward)
    return _with_kept_keys(dense_forward, attention, call, decided, unit, context, hidden)


def _with_kept_keys(
    dense_forward: Callable[..., Any],
    attention: nn.Module,
    call: UnitCall,
    decided: Decided,
    unit: Unit,
    context: ForwardContext,
    hidden: bool,
) -> Any:
    """The same where some keys may be hidden, with the gradients of the keys' decisions."""
    keep_BT = decided.keep_BT
    implementation = attention.config._attn_implementation  # type: ignore[union-attr]
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedCallError(
            f'kv="kept" hides keys by a mask while training, which attention implementation '
            f'{implementation!r} does not take; load the model with attn_implementation="sdpa" or '
            '"eager"'
        )
    allowed = _allowed(attention, call, context)
    mask = _kept_keys(allowed, keep_BT, context)
    weight_BT = _key_weight(decided, context)
    if weight_BT is None:
        mask = mask if implementation == "sdpa" else additive(mask, call.x_BTD.dtype)
        return call.without_cache(mask).run(dense_forward)
    mask = _weighed(mask, weight_BT * keep_BT, call, context)
    output = call.without_cache(mask).run(dense_forward)
    if unit.kind == "attn" and hidden:  # of a block, it would take all of its work once more
        mask = _weighed(allowed, weight_BT * ~keep_BT, call, context)
        with _frozen(attention):
            return _by_skipped_keys(output, call.without_cache(mask), dense_forward)
    return output


def _allowed(attention: nn.Module, call: UnitCall, context: ForwardContext) -> Tensor:
    """What the attention's own mask shows, as bool: (B or 1, 1, T, T)."""
    allowed = _as_bool(call.mask)
    if allowed is None:
        column_1T = context.column_T[None]
        allowed = causal(column_1T, column_1T, sliding_window_of(attention))[:, None]
    return allowed


def _kept_keys(allowed: Tensor, keep_BT: Tensor, context: ForwardContext) -> Tensor:
    """The same without the keys of skipped tokens: (B, 1, T, T)."""
    column_1T = context.column_T[None]
    visible = permanent(keep_BT, context)[:, None, :] | recent(
        column_1T, column_1T, context.config.kv_window
    )
    # A skipped query before any kept key would see nothing and give NaN; its own key is harmless,
    # since its output is gated to zero.
    diagonal = torch.eye(keep_BT.shape[1], dtype=torch.bool, device=keep_BT.device)
    return allowed & visible[:, None] | diagonal


def _key_weight(decided: Decided, context: ForwardContext) -> Tensor | None:
    """Zeros whose gradient is that of each token's decision; none at the sink, whose keys stay
    whatever is decided: (B, T). None where no gradient is wanted.
    """
    soft_BT = decided.soft_BT
    if soft_BT is None or not soft_BT.requires_grad:
        return None
    sink_BT = context.position_BT < context.config.kv_sink
    return (soft_BT - soft_BT.detach()).masked_fill(sink_BT, 0.0)


def _weighed(mask: Tensor, weight_BT: Tensor, call: UnitCall, context: ForwardContext) -> Tensor:
    """A bool mask as an additive one, with the logarithms of the keys' weights (zeros) where it is
    the decision that shows them, and not the window: (B, 1, T, T).
    """
    column_T, dtype = context.column_T[None], call.x_BTD.dtype
    lasting_TT = ~recent(column_T, column_T, max(context.config.kv_window, 1))[0]
    return additive(mask, dtype) + (weight_BT[:, None, None] * lasting_TT).to(dtype)


@contextmanager
def _frozen(attention: nn.Module) -> Iterator[None]:
    """Inside the block nothing of an attention trains: not its LoRA either."""
    training = [p for p in attention.parameters() if p.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)


def _by_skipped_keys(output: Any, seeing: UnitCall, dense_forward: Callable[..., Any]) -> Any:
    """The same output, through which gradients also reach the weights of skipped keys: as of the
    call `seeing`, whose mask holds these weights and hides no key, and of nothing else in it.
    """
    states = {seeing.state: seeing.x_BTD.detach()}
    whole = first_of(seeing.over(None, {**seeing.kwargs, **states}).run(dense_forward))
    same = first_of(output) + (whole - whole.detach())
    return (same, *output[1:]) if isinstance(output, tuple) else same


def _as_bool(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnsupportedCallError(
            f"expected a 4-D attention mask from the model, got {type(mask).__name__}; "
            f'load the model with attn_implementation="sdpa" or "eager"'
        )
    return mask if mask.dtype == torch.bool else mask >= 0
