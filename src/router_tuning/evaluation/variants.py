"""The ways one model is run for comparison, and what a run kept and cost.

A variant is dense, routed at a budget, or decided by a control. `Ran` adds up records forward by
forward: the decisions of a whole task would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from router_tuning.baselines import RandomMask, StaticDrop
from router_tuning.cost import Cost, cost
from router_tuning.execution.context import always_skipping, decided_by, dense, record
from router_tuning.record import Trace, kept_of_all, kept_of_routed

SHARES = ("kept_fraction", "kept_of_routed", "flops_fraction")


@dataclass(frozen=True)
class Variant:
    """One way to run a routed model."""

    budget: float | None = None
    """Kept fraction of the routers; None switches them off."""
    decider: RandomMask | StaticDrop | None = None
    """What decides in the routers' place."""

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[dict[str, float]]:
        """Run a model so inside the block; gives the keywords that its calls need."""
        if self.decider is not None:
            with decided_by(model, self.decider):
                yield {"budget": 1.0}  # nothing is decided by a threshold
        elif self.budget is not None:
            yield {"budget": self.budget}
        else:
            with dense(model):
                yield {}

    @property
    def is_dense(self) -> bool:
        """Whether nothing is routed, and so nothing recorded."""
        return self.budget is None and self.decider is None


DENSE = Variant()


class Ran:
    """Executions and costs, added up over traces."""

    def __init__(self) -> None:
        self._real = 0
        self._kept: dict[str, int] = {}
        self._num_units = 0
        self._prices: Mapping[str, float] = {}
        self._spent: Cost | None = None

    @contextmanager
    def counting(self, model: nn.Module, variant: Variant) -> Iterator[None]:
        """Add what the block runs; nothing where the variant is dense."""
        if variant.is_dense:
            yield
            return
        with always_skipping(model), record(model) as trace:
            yield
        self.add(model, trace)

    def add(self, model: nn.Module, trace: Trace) -> None:
        """Add a trace that begins at its first token."""
        self._num_units, self._prices = trace.num_units, trace.prices
        self._real += sum(int(f.real_BT.sum()) for f in trace.forwards)
        for name in trace.unit_names:
            kept = sum(int(f.units[name].keep_BT.sum()) for f in trace.forwards)
            self._kept[name] = self._kept.get(name, 0) + kept
        spent = cost(model, trace)
        self._spent = spent if self._spent is None else self._spent + spent

    def kept_per_unit(self) -> dict[str, float]:
        """Fraction of real tokens for which each routed unit ran."""
        return {name: kept / self._real for name, kept in self._kept.items()}

    def shares(self) -> dict[str, float]:
        """The SHARES of what ran, as perplexity.py's rows have them."""
        kept = self.kept_per_unit()
        assert self._spent is not None, "nothing was recorded"
        return {
            "kept_fraction": kept_of_all(kept, self._num_units, self._prices),
            "kept_of_routed": kept_of_routed(kept, self._prices),
            "flops_fraction": self._spent.flops_fraction,
        }


Items = Sequence[Mapping[str, float]]
"""What was measured of each row of a task, in the task's order."""


def weighted_items(runs: Sequence[tuple[Items, float]]) -> list[dict[str, float]]:
    """Row by row the weighted mean of several runs of one task."""
    rows = zip(*(items for items, _ in runs), strict=True)
    weights = [weight for _, weight in runs]
    return [_weighted(row, weights) for row in rows]


def weighted_shares(runs: Sequence[tuple[Ran, float]]) -> dict[str, float]:
    """The weighted mean of the shares of several runs."""
    return _weighted([ran.shares() for ran, _ in runs], [weight for _, weight in runs])


def _weighted(values: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    return {
        name: sum(value[name] * weight for value, weight in zip(values, weights, strict=True))
        for name in values[0]
    }
