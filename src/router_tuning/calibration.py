"""Choose one threshold a budget, so that held-out text is kept at that fraction with routing on.

Skipping in early layers moves the logits of later ones, so the threshold is a fixed point: run,
take the quantile of the logits that were seen, run again. Changes only the config's `calibration`;
knows nothing of training or saving. Budgets are kept fractions of all units of the routed kinds and
all real tokens, the always-run prefix of sequence granularities and unrouted layers included; with
budget_in="flops" each execution weighs what it costs (prices.py).

A threshold keeps other text at the budget as far as that text is like the held-out one: calibrate
on text like that which will be served (its language, its subjects, questions with answers or bare
text), and enough of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.config import CALIBRATION_WINDOWS, check_budget
from router_tuning.data import Example, Windows, make_windows
from router_tuning.errors import BudgetError, DataError
from router_tuning.execution.context import record, routing_of
from router_tuning.execution.prompts import refuse_windows
from router_tuning.record import Trace, price_of
from router_tuning.units import decoder_of

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
TOLERANCE = 0.004
MAX_PASSES = 5
BATCH_SIZE = 8
WORTH_A_WARNING = 0.02
"""A budget that is missed by more than this is told of."""

Progress = Callable[[int, int], None]


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    held_out: Iterable[Example],
    budgets: Sequence[float] = BUDGETS,
    *,
    max_windows: int = CALIBRATION_WINDOWS,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Calibrate budgets on held-out examples; see `calibrate_windows`.

    Use text that the routers were not trained on, of the kind that will be served.
    """
    refuse_windows(model, "calibration")  # before the text is read
    wanted = _wanted(budgets)
    windows = make_windows(tokenizer, list(held_out), limit=max_windows)
    entries = _calibrated(model, windows, wanted, BATCH_SIZE, progress)
    _warn_of_misses(model, windows)
    return entries


