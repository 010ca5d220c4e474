"""What else could be done: one change of the recipe at a time, on little text, beside the recipe.

Each candidate of CANDIDATES tunes one setting of quality.py as that does, but for its change, and
is swept like it. What is little text for one is for all; the recipe itself is run with several
seeds, so that the spread is known that a candidate would have to beat. Writes one JSON, and
rewrites it after every run; `--continue` goes on. Example:

    python benchmarks/screen.py --train alpaca_train.jsonl --report alpaca=alpaca_report.jsonl \\
        --setting kept_window --steps 120 --batch-size 2 --positions 0.5 --seeds 0,1,2 \\
        --json benchmarks/results/screen-smollm2-135m.json

Shapes: B batch, T tokens, N real tokens, D hidden, F features.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import peers
import quality
import torch
from peft import get_peft_model
from torch import Tensor, nn

from router_tuning import RouterTuningConfig, decided_by, record
from router_tuning.cli.records import peak_rss_mb
from router_tuning.decide import Decision
from router_tuning.execution.context import ForwardContext, routers_of
from router_tuning.training.budget import Kept, RunningKept, budget_term, target_at
from router_tuning.units import Unit, decoder_of

RECIPE = "recipe"
UNIT_THRESHOLDS = "a threshold for each unit"
"""Not tuned: the recipe's adapter, with thresholds under which each unit keeps an equal share."""
IDENTITY = ("candidate", "seed", "setting", "tuning")
"""What no two runs of a file share."""
EXTRA = "extra"
"""The weights of what a router sees beside its input."""


# ---- candidates ----


class Hinge(quality.TaughtFromMemory):
    """Keeping less than the target costs nothing."""

    def _budget_loss(self, task: Tensor, kept: Kept) -> Tensor:
        loss = super()._budget_loss(task, kept)
        args, state = self.args, self.state
        target = target_at(state.global_step, state.max_steps, self.budget, args.anneal_fraction)
        running = self._running.executions / self._running.possible
        return loss if running > target else loss.detach()


class BudgetForEachUnit(quality.TaughtFromMemory):
    """Each unit has the target, instead of all of them together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight, self.args.budget_weight = self.args.budget_weight, 0.0
        self.running = {name: RunningKept() for name in routers_of(self.routed)}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The objective, and the mean over units of the budget's term."""
        seen: dict[str, Tensor] = {}
        routers = routers_of(self.routed)
        hooks = [
            router.register_forward_hook(
                lambda router, args, logits_BT, name=name: seen.update({name: logits_BT})
            )
            for name, router in routers.items()
        ]
        try:
            loss = super().compute_loss(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return loss + torch.stack([self._term(name, seen[name]) for name in routers]).mean()

    def _term(self, name: str, logits_BT: Tensor) -> Tensor:
        """The budget's term of one unit, as that of all is made."""
        args, state = self.args, self.state
        target = target_at(state.global_step, state.max_steps, self.budget, args.anneal_fraction)
        # Every second row decides at lowered thresholds, and is not counted.
        counted = Decision(logits_BT[0::2])
        gate_BT = counted.straight_through(torch.zeros(1, 1, device=logits_BT.device))
        running = self.running[name]
        running.fade(args.budget_momentum)
        mean = running.add(float(gate_BT.detach().sum()), gate_BT.numel())
        return budget_term(gate_BT.mean(), mean, target, self.weight)


class HiddenStates(quality.TaughtFromMemory):
    """The last hidden states are to be the dense model's, instead of what is predicted of them:
    the squared distance as a part of the squared length, a mean over tokens.
    """

    def task_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """As the class says."""
        teacher_BTD, _ = self.teacher(inputs)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        student_BTD, outputs = self._hidden(model, rest)
        away_BT = (student_BTD.float() - teacher_BTD.float()).square().sum(-1)
        return (away_BT / teacher_BTD.float().square().sum(-1)).mean(), outputs


class Gumbel(quality.TaughtFromMemory):
    """Decisions are drawn in training: logits have the noise of a difference of two Gumbels."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, with noise."""
        hooks = [r.register_forward_hook(_with_noise) for r in routers_of(self.routed).values()]
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()


def _with_noise(router: nn.Module, args: Any, logits_BT: Tensor) -> Tensor:
    drawn_BT = torch.rand_like(logits_BT).clamp(1e-6, 1 - 1e-6)
    return logits_BT + drawn_BT.logit()


@dataclass
class Seen:
    """What a router saw and said last, for the next one."""

    x_BTD: Tensor
    logits_BT: Tensor


Feature = Callable[[Tensor, Seen | None], Tensor]
"""(A router's input (B, T, D), what the one before it saw) -> a number for each token (B, T)."""


def position(x_BTD: Tensor, before: Seen | None) -> Tensor:
    """Of a token in its window, on a logarithmic scale."""
    at_T = torch.arange(x_BTD.shape[1], device=x_BTD.device).float()
    return (at_T + 1).log().div(math.log(256)).sub(0.8).expand(x_BTD.shape[:2])


def previous_decision(x_BTD: Tensor, before: Seen | None) -> Tensor:
    """How sure the unit before was that it runs: -0.5 to 0.5."""
    if before is None:
        return x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.float32)
    return before.logits_BT.sigmoid() - 0.5


