"""An attention's own forward, with another attention function in the place of the model's.

Attentions attend through transformers' attention interface, and name the function in their config.
So a forward can be given a config that names ours, and everything else stays the family's own:
projections, norms, rotations. What is to attend waits in a variable of the running context, since a
block calls its attention itself.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from router_tuning.errors import UnsupportedModelError

IMPLEMENTATION = "router_tuning"
"""The name of our attention function in transformers' interface."""
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What the forward of an attention that goes through the interface mentions."""


class StandIn(Protocol):
    """What attends instead, in one call of a unit."""

    attention: nn.Module

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Queries (B, H, T, D), and keys and values of fewer heads -> (B, T, H, D)."""


_running: contextvars.ContextVar[StandIn | None] = contextvars.ContextVar(
    "router_tuning_stand_in", default=None
)


def can_stand_in(attention: nn.Module) -> bool:
    """Whether an attention attends through the interface, by its own forward: one that something
    else has replaced (an accelerate hook) may do more.
    """
    replaced = attention.__dict__.get("dense_forward") is not None
    return not replaced and _through_interface(type(attention))  # type: ignore[arg-type]


@functools.cache
def _through_interface(kind: type) -> bool:
    code = inspect.unwrap(kind.forward).__code__  # type: ignore[attr-defined]
    return INTERFACE in code.co_names


@contextmanager
def standing_in(run: StandIn) -> Iterator[None]:
    """Let it attend for its attention inside the block."""
    token = _running.set(run)
    try:
        yield
    finally:
        _running.reset(token)


def own_forward(attention: nn.Module, dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The attention's forward, attending by what stands in for it where there is such a thing."""
    run = _running.get()
    if run is None or run.attention is not attention:
        return dense_forward
    config = _Seen(attention.config, _attn_implementation=IMPLEMENTATION)
    seen = _Seen(attention, config=config)
    forward: Callable[..., Any] = type(attention).forward
    return lambda *args, **kwargs: forward(seen, *args, **kwargs)


class _Seen:
    """An object as its own method sees it, but for some of its attributes."""

    def __init__(self, seen: Any, **instead: Any) -> None:
        self.__dict__.update(instead, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Our attention function, in the form of transformers' interface."""
    run = _running.get()
    if run is None:
        raise UnsupportedModelError(
            f"{IMPLEMENTATION} serves routed calls alone; use sdpa or eager"
        )
    return run.attend(query, key, value, attention_mask, kwargs), None


AttentionInterface.register(IMPLEMENTATION, _attend)
