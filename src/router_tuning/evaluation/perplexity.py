"""Loss of text windows: dense, routed at budgets, and under controls that skip as much.

`window_loss` measures one model as it stands; `evaluate` puts the rows of a report together. Losses
are in nats a token. Memory stays small for any vocabulary: logits are made for a few positions at a
time.

Shapes: B windows of a batch, L tokens of a window, P positions of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.baselines import (
    Drops,
    RandomMask,
    StaticDrop,
    cosine_order,
    greedy_order,
    to_drop,
)
from router_tuning.config import check_budget, threshold_for
from router_tuning.cost import flops_fraction
from router_tuning.data import Progress, Windows, evaluation_mode
from router_tuning.errors import ConfigError, DataError, UnsupportedModelError
from router_tuning.execution.context import (
    always_skipping,
    decided_by,
    dense,
    record,
    routing_of,
)
from router_tuning.execution.prompts import refuse_windows
from router_tuning.record import Trace, price_of
from router_tuning.units import unwrap

LOGIT_BYTES = 64 * 2**20
"""Most bytes of fp32 logits at once."""

STATIC_RUNS = 2
"""Whole numbers of units around a budget, at most."""
MEASURES = ("kept_fraction", "kept_of_routed", "loss", "answer_loss", "flops_fraction")


@dataclass(frozen=True)
class LossResult:
    """Mean losses in nats a token, and over how many tokens."""

    loss: float
    answer_loss: float | None
    """Over answer tokens only. None where the windows hold none."""
    tokens: int
    """Predicted tokens: all but the first of each window."""
    answer_tokens: int


def window_loss(
    model: nn.Module,
    windows: Windows,
    *,
    batch_size: int = 8,
    budget: float | None = None,
    progress: Progress | None = None,
) -> LossResult:
    """Mean loss of the windows' tokens, each given the tokens of its window before it.

    Args:
        model: a causal LM of transformers, routed or not, or a PEFT model of one.
        windows: from `make_windows`.
        batch_size: windows of one forward. The logits' memory does not depend on it.
        budget: of a routed model; None takes its default.
        progress: called with windows done, and windows in all.

    Raises:
        DataError: there are no windows.
        UnsupportedCallError: pooling="prompt", which needs prompts.
    """
    if not len(windows):
        raise DataError("there are no windows to measure; wanted at least one")
    if "routing" in _decoder(unwrap(model)).__dict__:
        refuse_windows(model, "window_loss")
    options = {} if budget is None else {"budget": budget}
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(windows), batch_size):
            ids = windows.ids[start : start + batch_size]
            loss_BL = token_losses(model, ids, options)
            answer_BL = windows.answer[start : start + batch_size, 1:]
            sums += torch.stack([loss_BL.sum(), loss_BL[answer_BL].sum()])
            if progress is not None:
                progress(min(start + batch_size, len(windows)), len(windows))
    tokens = windows.ids[:, 1:].numel()
    answer_tokens = int(windows.answer[:, 1:].sum())
    answer_loss = float(sums[1]) / answer_tokens if answer_tokens else None
    return LossResult(float(sums[0]) / tokens, answer_loss, tokens, answer_tokens)


def token_losses(model: nn.Module, ids_BL: Tensor, options: Mapping[str, float]) -> Tensor:
    """Loss of each token but the first: float64 (B, L-1), on the CPU. Options go to the decoder."""
    causal: Any = unwrap(model)
    decoder = _decoder(causal)
    ids_BL = ids_BL.to(next(causal.parameters()).device)
    output = decoder(input_ids=ids_BL, use_cache=False, **options)
    hidden_PD = output.last_hidden_state[:, :-1].flatten(0, 1)
    target_P = ids_BL[:, 1:].flatten()
    chunk = max(LOGIT_BYTES // (4 * causal.get_input_embeddings().weight.shape[0]), 1)
    losses = [
        torch.nn.functional.cross_entropy(
            _logits(causal, output, hidden_PD[i : i + chunk]).float(),
            target_P[i : i + chunk].to(hidden_PD.device),
            reduction="none",
        )
        for i in range(0, len(target_P), chunk)
    ]
    return torch.cat(losses).double().cpu().view(len(ids_BL), -1)


def _decoder(causal: Any) -> nn.Module:
    decoder = getattr(causal, getattr(causal, "base_model_prefix", ""), None)
    if not isinstance(decoder, nn.Module):
        raise UnsupportedModelError(
            f"wanted a causal LM of transformers (a decoder and a head), "
            f"got {type(causal).__name__}"
        )
    return decoder


class _Given(nn.Module):
    """Stands where a causal LM has its decoder, and returns what the decoder gave before."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: object, **kwargs: object) -> Any:
        return self.output


