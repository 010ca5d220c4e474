"""What is timed: a model that somebody's code makes, and what is to be said of it.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import DynamicCache

Context = Callable[[], AbstractContextManager[Any]]

CACHES = ("cache", "past_key_values")
"""What a forward may call its cache: transformers 5.24 renamed it."""


@dataclass(frozen=True)
class Wanted:
    """What a peer is built for.

    Args:
        rate: part of the attentions' executions that run; at 1 nothing is skipped.
        dropped: the layers whose attention a static method leaves out.
        rows: of the largest batch.
        tokens: of the longest row, new ones included.
        seed: of fresh routers.
    """

    rate: float
    dropped: tuple[int, ...]
    rows: int
    tokens: int
    seed: int

    @property
    def whole(self) -> Wanted:
        """The same, with nothing skipped."""
        return replace(self, rate=1.0, dropped=())


class Run(Protocol):
    """What is timed. No head reads more than the last token of each row."""

    def prefill(self, ids_BT: Tensor) -> Any:
        """Read prompts; what decoding goes on from."""

    def decode(self, ids_B1: Tensor, column: int, state: Any) -> Any:
        """Read the next token of each row, which stands in this column; the new state."""

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Of the last token of each row (B, V)."""


@dataclass
class Subject:
    """A model to time, and what is to be said of it."""

    run: Run
    skips: str
    """What is left out for a skipped token."""
    skips_work: bool = True
    """Whether anything is."""
    ran_with: list[str] = field(default_factory=list)
    kept: Callable[[], float] | None = None
    """Part of the attentions' executions that were kept in the last forward inside `counted`."""
    no_decode: str = ""
    """Why it cannot decode; empty where it can, or where nobody knows yet."""
    context: Context = nullcontext
    """Entered around what is timed."""
    counted: Context = nullcontext
    """Entered, inside the other, where not time but `kept` is wanted."""


class Causal:
    """Runs a causal LM of transformers."""

    def __init__(self, model: Any, *, cached: bool = True) -> None:
        self.model, self.cached = model, cached
        read_last_only(model.get_output_embeddings())
        names = inspect.signature(type(model.model).forward).parameters
        self.name = next(name for name in CACHES if name in names)

    def prefill(self, ids_BT: Tensor) -> Any:
        """The cache; None without one. It is made before the forward: routed layers want that."""
        if not self.cached:
            return self.model(input_ids=ids_BT, use_cache=False, **self.more(ids_BT, 0)) and None
        takes = inspect.signature(DynamicCache).parameters
        cache = DynamicCache(config=self.model.config) if "config" in takes else DynamicCache()
        return self.decode(ids_BT, 0, cache)

    def decode(self, ids_B1: Tensor, column: int, state: Any) -> Any:
        """The cache, longer by these tokens."""
        given = {self.name: state, **self.more(ids_B1, column)}
        return getattr(self.model(input_ids=ids_B1, use_cache=True, **given), self.name)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Of the last token of each row."""
        out = self.model(input_ids=ids_BT, use_cache=False, **self.more(ids_BT, 0))
        return out.logits[:, -1].float()

    def more(self, ids_BT: Tensor, column: int) -> dict[str, Any]:
        """Further arguments of a forward."""
        return {}


def read_last_only(head: nn.Module) -> None:
    """Leave out all tokens but the last before the head, whatever calls it: old code has no
    argument for that, and heads are not what differs. By an index: to multiply a slice, PyTorch
    copies the output embedding.
    """
    head.register_forward_pre_hook(lambda _, args: (args[0][:, [-1]], *args[1:]))


def shared_copy(model: Any) -> Any:
    """A model of its own on the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def rope_theta(config: Any) -> float:
    """The base of the rotary positions, where either transformers has it."""
    of_5 = getattr(config, "rope_parameters", None) or {}
    return float(of_5.get("rope_theta") or config.rope_theta)
