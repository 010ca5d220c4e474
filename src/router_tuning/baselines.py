"""Controls behind the routers' own interface: random masks and static dropping.

Each is a decider for `decided_by(model, decider)`. Learned static dropping is a router kind instead
(router="bias"). Orders say which unit to drop first.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from router_tuning.data import Windows
from router_tuning.errors import ConfigError
from router_tuning.execution.context import (
    ForwardContext,
    check_names,
    decided_by,
    dense,
    routing_of,
)
from router_tuning.execution.partial import entering_states, run_from
from router_tuning.record import price_of
from router_tuning.units import (
    KINDS,
    Unit,
    decoder_layers,
    decoder_of,
    first_of,
    part_of,
    post_norm_of,
    unwrap,
)

Progress = Callable[[int, int], None]
Measure = Callable[[int, Tensor], float]
"""Runs a model on the row of a number, token ids (1, T), and says how far it went wrong in all."""
SLACK = 1e-6
"""Of sums of prices, which are rounded."""


class RandomMask:
    """Keeps at a given rate whatever the text says: each token by itself, or a sequence's tokens
    after its always-run prefix (under other poolings: all of its tokens) together, as the unit's
    granularity has it.

    Rows differ. Token masks of one seed are the same however a text is cut into chunks; for
    sequences the rate is met over one forward, its prefix included.

    Args:
        rate: kept fraction (0 to 1), one for all units or one for each unit name.
        seed: of the masks.

    Raises:
        ConfigError: a rate out of range; on use, a unit without a rate or a rate without a unit.
    """

    def __init__(self, rate: float | Mapping[str, float], seed: int = 0) -> None:
        for value in rate.values() if isinstance(rate, Mapping) else [rate]:
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
                raise ConfigError(
                    f"a rate is a kept fraction from 0 to 1, one for all units or a dict of one "
                    f"for each unit name; got {value!r}"
                )
        self.rate = rate
        self.seed = seed

    def check(self, units: Sequence[Unit]) -> None:
        """Refuse units without a rate, and rates of units that are not routed."""
        if isinstance(self.rate, Mapping):
            check_names("rate", self.rate, units, all_of=True)

    def __call__(self, unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        rate = self.rate[unit.name] if isinstance(self.rate, Mapping) else self.rate
        row_B1 = torch.arange(forward.rows, device=x_BTD.device)[:, None]
        key_B1 = _mix(_mix(torch.full_like(row_B1, self.seed * 1_000_003 + _number(unit))) ^ row_B1)
        if unit.kind not in forward.sequence_kinds:
            return _uniform(_mix(key_B1 ^ (forward.position_BT + 1))) < rate
        if forward.config.pooling != "prefix":
            return (_uniform(key_B1) < rate).expand(x_BTD.shape[:2])
        always_BT = forward.position_BT < forward.config.decide_after
        share = float(always_BT.double().mean())
        # What runs in any case counts towards the rate.
        free = (rate - share) / (1 - share) if share < 1 else 1.0
        return always_BT | (_uniform(key_B1) < free)


def _number(unit: Unit) -> int:
    """Of a unit among all of a model, so that no two have the same masks."""
    return unit.layer_idx + 7919 * KINDS.index(unit.kind)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (multiply, xor, shift), in int64 so that no platform overflows
    differently.
    """
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x >> 16) ^ x) * 0x45D9F3B & mask
    x = ((x >> 16) ^ x) * 0x45D9F3B & mask
    return (x >> 16) ^ x


def _uniform(x: Tensor) -> Tensor:
    return x.double() / 2**32