def _logits(causal: Any, output: Any, hidden_PD: Tensor) -> Tensor:
    """The causal LM's own logits of some positions: (P, V).

    Its forward runs on a shallow copy whose decoder only returns these positions, so that whatever
    the family does around its head (scaling, soft-capping) is done, and the model is not touched.
    """
    given = copy.copy(output)
    given["last_hidden_state"] = hidden_PD[None]
    head = copy.copy(causal)
    head.__dict__.pop("forward", None)  # a replaced forward is bound to the model itself
    head._modules = {**causal._modules, causal.base_model_prefix: _Given(given)}
    logits: Tensor = head(use_cache=False, return_dict=True).logits[0]
    return logits


def evaluate(
    model: nn.Module,
    windows: Windows,
    budgets: Sequence[float],
    *,
    batch_size: int = 8,
    compare: bool = False,
    selection: Windows | None = None,
    seeds: Sequence[int] = (0,),
    greedy_windows: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a routed model dense and at budgets, and with `compare` controls that skip as much.

    The controls: `random` keeps tokens at the rate that the routers had in each unit, and
    `random_uniform` at their mean rate in every unit (both are means over `seeds`); `static_cosine`
    and `static_greedy` drop whole units, interpolated between whole numbers of units to exactly the
    budget. Learned static dropping is an adapter of its own, with router="bias": its rows are the
    "routed" ones of its own evaluation.

    Args:
        model: routed, with these budgets calibrated.
        windows: text that nothing was tuned, calibrated or chosen on.
        budgets: kept fractions in (0, 1].
        batch_size: windows of one forward.
        compare: whether to measure the controls.
        selection: other windows, on which static dropping is chosen. Needed with `compare`.
        seeds: of the random masks.
        greedy_windows: how many selection windows the greedy choice runs on; it is slow.
        progress: called with windows done, and windows in all.

    Returns:
        `{"dense": {"loss", "answer_loss", "tokens"}, "routed": [{"budget", *MEASURES}, ...]}`; with
        `compare` also lists of the same form under the controls' names. Rows of random masks add
        "seeds" and "loss_per_seed"; rows of static dropping add "units": the dropped units, one
        list for each of the one or two whole numbers of units that the row interpolates.

    Raises:
        BudgetError: a budget that is out of range or not calibrated.
        ConfigError: `compare` without selection windows, or without seeds.
        UnsupportedCallError: pooling="prompt", which needs prompts.
    """
    refuse_windows(model, "evaluate")
    budgets = [check_budget(b) for b in dict.fromkeys(budgets)]
    for budget in budgets:  # before hours of work, not after
        threshold_for(routing_of(model).config, budget)
    run = _Runs(windows, batch_size, progress)
    run.total = (1 + len(budgets)) * len(windows)
    if compare:
        _check_controls(windows, selection, seeds)
        run.total += _control_passes(budgets, seeds) * len(windows)

    with dense(model):
        base = run.loss(model)
    rows, rates = [], []
    for budget in budgets:
        row, trace = run.row(model, budget)
        rows.append(row)
        rates.append(trace.kept_per_unit())
    result: dict[str, Any] = {
        "dense": {"loss": base.loss, "answer_loss": base.answer_loss, "tokens": base.tokens},
        "routed": rows,
    }
    if compare and selection is not None:
        result["random"] = _random_rows(run, model, rows, rates, seeds)
        uniform = [row["kept_of_routed"] for row in rows]
        result["random_uniform"] = _random_rows(run, model, rows, uniform, seeds)
        result |= _static_controls(run, model, budgets, selection, greedy_windows)
    return result


def _check_controls(windows: Windows, selection: Windows | None, seeds: Sequence[int]) -> None:
    if selection is None or not len(selection):
        raise ConfigError(
            "compare chooses which units to drop on text of its own: give selection windows, such "
            "as those held back for calibration"
        )
    if torch.equal(selection.ids, windows.ids):
        raise ConfigError(
            "selection and windows are the same text: dropping chosen on the text that it is "
            "measured on looks better than it is; give other text for one of them"
        )
    if not seeds:
        raise ConfigError("compare needs at least one seed for its random masks, got none")


def _control_passes(budgets: Sequence[float], seeds: Sequence[int]) -> int:
    """How often the controls run over the windows, at most; choosing what to drop is not
    counted.
    """
    return 2 * len(budgets) * (len(seeds) + STATIC_RUNS)


class _Runs:
    """Measures one set of windows again and again, and counts the windows done."""

    def __init__(self, windows: Windows, batch_size: int, progress: Progress | None) -> None:
        self.windows = windows
        self.batch_size = batch_size
        self.progress = progress
        self.done = 0
        self.total = len(windows)

    def loss(self, model: nn.Module, budget: float | None = None) -> LossResult:
        def advance(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(self.done + done, self.total)

        result = window_loss(
            model, self.windows, batch_size=self.batch_size, budget=budget, progress=advance
        )
        self.done += len(self.windows)
        return result

    def leave_out(self, runs: int) -> None:
        """Count runs that turned out not to be needed as done."""
        self.done += runs * len(self.windows)
        if self.progress is not None and runs:
            self.progress(self.done, self.total)

    def row(self, model: nn.Module, budget: float) -> tuple[dict[str, Any], Trace]:
        """A report's row at a budget, and the trace behind it."""
        with always_skipping(model), record(model) as trace:
            result = self.loss(model, budget)
        return {"budget": budget, **_measures(model, result, trace)}, trace

    def decided(self, model: nn.Module, decider: RandomMask | StaticDrop) -> dict[str, Any]:
        """A row's measures where something else than the routers decides."""
        with always_skipping(model), decided_by(model, decider), record(model) as trace:
            result = self.loss(model, 1.0)  # nothing is decided by a threshold
        return _measures(model, result, trace)


def _measures(model: nn.Module, result: LossResult, trace: Trace) -> dict[str, Any]:
    return {
        "kept_fraction": trace.kept_fraction(),
        "kept_of_routed": trace.kept_of_routed(),
        "loss": result.loss,
        "answer_loss": result.answer_loss,
        "flops_fraction": flops_fraction(model, trace),
    }


def _random_rows(
    run: _Runs,
    model: nn.Module,
    routed: Sequence[Mapping[str, Any]],
    rates: Sequence[float | Mapping[str, float]],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for each routed row: random masks at the rates it had."""
    found = []
    for row, rate in zip(routed, rates, strict=True):
        runs = [run.decided(model, RandomMask(rate, seed)) for seed in seeds]
        mean = _weighted([(one, 1 / len(runs)) for one in runs])
        losses = [one["loss"] for one in runs]
        found.append(
            {"budget": row["budget"], **mean, "seeds": list(seeds), "loss_per_seed": losses}
        )
    return found


def _static_controls(
    run: _Runs,
    model: nn.Module,
    budgets: Sequence[float],
    selection: Windows,
    greedy_windows: int,
) -> dict[str, list[dict[str, Any]]]:
    """Dropping whole units, chosen on the selection windows by either criterion."""
    few = selection.take(range(min(greedy_windows, len(selection))))
    with evaluation_mode(model):
        cosine = cosine_order(model, selection, batch_size=run.batch_size)
        greedy = greedy_order(model, few, most_to_drop(model, min(budgets)))
    return {
        "static_cosine": _static_rows(run, model, budgets, cosine),
        "static_greedy": _static_rows(run, model, budgets, greedy),
    }


def most_to_drop(model: nn.Module, budget: float) -> float:
    """What greedy dropping has to come to for a budget: whole units, no more than are routed."""
    prices = routing_of(model).prices
    return min(math.ceil(to_drop(model, budget)), price_of(prices, prices))


def _static_rows(
    run: _Runs, model: nn.Module, budgets: Sequence[float], order: Sequence[str]
) -> list[dict[str, Any]]:
    drops = {budget: Drops.of(model, order, budget).runs() for budget in budgets}
    needed = sorted({number for runs in drops.values() for number, _ in runs})
    measured = {number: run.decided(model, StaticDrop(order[:number])) for number in needed}
    run.leave_out(STATIC_RUNS * len(budgets) - len(needed))
    return [
        {
            "budget": budget,
            **_weighted([(measured[number], share) for number, share in runs]),
            "units": [list(order[:number]) for number, _ in runs],
        }
        for budget, runs in drops.items()
    ]


def _weighted(rows: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, Any]:
    """The weighted mean of each measure; None where it is None."""
    return {
        name: None if rows[0][0][name] is None else sum(row[name] * weight for row, weight in rows)
        for name in MEASURES
    }
