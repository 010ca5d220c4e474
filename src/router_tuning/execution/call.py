"""What an attention was called with, and what was decided for it.

Shapes: B batch, T tokens of this forward, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from router_tuning.execution.context import ForwardContext
from router_tuning.record import UnitRecord


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of an attention that routing reads, under one name each."""

    x_BTD: Tensor
    rope: tuple[Tensor, Tensor]
    mask: Any
    cache: Any
    kwargs: dict[str, Any]
    """All arguments, as the dense forward wants them."""

    @classmethod
    def read(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        """transformers calls attentions by keyword; `cache` was `past_key_values` before 5.24."""
        if args:
            kwargs = {"hidden_states": args[0], **kwargs}
        cache = kwargs.get("cache")
        cache = kwargs.get("past_key_values") if cache is None else cache
        return cls(
            kwargs["hidden_states"],
            kwargs["position_embeddings"],
            kwargs.get("attention_mask"),
            cache,
            kwargs,
        )

    def without_cache(self, mask: Any) -> dict[str, Any]:
        """Arguments for a dense call on the same tokens under another mask, writing no cache."""
        changed = {"attention_mask": mask}
        changed.update({name: None for name in ("cache", "past_key_values") if name in self.kwargs})
        return {**self.kwargs, **changed}


@dataclass(frozen=True)
class Decided:
    """What was decided for a unit in this forward."""

    keep_BT: Tensor
    soft_BT: Tensor | None
    logits_BT: Tensor | None
    always_BT: Tensor | None = None

    def record(self, write_BT: Tensor | None, context: ForwardContext) -> UnitRecord:
        """The entry for the trace."""
        threshold = None if self.logits_BT is None else context.threshold_B1
        return UnitRecord(
            self.keep_BT, write_BT, self.logits_BT, threshold, self.always_BT, self.soft_BT
        )
