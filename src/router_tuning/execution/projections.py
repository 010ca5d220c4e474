"""The parts of an attention, called one by one, so that skipped tokens are not projected.

Works for any attention built of q_proj, k_proj, v_proj, o_proj, optional q_norm and k_norm over the
head dimension, and the module's own `apply_rotary_pos_emb`. Everything runs on flat tokens.

Shapes: N tokens (flat), H heads, D head dimension, B batch, Q and K padded numbers of queries and
keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from router_tuning.errors import UnsupportedModelError
from router_tuning.execution.visibility import additive

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")


def check_parts(attention: nn.Module) -> None:
    """Raise UnsupportedModelError unless the attention is built of the parts that are called
    here.
    """
    missing = [name for name in PARTS if not hasattr(attention, name)]
    if missing or _rotary(attention) is None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} is not built of {', '.join(PARTS)} and "
            "apply_rotary_pos_emb "
            f"(missing: {', '.join(missing) or 'apply_rotary_pos_emb'}); it cannot be routed"
        )


def queries(attention: Any, x_ND: Tensor, rope_ND: tuple[Tensor, Tensor]) -> Tensor:
    """Rotated queries: (N, H, D)."""
    return _rotate(attention, _heads(attention, x_ND, "q_proj", "q_norm"), rope_ND)


def keys_values(
    attention: Any, x_ND: Tensor, rope_ND: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotated keys, and values: (N, H, D) each."""
    keys = _rotate(attention, _heads(attention, x_ND, "k_proj", "k_norm"), rope_ND)
    return keys, _heads(attention, x_ND, "v_proj", None)


def attend(
    attention: Any,
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    value_BHKD: Tensor,
    mask_B1QK: Tensor | None,
) -> Tensor:
    """Attention output before the output projection: (B, Q, H, D). No mask means causal from the
    first key.
    """
    eager = attention.config._attn_implementation == "eager"
    if eager:
        function = _module_of(attention).eager_attention_forward
        if mask_B1QK is None:
            shape = (1, 1, query_BHQD.shape[2], key_BHKD.shape[2])
            mask_B1QK = torch.ones(shape, dtype=torch.bool, device=query_BHQD.device).tril()
        mask_B1QK = additive(mask_B1QK, query_BHQD.dtype)
    else:
        # Under flash and flex implementations too: they take no such mask, and the result is the
        # same.
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    dropout = attention.attention_dropout if attention.training else 0.0
    output, _ = function(
        attention,
        query_BHQD,
        key_BHKD,
        value_BHKD,
        mask_B1QK,
        dropout=dropout,
        scaling=attention.scaling,
    )
    return output


def _heads(attention: Any, x_ND: Tensor, projection: str, norm: str | None) -> Tensor:
    heads_NHD = getattr(attention, projection)(x_ND).unflatten(-1, (-1, attention.head_dim))
    normed = getattr(attention, norm, None) if norm else None
    return heads_NHD if normed is None else normed(heads_NHD)


def _rotate(attention: nn.Module, x_NHD: Tensor, rope_ND: tuple[Tensor, Tensor]) -> Tensor:
    x_1HND = x_NHD.transpose(0, 1)[None]
    rotary = _rotary(attention)
    assert rotary is not None
    # The model's function rotates queries and keys together; the second argument has no heads here.
    rotated, _ = rotary(x_1HND, x_1HND[:, :0], rope_ND[0][None], rope_ND[1][None])
    return rotated[0].transpose(0, 1)


def _rotary(attention: nn.Module) -> Callable[..., Any] | None:
    return getattr(_module_of(attention), "apply_rotary_pos_emb", None)


def _module_of(attention: nn.Module) -> Any:
    return sys.modules[type(attention).__module__]
