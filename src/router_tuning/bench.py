"""Speed and memory of a routed model beside dense, controls and its own limit, in one run.

Each cell is a batch of real text and a budget. Variants take turns within a repeat, and in decoding
within a token, so that what slows the machine slows all of them; figures are medians over repeats,
and a ratio is only ever taken within a cell. `docs/measuring.md` has the method.

`realised_saving` = (dense - routed) / (dense - ideal), with
ideal = floor + (dense - floor) * (FLOPs of routed - FLOPs of floor) / (FLOPs of dense - of floor)
by cost.py, where the floor runs no routed unit under the same kv policy.

Shapes: B batch, T prompt tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from router_tuning.attach import set_budget
from router_tuning.baselines import RandomMask, StaticDrop
from router_tuning.config import threshold_for
from router_tuning.cost import Cost, cost
from router_tuning.errors import ConfigError, DataError
from router_tuning.execution.context import (
    decided_by,
    dense,
    execute,
    lowered_thresholds,
    record,
    replay,
    routing_of,
)
from router_tuning.memory import blocks_kept, blocks_returned, held_bytes, peak_bytes
from router_tuning.record import Trace
from router_tuning.units import cache_argument, decoder_of, last_columns, unwrap

Progress = Callable[[int, int], None]
Variant = Callable[[], AbstractContextManager[Any]]

VARIANTS = ("dense", "all_kept", "routed", "random", "static", "floor", "masked")
"""What is compared; docs/measuring.md says what each is."""
SURE = 3.0
"""A saving is conclusive where dense - ideal is at least so many spreads."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        prompt_tokens: lengths of prompts, one cell each.
        new_tokens: tokens to decode after the prompt; 0 measures prefill alone.
        batch_sizes: rows, one cell each.
        budgets: calibrated budgets, one cell each; None is the routers' own threshold.
        repeats: how often each variant is timed, after one unmeasured round.
        seed: of the random masks.
        variants: names to leave others out (dense and floor are always there); None for all.
        most_tokens: cells of more prompt tokens than this, all rows together, are left out.

    Raises:
        ConfigError: nothing to measure, or an unknown variant.
    """

    prompt_tokens: Sequence[int] = (512, 2048)
    new_tokens: int = 32
    batch_sizes: Sequence[int] = (1, 8)
    budgets: Sequence[float | None] = (None,)
    repeats: int = 7
    seed: int = 0
    variants: Sequence[str] | None = None
    most_tokens: int | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.variants or ()) - set(VARIANTS))
        if unknown:
            raise ConfigError(f"no variant {unknown[0]!r}; wanted some of {', '.join(VARIANTS)}")
        numbers = [*self.prompt_tokens, *self.batch_sizes, self.repeats]
        if min(numbers) < 1 or self.new_tokens < 0 or not self.cells:
            raise ConfigError(
                "a benchmark wants prompts, batches and repeats of at least 1, and a budget; got "
                f"{self}"
            )

    @property
    def cells(self) -> list[tuple[int, int, float | None]]:
        """Rows, prompt tokens and budget of each cell."""
        most = float("inf") if self.most_tokens is None else self.most_tokens
        return [
            (batch, prompt, budget)
            for batch in self.batch_sizes
            for prompt in self.prompt_tokens
            for budget in self.budgets
            if batch * prompt <= most
        ]


@dataclass(frozen=True)
class Times:
    """Seconds over repeats."""

    median: float
    spread: float
    """Distance of the quartiles of whole repeats."""

    @classmethod
    def of(cls, repeats: Sequence[Sequence[float]]) -> Times:
        """From the steps of each repeat, the same in all. A step's time is its median over the
        repeats; the mean over steps is what one takes.
        """
        seconds_RS = torch.tensor(repeats, dtype=torch.float64)
        low, high = torch.quantile(
            seconds_RS.mean(1), torch.tensor([0.25, 0.75], dtype=torch.float64)
        )
        return cls(float(seconds_RS.quantile(0.5, dim=0).mean()), float(high - low))


@torch.no_grad()
def bench(
    model: nn.Module, ids_N: Tensor, plan: Plan, *, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Measure a routed model in all cells of a plan.

    Args:
        model: routed, on the device and in the dtype to measure.
        ids_N: tokens of real text; rows are cut out of it one behind the other, from the start
            again where it ends.
        plan: what to measure.
        progress: called with (done, total).

    Raises:
        DataError: there is no text.
        BudgetError: a budget that is not calibrated.
        ConfigError: an adapter whose prompts decide.
    """
    if not ids_N.numel():
        raise DataError("a benchmark wants real text to run on, and got none")
    pooling = routing_of(model).config.pooling
    if pooling != "prefix":
        raise ConfigError(
            f'a benchmark decodes text that has no prompts, and with pooling="{pooling}" it takes '
            'more than its first tokens to decide; it measures adapters with pooling="prefix"'
        )
    for budget in plan.budgets:
        threshold_for(routing_of(model).config, budget)
    was_training = model.training
    model.eval()
    cells, rounds, found = plan.cells, plan.repeats + 1, []
    try:
        for number, (batch, prompt, budget) in enumerate(cells):

            def step(done: int, number: int = number) -> None:
                if progress is not None:
                    progress(number * rounds + done, len(cells) * rounds)

            ids_BT = _rows(ids_N, batch, prompt + plan.new_tokens)
            ids_BT = ids_BT.to(next(model.parameters()).device)
            found.append(_Cell(model, ids_BT, prompt, budget, plan).measure(step))
            step(rounds)
    finally:
        model.train(was_training)
    return found