def last_update(x_BTD: Tensor, before: Seen | None) -> Tensor:
    """How far the input is from that of the unit before, beside its own size: a logarithm."""
    if before is None:
        return x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.float32)
    away_BT = (x_BTD.float() - before.x_BTD.float()).square().mean(-1)
    return ((away_BT + 1e-6) / (x_BTD.float().square().mean(-1) + 1e-6)).log()


def seeing(feature: Feature) -> Callable[[nn.Module], None]:
    """Lets each router of a model see a feature too, with a weight that begins at 0."""

    def prepare(model: nn.Module) -> None:
        seen: dict[int, Seen] = {}
        for number, router in enumerate(routers_of(model).values()):
            router.register_parameter(EXTRA, nn.Parameter(torch.zeros(1)))
            router.register_forward_hook(_adding(feature, number, seen))

    return prepare


def _adding(feature: Feature, number: int, seen: dict[int, Seen]) -> Any:
    def add(router: nn.Module, args: tuple[Tensor], logits_BT: Tensor) -> Tensor:
        with torch.no_grad():
            found_BT = feature(args[0], seen.get(number - 1))
        logits_BT = logits_BT + router.get_parameter(EXTRA) * found_BT
        seen[number] = Seen(args[0].detach(), logits_BT.detach())
        return logits_BT

    return add


@dataclass(frozen=True)
class Candidate:
    """One change of the recipe."""

    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: float = 1.0
    """Times those of the recipe."""
    trainer: type[quality.TaughtFromMemory] = quality.TaughtFromMemory
    prepare: Callable[[nn.Module], None] = lambda model: None
    """Done to a model with fresh routers."""


CANDIDATES = {
    RECIPE: Candidate(),
    "half the steps": Candidate(steps=0.5),
    "no cross entropy": Candidate(arguments={"lm_weight": 0.0}),
    "cross entropy alone": Candidate(arguments={"objective": "lm"}),
    "last hidden states": Candidate(trainer=HiddenStates),
    "hinge": Candidate(trainer=Hinge),
    "a budget for each unit": Candidate(trainer=BudgetForEachUnit),
    "one threshold in training": Candidate(arguments={"threshold_range": 0.0}),
    "Gumbel noise": Candidate(trainer=Gumbel),
    "bottleneck routers": Candidate(config={"router": "bottleneck"}),
    "position": Candidate(prepare=seeing(position)),
    "previous decision": Candidate(prepare=seeing(previous_decision)),
    "size of the last update": Candidate(prepare=seeing(last_update)),
}