def calibrate_windows(
    model: nn.Module,
    windows: Windows,
    budgets: Sequence[float] = BUDGETS,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Find one threshold a budget and put them into the config's `calibration`, replacing what was
    there.

    Returns the entries, sorted by budget: {"budget", "threshold", "kept_fraction",
    "kept_of_routed", "kept_per_unit"}, the kept fractions as measured on these windows at that
    threshold. A budget that is missed by more than WORTH_A_WARNING is warned of.

    Raises:
        BudgetError: no list of budgets, none in it, one out of (0, 1), or below what always runs.
        DataError: there are no windows.
        UnsupportedCallError: pooling="prompt", which needs prompts.
    """
    entries = _calibrated(model, windows, _wanted(budgets), batch_size, progress)
    _warn_of_misses(model, windows)
    return entries


def _calibrated(
    model: nn.Module,
    windows: Windows,
    wanted: list[float],
    batch_size: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    _check_windows(model, windows)
    entries: list[dict[str, Any]] = []
    with _config_as_it_was(model):
        trace = _run(model, windows, 0.0, batch_size)
        for done, budget in enumerate(wanted):
            entry, trace, _ = _fixed_point(model, windows, budget, trace, batch_size)
            entries.append(entry)
            if progress is not None:
                progress(done + 1, len(wanted))
    config = routing_of(model).config
    config.calibration = sorted(entries, key=lambda e: float(e["budget"]))
    return config.calibration


def trace_keeping(
    model: nn.Module,
    windows: Windows,
    budget: float,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> tuple[float, Trace]:
    """The threshold that keeps these very windows at a budget, and what ran at it. Nothing is
    written into the config.

    `progress` is called with windows done, and the most that there may be.

    Raises:
        As `calibrate_windows`.
    """
    _check_windows(model, windows)
    (wanted,) = _wanted([budget])
    passes = _Passes(len(windows), progress)
    with _config_as_it_was(model):
        trace = _run(model, windows, 0.0, batch_size, passes)
        entry, _, best = _fixed_point(model, windows, wanted, trace, batch_size, passes)
    passes.finish()
    return float(entry["threshold"]), best


def trace_at(
    model: nn.Module,
    windows: Windows,
    threshold: float,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Trace:
    """What runs on windows at a threshold. Nothing is written into the config.

    Raises:
        DataError: there are no windows.
        UnsupportedCallError: pooling="prompt", which needs prompts.
    """
    _check_windows(model, windows)
    with _config_as_it_was(model):
        return _run(model, windows, threshold, batch_size, progress)


def _check_windows(model: nn.Module, windows: Windows) -> None:
    if not len(windows):
        raise DataError("there are no windows to calibrate on; wanted at least one")
    refuse_windows(model, "calibration")


@contextmanager
def _config_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back what the passes inside the block change."""
    config = routing_of(model).config
    before = config.calibration, config.default_budget
    try:
        yield
    finally:
        config.calibration, config.default_budget = before


class _Passes:
    """Counts the windows of several passes, of which there may be fewer in the end."""

    def __init__(self, windows: int, progress: Progress | None) -> None:
        self._done, self._most = 0, windows * (1 + MAX_PASSES)
        self._progress = progress

    def __call__(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(self._done + done, self._most)
        if done == total:
            self._done += total

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(self._most, self._most)


def _warn_of_misses(model: nn.Module, windows: Windows) -> None:
    """Warn in the name of whoever called the caller."""
    routing = routing_of(model)
    # Routers of one number a unit keep whole units, so they can seldom come nearer than one.
    unit = 1 / routing.num_units_of_kind if routing.config.router == "bias" else 0.0
    for entry in routing.config.calibration:
        if _miss(entry) > max(WORTH_A_WARNING, unit):
            warnings.warn(_why_missed(entry, windows), stacklevel=3)


def _wanted(budgets: Sequence[float]) -> list[float]:
    """The budgets to calibrate, each once, the largest first."""
    try:
        given = None if isinstance(budgets, str) else list(budgets)
    except TypeError:  # a number, say, or a tensor of one
        given = None
    if given is None:
        raise BudgetError(
            f"budgets to calibrate must be a list of numbers, got {budgets!r}; write [0.8] for one"
        )
    wanted = sorted({check_budget(b) for b in given}, reverse=True)
    if not wanted:
        raise BudgetError("there are no budgets to calibrate; give some, such as (0.9, 0.8, 0.7)")
    if wanted[0] == 1.0:
        raise BudgetError(
            f"a budget of 1 keeps everything and needs no calibration; leave it out of {given}"
        )
    return wanted


def _why_missed(entry: dict[str, Any], windows: Windows) -> str:
    return (
        f"budget {entry['budget']:g} was missed: the nearest threshold that was found keeps "
        f"{entry['kept_fraction']:.3f} of the executions. Either there is too little text "
        f"({len(windows)} windows, {windows.ids.numel()} tokens), or too many logits are alike (as "
        f"those of fresh routers), or the decisions depend on each other so that {MAX_PASSES} "
        f"passes did not settle. Calibrate on more text, or on other budgets"
    )


def _fixed_point(
    model: nn.Module,
    windows: Windows,
    budget: float,
    trace: Trace,
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Trace, Trace]:
    """The entry of the threshold that came nearest to the budget, the last trace, and that of the
    nearest threshold.
    """
    best: dict[str, Any] | None = None
    nearest = trace
    for _ in range(MAX_PASSES):
        threshold = _threshold_keeping(trace, budget)
        trace = _run(model, windows, threshold, batch_size, progress)
        entry = {
            "budget": budget,
            "threshold": threshold,
            "kept_fraction": trace.kept_fraction(),
            "kept_of_routed": trace.kept_of_routed(),
            "kept_per_unit": trace.kept_per_unit(),
        }
        if best is None or _miss(entry) < _miss(best):
            best, nearest = entry, trace
        if _miss(entry) <= TOLERANCE:
            break
    assert best is not None
    return best, trace, nearest


def _miss(entry: dict[str, Any]) -> float:
    return abs(float(entry["kept_fraction"]) - float(entry["budget"]))


def _threshold_keeping(trace: Trace, budget: float) -> float:
    """The threshold at which the logits of a trace would be kept at the budget."""
    logit_N, price_N, always = _free_logits(trace)
    num_real = sum(int(f.real_BT.sum()) for f in trace.forwards)
    whole = trace.num_units * num_real
    unrouted = (trace.num_units - price_of(trace.unit_names, trace.prices)) * num_real
    wanted = budget * whole - unrouted - always
    if round(wanted) < 0 or not logit_N.numel():
        floor = (unrouted + always) / whole
        raise BudgetError(
            f"budget {budget:g} cannot be met: {floor:.3f} of the executions run in any case "
            "(unrouted layers and "
            "the first decide_after tokens); ask for more, route more layers, or calibrate on "
            "longer text"
        )
    logit_N, order_N = logit_N.sort(descending=True)
    price_N = price_N[order_N]
    # As many of the highest as come nearest.
    number = int((price_N.cumsum(0) - price_N / 2 < wanted).sum())
    if number == 0:
        return float(torch.nextafter(logit_N[0], torch.tensor(math.inf)))
    return float(logit_N[number - 1])


def _free_logits(trace: Trace) -> tuple[Tensor, Tensor, float]:
    """Logits of all tokens that are not kept in any case, what their executions weigh, in float64,
    and what those weigh that are.
    """
    logits, prices, always = [], [], 0.0
    for forward in trace.forwards:
        for name, unit in forward.units.items():
            assert unit.logits_BT is not None
            free_BT = (
                forward.real_BT if unit.always_BT is None else forward.real_BT & ~unit.always_BT
            )
            price = trace.prices.get(name, 1.0)
            logits.append(unit.logits_BT[free_BT].float().cpu())
            prices.append(torch.full_like(logits[-1], price, dtype=torch.float64))
            always += price * int((forward.real_BT & ~free_BT).sum())
    return torch.cat(logits), torch.cat(prices), always


def _run(
    model: nn.Module,
    windows: Windows,
    threshold: float,
    batch_size: int,
    progress: Progress | None = None,
) -> Trace:
    config = routing_of(model).config
    # A table of one budget, so that the pass goes through the same door as any other call.
    config.calibration = [{"budget": 0.5, "threshold": threshold}]
    config.default_budget = 0.5
    decoder = decoder_of(model)
    was_training = decoder.training
    decoder.eval()
    try:
        with torch.no_grad(), record(model) as trace:
            for start in range(0, len(windows), batch_size):
                ids = windows.ids[start : start + batch_size].to(next(decoder.parameters()).device)
                decoder(input_ids=ids, use_cache=False)
                if progress is not None:
                    progress(min(start + batch_size, len(windows)), len(windows))
    finally:
        decoder.train(was_training)
    return trace