def _rows(ids_N: Tensor, batch: int, length: int) -> Tensor:
    """Rows of text (B, length)."""
    index = torch.arange(batch * length) % ids_N.numel()
    return ids_N.cpu()[index].view(batch, length)


class _Cell:
    """One batch of text at one budget."""

    def __init__(
        self, model: nn.Module, ids_BT: Tensor, prompt: int, budget: float | None, plan: Plan
    ) -> None:
        self.model, self.ids_BT, self.prompt, self.budget = model, ids_BT, prompt, budget
        self.plan = plan

    def measure(self, step: Callable[[int], None]) -> dict[str, Any]:
        """All variants, and what follows from them."""
        routed = self._counted(self._routed)
        floor = self._counted(self._floor)
        variants = self._variants(routed.trace.kept_of_routed())
        rounds: list[dict[str, list[float]]] = []
        with blocks_kept():
            for number in range(self.plan.repeats + 1):
                step(number)
                rounds.append(self._round(variants, number))
        rounds = rounds[1:]  # the first warms up
        prefill = {name: Times.of([[took[name][0]] for took in rounds]) for name in variants}
        decode = {
            name: Times.of([took[name][1:] for took in rounds])
            for name in variants
            if self.plan.new_tokens and name != "masked"
        }
        memory = {name: self._memory(name, variant) for name, variant in variants.items()}
        batch = self.ids_BT.shape[0]
        return {
            "batch_size": batch,
            "prompt_tokens": self.prompt,
            "new_tokens": self.plan.new_tokens,
            "budget": self.budget,
            "kept_fraction": routed.trace.kept_fraction(),
            "kept_of_routed": routed.trace.kept_of_routed(),
            "kv_bytes_counted": {
                "dense": routed.whole.dense_kv_bytes,
                "routed": routed.whole.kv_bytes,
            },
            "decode_weight_bytes": {
                "dense": routed.decode.dense_weight_bytes,
                "routed": routed.decode.weight_bytes,
            },
            "prefill": _phase(prefill, routed.prefill, floor.prefill),
            "decode": _phase(decode, routed.decode, floor.decode) if decode else None,
            "end_to_end": _end_to_end(prefill, decode, self.plan.new_tokens) if decode else None,
            "memory": memory,
        }

    # --- Variants -----------------------------------------------------------------------------

    def _variants(self, rate: float) -> dict[str, Variant]:
        """What is compared, by name."""
        model, units = self.model, routing_of(self.model).units
        number = round((1 - rate) * len(units))
        wanted = self.plan.variants
        drawn = self._drawn(rate) if wanted is None or "random" in wanted else {}
        spread = {units[i * len(units) // number].name for i in range(number)} if number else set()
        every: dict[str, Variant] = {
            "dense": lambda: dense(model),
            "all_kept": self._all_kept,
            "routed": self._routed,
            "random": lambda: replay(model, drawn),
            "static": lambda: decided_by(model, StaticDrop(spread)),
            "floor": self._floor,
            "masked": self._masked,
        }
        if wanted is None:
            return every
        return {name: v for name, v in every.items() if name in (*wanted, "dense", "floor")}

    def _drawn(self, rate: float) -> dict[str, Tensor]:
        """Random decisions for the whole text. Drawn before the clock runs: the hash behind them
        takes far more operations than a router does.
        """
        chance = RandomMask(rate, self.plan.seed)
        with decided_by(self.model, chance), record(self.model) as trace:
            self._forward(self.ids_BT, None)
        return trace.decisions()

    @contextmanager
    def _routed(self) -> Iterator[None]:
        config = routing_of(self.model).config
        before = config.default_budget
        set_budget(self.model, self.budget)
        try:
            yield
        finally:
            config.default_budget = before

    def _all_kept(self) -> AbstractContextManager[Any]:
        """The routers decide, and always to run: what we cost where nothing can be saved."""
        rows = self.ids_BT.shape[0]
        return lowered_thresholds(self.model, torch.full((rows,), torch.inf))

    def _floor(self) -> AbstractContextManager[Any]:
        names = [unit.name for unit in routing_of(self.model).units]
        return decided_by(self.model, StaticDrop(names))

    @contextmanager
    def _masked(self) -> Iterator[None]:
        """What code does that multiplies by a mask: everything is computed."""
        with ExitStack() as stack:
            stack.enter_context(self._routed())
            stack.enter_context(execute(self.model, "masked"))
            yield

    # --- Runs ---------------------------------------------------------------------------------

    def _prefill(self, cached: bool = True) -> Any:
        cache = DynamicCache(config=decoder_of(self.model).config) if cached else None  # type: ignore[arg-type]
        self._forward(self.ids_BT[:, : self.prompt], cache)
        return cache

    def _decode(self, cache: Any) -> None:
        for column in range(self.prompt, self.ids_BT.shape[1]):
            self._decoded(column, cache)

    def _decoded(self, column: int, cache: Any) -> None:
        """The text's own next token, so that every variant does the same."""
        self._forward(self.ids_BT[:, column : column + 1], cache)

    def _forward(self, ids_BT: Tensor, cache: Any) -> None:
        causal: Any = unwrap(self.model)
        name = cache_argument(decoder_of(self.model))
        given = {} if cache is None else {name: cache}
        last = last_columns(1, ids_BT.device)
        causal(input_ids=ids_BT, use_cache=cache is not None, logits_to_keep=last, **given)

    def _round(self, variants: Mapping[str, Variant], turn: int) -> dict[str, list[float]]:
        """Seconds of each variant's prefill, and of each decoded token behind it (of all rows).

        Variants take turns, each time beginning with another. All of their caches are held.
        """
        seconds: dict[str, list[float]] = {}
        caches: dict[str, Any] = {}
        for name in _from(list(variants), turn):
            with variants[name]():
                start = self._now()
                cache = self._prefill(cached=name != "masked")
                seconds[name] = [self._now() - start]
            if name != "masked":
                caches[name] = cache
        for column in range(self.prompt, self.ids_BT.shape[1]):
            for name in _from(list(caches), column):
                with variants[name]():
                    start = self._now()
                    self._decoded(column, caches[name])
                    seconds[name].append(self._now() - start)
        return seconds

    def _now(self) -> float:
        if self.ids_BT.is_cuda:
            torch.cuda.synchronize(self.ids_BT.device)
        return time.perf_counter()

    def _memory(self, name: str, variant: Variant) -> dict[str, Any]:
        """Bytes that the cache holds after the whole text, and the most that was held beside the
        weights; None where the platform does not tell.
        """
        with variant(), blocks_returned():
            before = held_bytes(self.ids_BT.device)
            cache = self._prefill(cached=name != "masked")
            if name != "masked":
                self._decode(cache)
            after = peak_bytes(self.ids_BT.device)
        grown = None if before is None or after is None else max(after - before, 0)
        return {"peak_bytes": grown, "kv_bytes": None if cache is None else cache_bytes(cache)}

    def _counted(self, variant: Variant) -> _Counted:
        with variant(), record(self.model) as trace:
            cache = self._prefill()
            begun = cost(self.model, trace)
            self._decode(cache)
        return _Counted(trace, begun, cost(self.model, trace))


@dataclass(frozen=True)
class _Counted:
    """What a variant ran, by cost.py."""

    trace: Trace
    prefill: Cost
    whole: Cost

    @property
    def decode(self) -> Cost:
        return self.whole - self.prefill


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in use in a cache."""
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    return sum(x.numel() * x.element_size() for x in tensors)


def _from(names: Sequence[str], turn: int) -> list[str]:
    """The names in a circle, beginning with another each turn."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def _phase(times: dict[str, Times], routed: Cost, floor: Cost) -> dict[str, Any]:
    """Seconds of each variant, and how much of what could be saved was saved."""
    share = (routed.flops - floor.flops) / max(routed.dense_flops - floor.flops, 1.0)
    whole, least = times["dense"], times["floor"]
    ideal = least.median + (whole.median - least.median) * share
    spread = max(whole.spread, least.spread)
    possible = whole.median - ideal
    return {
        "seconds": {name: asdict(t) for name, t in times.items()},
        "flops_share": share,
        "flops_fraction": {
            "routed": routed.flops / max(routed.dense_flops, 1.0),
            "floor": floor.flops / max(floor.dense_flops, 1.0),
        },
        "ideal_seconds": ideal,
        "over_dense": {name: t.median / whole.median for name, t in times.items()},
        "realised_saving": {
            name: (whole.median - times[name].median) / possible
            for name in ("routed", "random")
            if name in times and possible > 0
        },
        "conclusive": possible >= SURE * spread,
    }


def _end_to_end(
    prefill: dict[str, Times], decode: dict[str, Times], new_tokens: int
) -> dict[str, float]:
    """Seconds of the prompt and all new tokens."""
    return {name: prefill[name].median + new_tokens * t.median for name, t in decode.items()}