# ---- running them ----


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments ask for; None takes those of the command line."""
    options = _options(arguments)
    path = quality.opened(options)
    bench = quality.prepare(options)
    document = quality.begin(path, bench)
    done = [{name: run[name] for name in IDENTITY} for run in document["runs"]]
    for name in options.candidates:
        for seed in options.seeds if name == RECIPE else options.seeds[:1]:
            changed = _changed(options, CANDIDATES[name])
            about = _about(changed, seed)
            if {"candidate": name, **about} not in done:
                runs = _runs(replace(bench, options=changed), name, about)
                quality.add_runs(path, *runs)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    quality.add_options(parser)
    parser.add_argument("--setting", default="kept_window", choices=list(quality.SETTINGS))
    parser.add_argument(
        "--candidates", type=lambda s: s.split(","), default=list(CANDIDATES), metavar="NAMES"
    )
    parser.add_argument("--teacher", metavar="FILE", help="keep the dense model's hidden states")
    options = quality.parsed(parser, arguments)
    unknown = [name for name in options.candidates if name not in CANDIDATES]
    if unknown:
        parser.error(f"candidates are {', '.join(CANDIDATES)}; got {', '.join(unknown)}")
    options.settings, options.own_text, options.random = [options.setting], None, []
    options.static_of = "attn_token"
    return options


def _changed(options: argparse.Namespace, candidate: Candidate) -> argparse.Namespace:
    """The options with a candidate's changes."""
    changed = argparse.Namespace(**vars(options))
    changed.argument = {**options.argument, **candidate.arguments}
    changed.steps = round(options.steps * candidate.steps)
    return changed


def _about(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What tells a candidate's run from others of it."""
    tuning = quality.tuning_of(options, options.setting)
    return {"seed": seed, "setting": options.setting, "tuning": tuning}


def _runs(bench: quality.Bench, name: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Tune and sweep one candidate; of the recipe, sweep by a threshold for each unit too."""
    candidate, options, seed = CANDIDATES[name], bench.options, about["seed"]
    torch.manual_seed(seed)
    began = time.time()
    tuned = _routed(bench.trained, options, candidate)
    log = quality.train(bench, tuned, seed, candidate.trainer)
    seconds = round(time.time() - began, 1)
    if bench.trained is bench.measured:
        routed = tuned
    else:
        routed = _routed(bench.measured, options, candidate)
        for unit, router in routers_of(tuned).items():
            routers_of(routed)[unit].load_state_dict(router.state_dict())
        tuned.unload()
    run = {
        "candidate": name,
        **about,
        "tuning_seconds": seconds,
        "threads": torch.get_num_threads(),
        "trainable": sum(p.numel() for r in routers_of(routed).values() for p in r.parameters()),
        "log": log,
        "routed": quality.swept(bench, routed),
        "peak_rss_mb": peak_rss_mb(),
    }
    quality.say(f"{name}, seed {seed}", run["routed"])
    runs = [run]
    if name == RECIPE:
        runs.append({"candidate": UNIT_THRESHOLDS, **about, "routed": _by_unit(bench, routed)})
        quality.say(f"{UNIT_THRESHOLDS}, seed {seed}", runs[-1]["routed"])
    routed.unload()
    return runs


def _routed(base: Any, options: argparse.Namespace, candidate: Candidate) -> Any:
    config = {**quality.SETTINGS[options.setting], **candidate.config}
    routed = get_peft_model(base, RouterTuningConfig(budget=options.budget, **config))
    candidate.prepare(routed)
    return routed


class EqualShares:
    """Finds, in one forward of all held-back text, a threshold for each unit under which it keeps a
    share of that text, given what the units before it keep.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.at: dict[str, float] = {}

    def __call__(self, unit: Unit, x_BTD: Tensor, forward: ForwardContext) -> Tensor:
        logits_BT = forward.router(unit)(x_BTD)
        self.at[unit.name] = float(logits_BT.float().quantile(1 - self.share))
        keep_BT: Tensor = logits_BT >= self.at[unit.name]
        return keep_BT


@torch.no_grad()
def _by_unit(bench: quality.Bench, routed: Any) -> dict[str, list[dict[str, Any]]]:
    """The sweep, with thresholds under which each unit keeps the budget of held-back text."""
    routed.eval()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in bench.report}
    for budget in bench.options.budgets:
        shares = EqualShares(budget)
        with decided_by(routed, shares):
            decoder_of(routed)(input_ids=bench.held_back.ids, use_cache=False)
        for name, windows in bench.report.items():
            with decided_by(routed, peers.Thresholds(shares.at)), record(routed) as trace:
                losses = quality.losses_of(routed, windows, budget=1.0)
            row = {"budget": budget, "kept_fraction": trace.kept_fraction(), **losses}
            found[name].append({**row, "kept_per_unit": trace.kept_per_unit()})
    return found


if __name__ == "__main__":
    main()
