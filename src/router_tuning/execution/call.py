"""What a unit was called with, and what was decided for it.

Shapes: B batch, T tokens of this forward, D hidden, R rows of a group, L tokens of each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.context import ForwardContext
from router_tuning.execution.places import Places
from router_tuning.record import UnitRecord
from router_tuning.units import CACHES, Unit

MASK = "attention_mask"


@dataclass(frozen=True)
class UnitCall:
    """The arguments of an attention or a decoder layer, under their names."""

    state: str
    """Name of the hidden states among the arguments."""
    kwargs: dict[str, Any]

    @classmethod
    def read(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnitCall:
        """Put names to positional arguments."""
        names = _names(type(module))  # type: ignore[arg-type]
        return cls(names[0], {**dict(zip(names, args, strict=False)), **kwargs})

    @property
    def x_BTD(self) -> Tensor:
        """The hidden states."""
        x_BTD: Tensor = self.kwargs[self.state]
        return x_BTD

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions."""
        rope: tuple[Tensor, Tensor] = self.kwargs["position_embeddings"]
        return rope

    @property
    def mask(self) -> Any:
        """The mask that the model made for this attention, or None."""
        return self.kwargs.get(MASK)

    @property
    def cache(self) -> Any:
        """The cache, under whatever name it came."""
        for name in CACHES:
            cache = self.kwargs.get(name)
            if cache is not None:
                return cache
        return None

    def without_cache(self, mask: Any) -> UnitCall:
        """A call on the same tokens under another mask, writing no cache."""
        return self.over(None, {**self.kwargs, MASK: mask})

    def at(self, pick: Callable[[Tensor], Tensor], mask: Any, cache: Any) -> UnitCall:
        """A call on some tokens only: `pick` takes their part of a tensor, (B or 1, T, ...) ->
        (R, L, ...).

        Whatever has such a shape is taken to belong to the tokens.

        Raises:
            UnsupportedCallError: an argument of another shape, of which no part can be given.
        """
        taken = {
            name: _at(value, pick, self.x_BTD.shape)
            for name, value in self.kwargs.items()
            if name != MASK
        }
        return self.over(cache, {**taken, MASK: mask})

    def over(self, cache: Any, kwargs: dict[str, Any]) -> UnitCall:
        """The same call with a cache, under the name that the module knows."""
        changed = {name: cache for name in CACHES if name in self.kwargs}
        return UnitCall(self.state, {**kwargs, **changed})

    def run(self, forward: Callable[..., Any]) -> Any:
        """Call a forward; hidden states go first, as activation checkpointing wants them."""
        rest = dict(self.kwargs)
        x_BTD = rest.pop(self.state)
        return forward(x_BTD, **rest)


def _at(value: Any, pick: Callable[[Tensor], Tensor], shape: torch.Size) -> Any:
    """Some tokens of what has the shape (B or 1, T, ...), also within tuples; anything else is for
    all tokens. `shape` is that of the hidden states.

    A function of the module: one that called itself from inside `UnitCall.at` would be a cycle, and
    hold a call's tensors until Python looks for cycles.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(_at(part, pick, shape) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    batch, length = shape[:2]
    if value.shape[1] != length or value.shape[0] not in (1, batch):
        raise UnsupportedCallError(
            f"a unit was called with a tensor {tuple(value.shape)} beside its hidden states "
            f"{tuple(shape)}; it is not by tokens, so the unit cannot be run on its kept tokens "
            "alone: route another kind of unit"
        )
    return pick(value)


@functools.cache
def _names(module_class: type) -> tuple[str, ...]:
    return tuple(inspect.signature(module_class.forward).parameters)[1:]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Decided:
    """What was decided for a unit in this forward."""

    keep_BT: Tensor
    soft_BT: Tensor | None
    logits_BT: Tensor | None
    always_BT: Tensor | None = None
    on_host_BT: Tensor | None = None
    """keep_BT, where the host decided."""

    @functools.cached_property
    def host_BT(self) -> Tensor:
        """The decisions on the host: the one time that a routed unit waits for the device."""
        return self.keep_BT.cpu() if self.on_host_BT is None else self.on_host_BT

    @functools.cached_property
    def num_kept(self) -> int:
        """For how many tokens the unit runs."""
        host_BT = self.host_BT
        return int(host_BT.item() if host_BT.numel() == 1 else host_BT.sum())

    def everything(self, context: ForwardContext) -> bool:
        """Whether the unit runs for every real token."""
        return self.keep_BT is context.real_BT or self.num_kept == context.num_real

    @functools.cached_property
    def kept(self) -> Places:
        """Where the unit runs."""
        return Places.where(self.host_BT, self.keep_BT.device)

    def note(
        self,
        unit: Unit,
        context: ForwardContext,
        write_BT: Tensor | None,
        whole_BT: Tensor | None = None,
    ) -> None:
        """Record what a unit ran, where somebody reads it; `whole_BT` where it ran for skipped
        tokens too.
        """
        if not context.is_read:
            return
        threshold = None if self.logits_BT is None else context.threshold_B1
        if write_BT is not None:
            write_BT = write_BT.to(self.keep_BT.device)
        entry = UnitRecord(
            self.keep_BT,
            write_BT,
            self.logits_BT,
            threshold,
            self.always_BT,
            self.soft_BT,
            whole_BT,
        )
        # The first time counts: activation checkpointing runs a layer again.
        context.record.units.setdefault(unit.name, entry)
