"""Numbers about decisions alone: what their variance is made of, and how two sets of them agree.

Pure functions of bool tensors, True where a unit ran for a token. No number where it would be
divided by nothing.

Shapes: U units, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

SETTLED = 0.01
"""A unit that keeps all tokens but this part of them, or no more than it, hardly decides."""


def variance(keep_UM: Tensor) -> dict[str, float | None]:
    """The parts of the decisions' variance, which add up to 1: between units (a static choice of
    layers), between tokens (how many units a token gets), and the rest (which tokens a unit picks).

    `tokens_by_chance` is what would be between tokens if each unit picked as many at random: the
    mean over all shuffles of each unit's tokens.
    """
    x_UM = keep_UM.double()
    mean, of_unit_U, of_token_M = x_UM.mean(), x_UM.mean(1), x_UM.mean(0)
    total = float(mean * (1 - mean))
    units = float((of_unit_U - mean).square().mean())
    tokens = float((of_token_M - mean).square().mean())
    return {
        "units": _over(units, total),
        "tokens": _over(tokens, total),
        "rest": _over(total - units - tokens, total),
        "tokens_by_chance": _over((total - units) / len(x_UM), total),
    }


def settled_units(keep_UM: Tensor) -> dict[str, int]:
    """How many units run for (nearly) all tokens, and for (nearly) none."""
    kept_U = keep_UM.double().mean(1)
    return {
        "always": int((kept_U >= 1 - SETTLED).sum()),
        "never": int((kept_U <= SETTLED).sum()),
    }


def units_per_token(keep_UM: Tensor) -> list[int]:
    """How many tokens got 0, 1, 2, ... units."""
    counts: list[int] = torch.bincount(keep_UM.sum(0), minlength=len(keep_UM) + 1).tolist()
    return counts


def agreement(a_UM: Tensor, b_UM: Tensor) -> dict[str, float | None]:
    """How alike two sets of decisions about the same units and tokens are.

    `agreement` is the share of equal decisions, `kappa` Cohen's: over what two deciders with these
    kept fractions share by chance. `kappa_of_units` is the kappa that is left when each unit's
    tokens are shuffled (the mean over all shuffles): agreement about layers alone.
    `kappa_within_units` is over that: agreement about tokens, 0 for shuffled ones. The correlations
    are of the units' kept fractions, and of the number of units that each token gets.
    """
    a, b = a_UM.double(), b_UM.double()
    same = float((a_UM == b_UM).double().mean())
    by_chance = float(_chance(a.mean(), b.mean()))
    shuffled = float(_chance(a.mean(1), b.mean(1)).mean())
    return {
        "agreement": same,
        "kappa": _over(same - by_chance, 1 - by_chance),
        "kappa_of_units": _over(shuffled - by_chance, 1 - by_chance),
        "kappa_within_units": _over(same - shuffled, 1 - shuffled),
        "units_correlation": correlation(a.mean(1), b.mean(1)),
        "tokens_correlation": correlation(a.mean(0), b.mean(0)),
    }


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's; None where one of both does not vary."""
    a, b = a - a.mean(), b - b.mean()
    return _over(float(a @ b), float(a.norm() * b.norm()))


def _chance(a: Tensor, b: Tensor) -> Tensor:
    """The share of equal decisions of two that know nothing of each other."""
    return a * b + (1 - a) * (1 - b)


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole > 1e-12 else None
