"""Which units run for which tokens, by domain, and how far two adapters decide alike.

`read_text` puts the domains together and groups their tokens, `decide` runs one routed model on
them, `routing` describes what it decided and `stability` compares two. Decisions are taken with
routing on. One threshold serves all domains, so that a domain can be kept more than another; by
default it is the one that keeps the whole text at exactly the budget. It is chosen on the text that
is measured: no loss is, so nothing looks better for it, and agreement of two adapters can be told
only where both keep as much.

Shapes: U routed units, N windows of all domains, L tokens of a window, M tokens of some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from router_tuning.calibration import BATCH_SIZE, trace_at, trace_keeping
from router_tuning.config import threshold_for
from router_tuning.data import Progress, Windows, evaluation_mode
from router_tuning.errors import ConfigError, DataError
from router_tuning.evaluation.decision_statistics import (
    agreement,
    settled_units,
    units_per_token,
    variance,
)
from router_tuning.evaluation.perplexity import token_losses
from router_tuning.evaluation.token_groups import (
    Groups,
    frequency_quarters,
    kinds,
    loss_quarters,
)
from router_tuning.execution.context import routing_of
from router_tuning.record import Trace, kept_of_all, kept_of_routed
from router_tuning.sampling import routers_off

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class DomainText:
    """The windows of all domains, one behind the other, and what is known of their tokens."""

    windows: Windows
    domains: dict[str, slice]
    """Which of the windows are a domain's."""
    groups: dict[str, Groups]
    """`kind`, `frequency`, and `loss`, `next_loss`: of the token, and of what follows it."""
    loss: dict[str, float]
    """The dense model's, by domain, in nats a token."""


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a routed model decided about a text."""

    keep_UNL: Tensor
    """True where a unit ran; bool, on the CPU."""
    unit_names: tuple[str, ...]
    num_units: int
    """Units of the routed kinds in the whole model, routed or not."""
    threshold: float
    prices: Mapping[str, float]
    """What an execution of each routed unit weighs in a kept fraction."""


def read_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    domains: Mapping[str, Windows],
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> DomainText:
    """Put the domains' windows together, and group the tokens by kind, by how frequent they are in
    this text, and by the dense model's loss.

    Args:
        model: the base model, or a routed one, whose routers are off here.
        tokenizer: the model's own.
        domains: windows by the name of their domain, all of one length.
        batch_size: windows of one forward.
        progress: called with windows done, and windows in all.

    Raises:
        DataError: no windows, or windows of different lengths.
    """
    _check_lengths(domains)
    windows = Windows(
        torch.cat([w.ids for w in domains.values()]),
        torch.cat([w.answer for w in domains.values()]),
    )
    losses = []
    with torch.no_grad(), evaluation_mode(model), routers_off(model):
        for start in range(0, len(windows), batch_size):
            losses.append(token_losses(model, windows.ids[start : start + batch_size], {}))
            if progress is not None:
                progress(min(start + batch_size, len(windows)), len(windows))
    loss_NL = torch.cat(losses)
    places = dict(_slices(domains))
    groups = {
        "kind": kinds(tokenizer, windows.ids),
        "frequency": frequency_quarters(windows.ids),
        "loss": loss_quarters(torch.nn.functional.pad(loss_NL, (1, 0), value=torch.nan)),
        "next_loss": loss_quarters(torch.nn.functional.pad(loss_NL, (0, 1), value=torch.nan)),
    }
    return DomainText(
        windows, places, groups, {name: float(loss_NL[at].mean()) for name, at in places.items()}
    )


def _check_lengths(domains: Mapping[str, Windows]) -> None:
    if not any(len(windows) for windows in domains.values()):
        raise DataError("there are no windows to analyse; wanted at least one of each domain")
    lengths = {name: windows.ids.shape[1] for name, windows in domains.items()}
    if len(set(lengths.values())) > 1:
        short = min(lengths, key=lambda name: lengths[name])
        raise DataError(
            f"windows must be of one length, got {max(lengths.values())} tokens and, of "
            f"{short!r}, {lengths[short]}: it is too short for one window; give more text or "
            f"shorter windows"
        )


def _slices(domains: Mapping[str, Windows]) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, windows in domains.items():
        yield name, slice(start, start + len(windows))
        start += len(windows)


def decide(
    model: nn.Module,
    text: DomainText,
    budget: float | None = None,
    *,
    calibrated: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Decisions:
    """Run a routed model on a text, and keep what it decided.

    Args:
        model: routed; its config stays as it is.
        text: from `read_text`.
        budget: the part of this text to keep, found as in calibration (to its tolerance). None
            takes the threshold of a call that names no budget.
        calibrated: take the threshold that the adapter was calibrated to for the budget instead.
        batch_size: windows of one forward.
        progress: called with windows done, and windows in all.

    Raises:
        BudgetError: out of (0, 1), below what always runs, or with `calibrated` not calibrated.
        UnsupportedCallError: pooling="prompt", which needs prompts.
    """
    if budget is None or calibrated:
        threshold = threshold_for(routing_of(model).config, budget)
        trace = trace_at(model, text.windows, threshold, batch_size=batch_size, progress=progress)
    else:
        threshold, trace = trace_keeping(
            model, text.windows, budget, batch_size=batch_size, progress=progress
        )
    return Decisions(_stacked(trace), trace.unit_names, trace.num_units, threshold, trace.prices)


def _stacked(trace: Trace) -> Tensor:
    """The decisions of all batches: (U, N, L)."""
    return torch.stack(
        [
            torch.cat([forward.units[name].keep_BT.cpu() for forward in trace.forwards])
            for name in trace.unit_names
        ]
    )


def routing(decisions: Decisions, text: DomainText) -> dict[str, Any]:
    """Which units run, for which domains and which groups of tokens.

    Returns {"threshold", "all", "domains", "groups"}. Of all text and of each domain: {"tokens",
    "kept_fraction", "kept_of_routed", "kept_per_unit", "units_per_token", "settled_units",
    "variance"}; of each group of tokens {"tokens", "kept_of_routed", "domains"}, where a fraction
    of no tokens is None.
    """
    return {
        "threshold": decisions.threshold,
        "all": _described(decisions, slice(None)),
        "domains": {name: _described(decisions, at) for name, at in text.domains.items()},
        "groups": {
            what: {name: _of_group(decisions, text, of == index) for index, name in named}
            for what, of, named in (
                (what, groups.label_NL, tuple(enumerate(groups.names)))
                for what, groups in text.groups.items()
            )
        },
    }


def _described(decisions: Decisions, at: slice) -> dict[str, Any]:
    keep_UM = decisions.keep_UNL[:, at].flatten(1)
    kept = dict(zip(decisions.unit_names, keep_UM.double().mean(1).tolist(), strict=True))
    return {
        "tokens": keep_UM.shape[1],
        "kept_fraction": kept_of_all(kept, decisions.num_units, decisions.prices),
        "kept_of_routed": kept_of_routed(kept, decisions.prices),
        "kept_per_unit": kept,
        "units_per_token": units_per_token(keep_UM),
        "settled_units": settled_units(keep_UM),
        "variance": variance(keep_UM),
    }


def _of_group(decisions: Decisions, text: DomainText, in_NL: Tensor) -> dict[str, Any]:
    def kept(at: slice) -> dict[str, Any]:
        keep_UM = decisions.keep_UNL[:, at][:, in_NL[at]]
        tokens = keep_UM.shape[1]
        mean = float(keep_UM.double().mean()) if tokens else None
        return {"tokens": tokens, "kept_of_routed": mean}

    return {**kept(slice(None)), "domains": {name: kept(at) for name, at in text.domains.items()}}


def stability(a: Decisions, b: Decisions, text: DomainText) -> dict[str, Any]:
    """How alike two models decide about the same text: `agreement` (decision_statistics.py) over
    all text and over each domain.

    Raises:
        ConfigError: they route different units.
    """
    if a.unit_names != b.unit_names:
        raise ConfigError(
            f"decisions can be compared where the same units are routed; one model routes "
            f"{', '.join(a.unit_names)}, the other {', '.join(b.unit_names)}"
        )

    def compared(at: slice) -> dict[str, float | None]:
        return agreement(a.keep_UNL[:, at].flatten(1), b.keep_UNL[:, at].flatten(1))

    return {
        "all": compared(slice(None)),
        "domains": {name: compared(at) for name, at in text.domains.items()},
    }
