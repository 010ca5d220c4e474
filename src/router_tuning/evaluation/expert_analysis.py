"""Which experts of a mixture get tokens and which run them, dense and routed, by domain.

`count_experts` counts, for every layer that has experts, the tokens assigned to each expert by the
mixture's own router, and those executed: where the layer's MLP (or block) was kept. One pass on the
masked path has both, as it takes skipped tokens to the experts too; the decisions that it replays
are those of `routing_analysis.decide`, so counts and decisions are of the same run. Only counts are
held: their size does not grow with the text.

Measures of a layer, on its counts over experts:

- load: an expert's tokens over what each would get if all the assigned ones were spread evenly.
- entropy: of the distribution over experts, as a part of log E: 1 where all get as many, 0 where
  one gets all.
- specialisation: the mutual information of expert and domain, with every domain weighing the same,
  as a part of its largest value, log D: 0 where no expert knows of domains, 1 where no two domains
  share one. Equal to the Jensen-Shannon divergence of the domains' distributions (Lin 1991, IEEE
  Trans. Inf. Theory 37); as a measure of experts, Chen et al. 2023 (Mod-Squad, CVPR), section 3.

Shapes: D domains, M layers with experts, E experts, k experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.calibration import BATCH_SIZE
from router_tuning.data import Progress, evaluation_mode
from router_tuning.errors import ConfigError, UnsupportedModelError
from router_tuning.evaluation.decision_statistics import correlation
from router_tuning.evaluation.routing_analysis import Decisions, DomainText
from router_tuning.execution.context import execute, replay
from router_tuning.sampling import routers_off
from router_tuning.units import decoder_of, mixture_layers


@dataclass(frozen=True, eq=False)
class ExpertCounts:
    """Tokens of each expert: int64, on the CPU."""

    layers: tuple[int, ...]
    """The decoder layers that have experts."""
    domains: tuple[str, ...]
    assigned: list[Tensor]
    """By layer (D, E): tokens that the mixture's router gave to the expert."""
    executed: list[Tensor]
    """By layer (D, E): those of them for which the layer's MLP ran."""


def check_mixture(model: nn.Module) -> None:
    """UnsupportedModelError where no layer has experts."""
    decoder = decoder_of(model)
    if not mixture_layers(decoder):
        raise UnsupportedModelError(
            f"the use of experts can be told of a mixture of experts, but no MLP of "
            f"{type(decoder).__name__} has any; analyse its routing without them"
        )


