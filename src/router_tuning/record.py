"""What ran: one ForwardRecord a forward, collected in a Trace. Numbers are worked out when asked
for.

Shapes: B batch, T tokens of one forward, C columns (tokens, pads included, of all forwards).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from router_tuning.errors import UnsupportedCallError


@dataclass
class UnitRecord:
    """What one unit did in one forward."""

    keep_BT: Tensor
    """True where the unit ran and counts. Never at padding."""
    write_BT: Tensor | None
    """True where a key and a value were computed; None for an MLP, which has none."""
    logits_BT: Tensor | None = None
    """The deciding logits, fp32; None where something else than a router decided."""
    threshold_B1: Tensor | None = None
    always_BT: Tensor | None = None
    """True where the unit runs whatever the logit (the prefix of sequence granularities); None for
    nowhere.
    """
    soft_BT: Tensor | None = None
    """In the differentiable path: the 0/1 gate with its straight-through gradient."""
    whole_BT: Tensor | None = None
    """All real tokens, where the unit ran for skipped ones too since that is faster, and what it
    gave for them was thrown away; None elsewhere.
    """

    @property
    def ran_BT(self) -> Tensor:
        """True where the unit computed."""
        return self.keep_BT if self.whole_BT is None else self.whole_BT


@dataclass
class ForwardRecord:
    """What one forward ran."""

    start: int
    """Column of the first token: the number of tokens seen before."""
    real_BT: Tensor
    """False at padding."""
    kept_keys_only: bool
    """Whether skipped tokens are invisible as keys (kv="kept")."""
    units: dict[str, UnitRecord] = field(default_factory=dict)
    sequence_BT: Tensor | None = None
    """Index of the packed sequence of each token; None where a row is one sequence."""


@dataclass
class Trace:
    """The forwards of a `with record(model)` block, and what they amount to."""

    num_units: int
    """Units of the routed kinds in the whole model, routed or not."""
    unit_names: tuple[str, ...]
    """The routed units."""
    forwards: list[ForwardRecord] = field(default_factory=list)
    prices: Mapping[str, float] = field(default_factory=dict)
    """What an execution of each routed unit weighs (prices.py); 1 where nothing is said."""

    def decisions(self) -> dict[str, Tensor]:
        """The decisions of consecutive forwards over one batch: unit name -> bool (B, C). Can be
        replayed.
        """
        return self._of_units("keep_BT")

    def logits(self) -> dict[str, Tensor]:
        """The deciding logits, over columns: unit name -> fp32 (B, C)."""
        return self._of_units("logits_BT")

    def real(self) -> Tensor:
        """False at padding: (B, C)."""
        return self._columns([f.real_BT for f in self.forwards])

    def kept_fraction(self) -> float:
        """Executions over all units of the routed kinds and all real tokens, each at its price;
        unrouted units count as kept.
        """
        return kept_of_all(self.kept_per_unit(), self.num_units, self.prices)

    def kept_of_routed(self) -> float:
        """The same over the routed units only."""
        return kept_of_routed(self.kept_per_unit(), self.prices)

    def kept_per_unit(self) -> dict[str, float]:
        """Fraction of real tokens for which each routed unit ran."""
        self._check()
        real = [int(f.real_BT.sum()) for f in self.forwards]

        def fraction(name: str) -> float:
            # An assistant that leaves early does not come to the units of later layers.
            ran = [(f, n) for f, n in zip(self.forwards, real, strict=True) if name in f.units]
            kept = sum(int(f.units[name].keep_BT.sum()) for f, _ in ran)
            return kept / max(sum(n for _, n in ran), 1)

        return {name: fraction(name) for name in self.unit_names}

    def _check(self) -> None:
        if not self.forwards:
            raise UnsupportedCallError(
                "nothing was recorded: no forward ran inside the block, or the routers were off"
            )

    def _of_units(self, field: str) -> dict[str, Tensor]:
        self.real()  # raises where the forwards have no columns in common
        return {
            name: self._columns([getattr(f.units[name], field) for f in self.forwards])
            for name in self.unit_names
        }

    def _columns(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Put one tensor a forward (B, T) side by side, each at its columns."""
        self._check()
        rows = self.forwards[0].real_BT.shape[0]
        if any(f.start == 0 or f.real_BT.shape[0] != rows for f in self.forwards[1:]):
            raise UnsupportedCallError(
                "the trace holds forwards over several batches, which have no columns in common; "
                "record each batch in a block of its own"
            )
        end = max(f.start + f.real_BT.shape[1] for f in self.forwards)
        first = parts[0]
        assert first is not None, "nothing of the kind was recorded"
        out_BC = first.new_zeros((first.shape[0], end))
        for forward, part_BT in zip(self.forwards, parts, strict=True):
            assert part_BT is not None, "nothing of the kind was recorded"
            out_BC[:, forward.start : forward.start + part_BT.shape[1]] = part_BT
        return out_BC.detach()


def price_of(names: Iterable[str], prices: Mapping[str, float]) -> float:
    """What one execution of each of some units weighs."""
    return sum(prices.get(name, 1.0) for name in names)


def kept_of_all(kept: Mapping[str, float], num_units: int, prices: Mapping[str, float]) -> float:
    """The kept fraction of all units of the routed kinds, whose prices have the mean 1, where
    `kept` has those of the routed ones.
    """
    ran = sum(fraction * prices.get(name, 1.0) for name, fraction in kept.items())
    return (num_units - price_of(kept, prices) + ran) / num_units


def kept_of_routed(kept: Mapping[str, float], prices: Mapping[str, float]) -> float:
    """The kept fraction of the routed units, from those of each."""
    ran = sum(fraction * prices.get(name, 1.0) for name, fraction in kept.items())
    return ran / price_of(kept, prices)


def same_decisions(a: Trace, b: Trace, delta: float) -> tuple[bool, int]:
    """Whether two traces decide alike except where a logit lies within `delta` of its threshold.

    Returns (no difference beyond delta, number of threshold flips within delta).
    """
    flips, ok = 0, True
    for name, keep_a in a.decisions().items():
        differ = keep_a != b.decisions()[name]
        margin = (a.logits()[name] - a.forwards[0].units[name].threshold_B1).abs()  # type: ignore[operator]
        flips += int((differ & (margin < delta)).sum())
        ok = ok and not bool((differ & (margin >= delta)).any())
    return ok, flips
