"""The keys and values of an attention, made from its parts, without its queries.

Works for any attention built of k_proj, v_proj, optional k_norm over the head dimension, and the
module's own `apply_rotary_pos_emb`. Everything runs on flat tokens.

Shapes: N tokens (flat), H key heads, D head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from router_tuning.errors import UnsupportedModelError

PARTS = ("k_proj", "v_proj", "head_dim")


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


def keys_values(
    attention: Any, x_ND: Tensor, rope_ND: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotated keys, and values: (N, H, D) each."""
    keys = _rotate(attention, _heads(attention, x_ND, "k_proj", "k_norm"), rope_ND)
    return keys, _heads(attention, x_ND, "v_proj", None)


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
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