def count_experts(
    model: nn.Module,
    text: DomainText,
    decisions: Decisions | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> ExpertCounts:
    """Count the tokens assigned to each expert, and those it executes.

    Args:
        model: a mixture, routed where there are decisions.
        text: from `read_text`.
        decisions: what `decide` found for this model and text. None for the dense model: its
            routers are off, and all that is assigned is executed.
        batch_size: windows of one forward.
        progress: called with windows done, and windows in all.

    Raises:
        UnsupportedModelError: no layer has experts, or they are not told by number to which of them
            a token goes.
        ConfigError: the model does not route the units of the decisions.
    """
    check_mixture(model)
    counter = _Counter(model, text, decisions)
    done, total = 0, len(text.windows)
    with torch.no_grad(), evaluation_mode(model), counter.watching():
        for name, at in text.domains.items():
            for start in range(at.start, at.stop, batch_size):
                counter.run(name, slice(start, min(start + batch_size, at.stop)))
                done = min(start + batch_size, at.stop)
                if progress is not None:
                    progress(done, total)
    return counter.counts()


class _Counter:
    """Runs windows, and adds up which experts their tokens go to."""

    def __init__(self, model: nn.Module, text: DomainText, decisions: Decisions | None) -> None:
        self.model, self.text, self.decisions = model, text, decisions
        self.decoder = decoder_of(model)
        self.experts = mixture_layers(self.decoder)
        self.domains = list(text.domains)
        shape = {index: (2, len(self.domains), _number(x)) for index, x in self.experts.items()}
        self.found = {index: torch.zeros(s, dtype=torch.long) for index, s in shape.items()}
        self.domain = 0
        self.keep: dict[str, Tensor] = {}
        """Of this batch, by unit: (B, L)."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what the experts are called with inside the block."""
        with ExitStack() as stack:
            for index, experts in self.experts.items():
                hook = experts.register_forward_pre_hook(self._counting(index), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _counting(self, index: int) -> Any:
        def count(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chosen_Mk = _chosen(experts, [*args, *kwargs.values()]).cpu()
            of_domain = self.found[index][:, self.domain]
            for into, chosen in zip(
                of_domain, (chosen_Mk, chosen_Mk[self._ran(index)]), strict=True
            ):
                into += torch.bincount(chosen.flatten(), minlength=len(into))

        return count

    def _ran(self, index: int) -> Tensor | slice:
        """The tokens of this batch for which the experts of a layer run."""
        names = (f"layers.{index}.{kind}" for kind in ("mlp", "block"))
        return next((self.keep[name].flatten() for name in names if name in self.keep), slice(None))

    def run(self, domain: str, rows: slice) -> None:
        """Run some windows of a domain."""
        self.domain = self.domains.index(domain)
        ids = self.text.windows.ids[rows].to(next(self.decoder.parameters()).device)
        if self.decisions is None:
            with routers_off(self.model):
                self.decoder(input_ids=ids, use_cache=False)
            return
        names = self.decisions.unit_names
        self.keep = dict(zip(names, self.decisions.keep_UNL[:, rows], strict=True))
        there = {name: keep_BL.to(ids.device) for name, keep_BL in self.keep.items()}
        with replay(self.model, there), execute(self.model, "masked"):
            self.decoder(input_ids=ids, use_cache=False)

    def counts(self) -> ExpertCounts:
        """What was counted.

        Raises:
            UnsupportedModelError: the experts of a layer were never called as a module.
        """
        for index, found in self.found.items():
            if not found[0].any():
                raise _unknown(self.experts[index])
        assigned, executed = ([of[i] for of in self.found.values()] for i in (0, 1))
        return ExpertCounts(tuple(self.found), tuple(self.domains), assigned, executed)


def _number(experts: nn.Module) -> int:
    return int(experts.num_experts)  # type: ignore[arg-type]


def _chosen(experts: nn.Module, arguments: list[Any]) -> Tensor:
    """The experts of each token among what the experts are called with: (tokens, k)."""
    for value in arguments:
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            return value
    raise _unknown(experts)


def _unknown(experts: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(experts).__name__} is not called with the numbers of the experts that each token "
        "goes to, so their tokens cannot be counted; wanted experts behind a top-k router, as in "
        "transformers' own mixtures"
    )


def expert_use(counts: ExpertCounts) -> list[dict[str, Any]]:
    """The counts and measures of each layer that has experts.

    Returns a list of {"layer", "executed_fraction", "assigned", "executed", "domains"}; of what is
    assigned and executed {"tokens", "load", "entropy", "specialisation"}: tokens and load one
    number an expert, a measure None where it would be of nothing, specialisation None for one
    domain. "domains" has the tokens by domain.
    """
    return [
        _layer_use(layer, assigned_DE, executed_DE, counts.domains)
        for layer, assigned_DE, executed_DE in zip(
            counts.layers, counts.assigned, counts.executed, strict=True
        )
    ]


def _layer_use(
    layer: int, assigned_DE: Tensor, executed_DE: Tensor, domains: tuple[str, ...]
) -> dict[str, Any]:
    even = float(assigned_DE.sum()) / assigned_DE.shape[1]

    def described(tokens_DE: Tensor) -> dict[str, Any]:
        tokens_E = tokens_DE.sum(0)
        return {
            "tokens": tokens_E.tolist(),
            "load": (tokens_E.double() / even).tolist(),
            "entropy": entropy(tokens_E),
            "specialisation": specialisation(tokens_DE),
        }

    return {
        "layer": layer,
        "executed_fraction": float(executed_DE.sum() / assigned_DE.sum()),
        "assigned": described(assigned_DE),
        "executed": described(executed_DE),
        "domains": {
            name: {"assigned": assigned_E.tolist(), "executed": executed_E.tolist()}
            for name, assigned_E, executed_E in zip(domains, assigned_DE, executed_DE, strict=True)
        },
    }


def entropy(tokens_E: Tensor) -> float | None:
    """Shannon's, of the experts' tokens, as a part of log E; None where there are no tokens."""
    total = float(tokens_E.sum())
    if not total or len(tokens_E) < 2:
        return None
    return float(torch.special.entr(tokens_E.double() / total).sum()) / math.log(len(tokens_E))


def specialisation(tokens_DE: Tensor) -> float | None:
    """Mutual information of expert and domain, domains weighing the same, as a part of log D; None
    where fewer than two domains have tokens.
    """
    tokens_DE = tokens_DE[tokens_DE.sum(1) > 0].double()
    if len(tokens_DE) < 2:
        return None
    share_DE = tokens_DE / tokens_DE.sum(1, keepdim=True)
    within = torch.special.entr(share_DE).sum(1).mean()
    information = float(torch.special.entr(share_DE.mean(0)).sum() - within)
    return max(information, 0.0) / math.log(len(tokens_DE))


def executed_stability(a: ExpertCounts, b: ExpertCounts) -> dict[str, float | None]:
    """How alike two adapters treat the experts of one model: Pearson's correlation of the executed
    fractions of experts (executed over assigned; those that either was assigned none are left out).

    `experts_correlation` is over all experts of all layers, so that it also has how much each layer
    runs; `within_layers` is of what is left when each layer's mean is taken off. None where nothing
    varies.

    Raises:
        ConfigError: the counts are of different layers.
    """
    if a.layers != b.layers:
        raise ConfigError(
            f"experts can be compared in the same layers; one has them in {a.layers}, the other in "
            f"{b.layers}"
        )
    pairs = [
        _executed_fractions(*layer)
        for layer in zip(a.assigned, a.executed, b.assigned, b.executed, strict=True)
    ]
    whole = torch.cat(pairs, dim=1)
    centred = torch.cat([of - of.mean(1, keepdim=True) for of in pairs], dim=1)
    return {
        "experts_correlation": correlation(whole[0], whole[1]),
        "within_layers": correlation(centred[0], centred[1]),
    }


def _executed_fractions(*of_layer: Tensor) -> Tensor:
    """Of the experts that both were assigned tokens: (2, experts)."""
    a_assigned, a_executed, b_assigned, b_executed = (tokens.sum(0).double() for tokens in of_layer)
    both = (a_assigned > 0) & (b_assigned > 0)
    return torch.stack([a_executed / a_assigned, b_executed / b_assigned])[:, both]


def experts_entry(dense: ExpertCounts, routed: Mapping[str, ExpertCounts]) -> dict[str, Any]:
    """The JSON's part about experts: {"dense", "adapters", "pairs"}, the use of experts before and
    with routers, and how alike each two of the adapters treat them.
    """
    return {
        "dense": expert_use(dense),
        "adapters": [{"name": name, "layers": expert_use(of)} for name, of in routed.items()],
        "pairs": [
            {"a": a, "b": b, **executed_stability(routed[a], routed[b])}
            for a, b in combinations(routed, 2)
        ],
    }
