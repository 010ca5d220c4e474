"""A unit's own forward on the kept tokens of all rows, put side by side as one flat row.

Whatever a unit is built of, it hands its new keys to a cache, and attends through transformers'
attention interface. So it is called with a stand-in for the cache and one for the attention
function: each row's queries then attend to that row's keys alone, in place (rows.py). Nothing is
computed for filling, and no key in the cache is moved.

Shapes: B batch, T tokens of this forward, N kept tokens, H heads, G key heads, D head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.execution.cache import RoutedCacheLayer
from router_tuning.execution.call import Decided, UnitCall
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.grouped import served_by_sdpa
from router_tuning.execution.keys import HandedCache, no_keys
from router_tuning.execution.places import MadeKeys, Places
from router_tuning.execution.rows import Kernel, Reach, attend
from router_tuning.execution.segments import SegmentKeys
from router_tuning.execution.standing_in import can_stand_in, own_forward, standing_in
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.units import Unit, first_of

BEYOND_SDPA = ("softcap", "s_aux")
"""What an attention passes to a function whose scores are capped, or that has sinks."""

_expanding: set[type] = set()
"""Attentions that turned out to attend to something else than the keys they hand to their cache,
though their family does not say so.
"""


class _NotHanded(Exception):
    """The keys to attend to are not those that were handed to the cache."""


def can_run_flat(attention: nn.Module, context: ForwardContext) -> bool:
    """Whether an attention can be called on flat tokens: through the interface, causally, under a
    mask that follows from the columns, by its own forward. Of a family found by its structure the
    mask is not known; a forward that something else has replaced (an accelerate hook) may do more.
    """
    return (
        type(attention) not in _expanding
        and not context.family.expands_keys
        and not context.is_found
        and getattr(attention, "is_causal", False) is True
        and can_stand_in(attention)
    )


class FlatRun:
    """One call of a unit on the kept tokens of all rows."""

    def __init__(
        self,
        attention: nn.Module,
        call: UnitCall,
        decided: Decided,
        extra: MadeKeys | None,
        layer: RoutedCacheLayer | None,
        unit: Unit,
        context: ForwardContext,
    ) -> None:
        self.attention, self.call, self.decided, self.extra = attention, call, decided, extra
        self.layer, self.unit, self.context = layer, unit, context
        self.kept: Places = decided.kept
        self.handed: tuple[Tensor | None, Tensor | None] = (None, None)
        self.attended = False

    def output(self, dense_forward: Callable[..., Any]) -> Tensor | None:
        """What the unit gives for its kept tokens (N, D); None where it cannot be called so, and
        nothing has happened.
        """
        try:
            with standing_in(self):
                forward = dense_forward
                if self.unit.kind == "attn":
                    forward = own_forward(self.attention, dense_forward)
                output = first_of(self._part().run(forward))
        except _NotHanded:
            _expanding.add(type(self.attention))
            return None
        if not self.attended:
            raise no_keys(self.attention, self.unit)
        flat: Tensor = output[0]
        return flat

    def _part(self) -> UnitCall:
        """The call on the kept tokens only."""
        cache = HandedCache(self.call.cache, self._take)
        rows, tokens = self.kept.size
        if rows == 1 and len(self.kept) == tokens:
            return self.call.over(cache, {**self.call.kwargs, "attention_mask": None})
        return self.call.at(self.kept.flat, None, cache)

    def _take(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.handed = key, value
        return key, value

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Stands for the attention function: (1, H, N, D) -> (1, N, H, D)."""
        if (
            key is not self.handed[0]
            or value is not self.handed[1]
            or kwargs.get("position_bias") is not None
        ):
            raise _NotHanded
        self.attended = True
        kernel = Kernel(self._eager(kwargs), self.attention, kwargs)
        made = MadeKeys(self.kept, key[0].transpose(0, 1), value[0].transpose(0, 1))
        made, sliding = made.joined(self.extra), sliding_window_of(self.attention)
        keys = SegmentKeys(
            made, self.decided, self.call, self.layer, self.unit, sliding, self.context
        )
        together = keys.together()
        if together is not None:
            return kernel(query.transpose(0, 2), together.key, together.value, None).transpose(0, 1)
        reach = Reach(self.context.config.kv_window, sliding)
        column_N = self.kept.token_N + self.context.start
        parts, begin = [], 0
        for segment, number in enumerate(keys.asked_S):
            some = slice(begin, begin := begin + number)
            if number:
                of = keys.of(segment)
                parts.append(attend(kernel, query[:, :, some], column_N[some], of, reach))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _eager(self, kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """The family's own attention function, where SDPA does not serve: its scores are capped, or
        it has sinks, or it was asked for. Flash and flex functions are served by either.
        """
        asked = self.attention.config._attn_implementation  # type: ignore[union-attr]
        beyond = any(kwargs.get(name) is not None for name in BEYOND_SDPA)
        served = served_by_sdpa(self.attention, self.context.decoder)
        if not beyond and (asked == "sdpa" or (asked != "eager" and served)):
            return None
        module = sys.modules[type(self.attention).__module__]
        function: Callable[..., Any] = module.eager_attention_forward
        return function