class StaticDrop:
    """Never runs some units, always runs the others.

    Args:
        dropped: names of the units never run.

    Raises:
        ConfigError: one bare name; on use, a name of no routed unit.
    """

    def __init__(self, dropped: Collection[str]) -> None:
        if isinstance(dropped, str) or not isinstance(dropped, Collection):
            raise ConfigError(
                f"dropped must be a list of unit names, got {dropped!r}; write "
                f'StaticDrop(["layers.1.attn"]) for one'
            )
        self.dropped = frozenset(dropped)

    def check(self, units: Sequence[Unit]) -> None:
        """Refuse names that are no routed units."""
        check_names("dropped", self.dropped, units, all_of=False)

    def __call__(self, unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        return torch.full(x_BTD.shape[:2], unit.name not in self.dropped, device=x_BTD.device)


def cosine_order(model: nn.Module, windows: Windows, *, batch_size: int = 8) -> list[str]:
    """Units by falling similarity of the residual stream before and after them (LLM-Drop, He et al.
    2024, eq. 3).

    The first is dropped first. Similarity is the mean cosine over tokens, with the dense model.
    """
    decoder = decoder_of(model)
    units = routing_of(model).units
    sums = {unit.name: 0.0 for unit in units}
    hooks = [hook for unit in units for hook in _similarity_hooks(decoder, unit, sums)]
    try:
        with torch.no_grad(), dense(model):
            for start in range(0, len(windows), batch_size):
                ids = windows.ids[start : start + batch_size].to(_device(model))
                decoder(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(sums, key=lambda name: -sums[name])


def _similarity_hooks(decoder: nn.Module, unit: Unit, sums: dict[str, float]) -> list[Any]:
    layer = decoder_layers(decoder)[unit.layer_idx]
    branch = post_norm_of(decoder, layer, unit.kind) or part_of(decoder, layer, unit.kind)
    scale = getattr(layer, "residual_multiplier", 1.0)  # some layers add only so much of a branch
    entering: list[Tensor] = []
    updates: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        entering[:] = [args[0]]

    def update(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        updates[:] = [first_of(output) * scale]

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        after = first_of(output)
        # An attention updates what enters its layer, an MLP what its layer then gives back.
        if unit.kind == "mlp":
            before = after - updates[0]
        else:
            before = entering[0]
            after = after if unit.kind == "block" else before + updates[0]
        sums[unit.name] += float(torch.cosine_similarity(before, after, dim=-1).sum())

    return [
        layer.register_forward_pre_hook(enter),
        branch.register_forward_hook(update),
        layer.register_forward_hook(leave),
    ]


@dataclass(frozen=True)
class Drops:
    """How many units of an order to drop for a budget: between two numbers of them."""

    fewer: int
    more: int
    share: float
    """Of `more`, in a mean of both that is at exactly the budget; 0 where both are the same."""

    @classmethod
    def of(cls, model: nn.Module, order: Sequence[str], budget: float) -> Drops:
        """The first units of an order, up to all of it, that a kept fraction is without."""
        routing = routing_of(model)
        left = to_drop(model, budget)
        for number, name in enumerate(order):
            share = round(left / routing.prices[name], 9)
            if share < 1:
                return cls(number, number + bool(share), share)
            left -= routing.prices[name]
        return cls(len(order), len(order), 0.0)

    def runs(self) -> list[tuple[int, float]]:
        """The one or two numbers of units, and the weight of each."""
        if self.fewer == self.more:
            return [(self.fewer, 1.0)]
        return [(self.fewer, 1 - self.share), (self.more, self.share)]


def to_drop(model: nn.Module, budget: float) -> float:
    """How many units less are a budget: of the mean price, where prices differ (prices.py)."""
    # Rounded, so that 0.9 of 30 units drops 3 of them, not 2.9999999999999996.
    return round((1 - budget) * routing_of(model).num_units_of_kind, 9)


def greedy_order(
    model: nn.Module, windows: Windows, num: float, *, progress: Progress | None = None
) -> list[str]:
    """The units to drop one after another, each time the one whose loss of the windows grows least;
    where prices differ, least for its price.

    Layers below a candidate are not run again: their states are kept from the round before.

    Args:
        model: a routed model.
        windows: what the loss is measured on.
        num: how many to drop; where prices differ, how many of the mean price (as from `to_drop`),
            or some more, as whole units have it.
        progress: called with candidates tried, and candidates in all.

    Raises:
        ConfigError: `num` is more than there are routed units.
    """

    def loss(number: int, ids_1T: Tensor) -> float:
        logits_TV = unwrap(model)(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
        return float(functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum"))

    return _taken_away(model, windows.ids.split(1), num, loss, progress)[0]


def greedy_ranking(
    model: nn.Module,
    rows: Sequence[Tensor],
    num: float,
    measure: Measure,
    *,
    progress: Progress | None = None,
) -> list[str]:
    """All units, those first that are missed least: as many as are to be dropped, as in
    `greedy_order`, then the others by what was measured without each when the last was taken away.

    Args:
        model: a routed model.
        rows: token ids, (1, T) each, without padding.
        num: how many to drop, as in `greedy_order`; of none, no order is known.
        measure: what to keep small.
        progress: called with candidates tried, and candidates in all.

    Raises:
        ConfigError: `num` is more than there are routed units.
    """
    dropped, growth = _taken_away(model, rows, num, measure, progress)
    return [*dropped, *sorted(growth.keys() - set(dropped), key=lambda name: growth[name])]


def _taken_away(
    model: nn.Module,
    rows: Sequence[Tensor],
    num: float,
    measure: Measure,
    progress: Progress | None,
) -> tuple[list[str], dict[str, float]]:
    """What is dropped, and for its price the growth without each unit of the last round."""
    units, prices = routing_of(model).units, routing_of(model).prices
    if num > price_of(prices, prices) + SLACK:
        raise ConfigError(f"asked to drop {num:g} units, but only {len(units)} are routed")
    ids = [ids_1T.to(_device(model)) for ids_1T in rows]
    dropped: list[str] = []
    growth: dict[str, float] = {}
    done, total = 0, sum(len(units) - i for i in range(round(num)))  # if prices are alike

    def tried() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, max(done, total))

    while price_of(dropped, prices) < num - SLACK:
        found = _growths(model, ids, dropped, measure, tried)
        growth = {name: grown / prices[name] for name, grown in found.items()}
        dropped.append(min(growth, key=lambda name: growth[name]))
    return dropped, growth


def _growths(
    model: nn.Module,
    rows: Sequence[Tensor],
    dropped: Sequence[str],
    measure: Measure,
    tried: Callable[[], None],
) -> dict[str, float]:
    """By how much the measure grows without each unit that is not dropped yet."""
    decoder = decoder_of(model)
    states: list[list[Tensor]] = []

    def measured_from(first: int) -> float:
        """Mean over the tokens, running the decoder layers from `first` on, a row at a time."""
        total = 0.0
        for number, ids_1T in enumerate(rows):
            with run_from(decoder, first, states[number][first]):
                total += measure(number, ids_1T)
        return total / sum(ids_1T[:, 1:].numel() for ids_1T in rows)

    with torch.no_grad(), decided_by(model, StaticDrop(dropped)):
        for ids_1T in rows:
            with entering_states(decoder) as of_row:
                decoder(input_ids=ids_1T, use_cache=False)
            states.append(of_row)
        before = measured_from(len(states[0]) - 1)
    growth = {}
    for unit in routing_of(model).units:
        if unit.name not in dropped:
            with torch.no_grad(), decided_by(model, StaticDrop([*dropped, unit.name])):
                growth[unit.name] = measured_from(unit.layer_idx) - before
            tried()
    return growth


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
