"""How much a model's output owes to each unit at each token, and what of that a router could tell.

Were a unit's output at a token weighed with 1 - e instead of 1, the model's output would diverge by
e^2 / 2 times the Fisher information of that weight. Draw each next token from the model itself:
then the square of the derivative of their log probability by a weight has the Fisher information as
its mean, and one backward pass gives it for all units and tokens at once. With kv="kept" a token's
weight weighs its key too, which later tokens miss. Knows nothing of training; changes no weight.

Shapes: B batch, T tokens, D hidden, N tokens, or sequences where these decide, of all batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from router_tuning.data import evaluation_mode
from router_tuning.execution.context import (
    execute,
    prompts_until,
    routers_of,
    routing_of,
    weighed_keys,
)
from router_tuning.execution.prompts import label_starts
from router_tuning.training.objectives import head_of, sampled_loss
from router_tuning.units import decoder_of, granularity_of, is_sequence

Progress = Callable[[int, int], None]
Inputs = Mapping[str, Tensor]
"""What a forward gets: "input_ids" (B, T), and "attention_mask" where padded. Of "labels", which no
forward gets, only where prompts end is read."""

RIDGE = 1.0
"""Weight of the squared length of a router's weights, for inputs that spread by 1. Less of it fits
the noise of single draws, and the text at hand."""
STORED_BYTES = 2**30
"""Most bytes of units' inputs that are held for the fit; of more tokens, a part is taken."""
ITERATIONS = 60


@dataclass
class Seen:
    """What a router saw, and how much it mattered."""

    inputs: list[Tensor] = field(default_factory=list)
    """(N, D), in the model's dtype."""
    squares: list[Tensor] = field(default_factory=list)
    """(N,), in nats: the squared derivative of the drawn tokens' log probability."""

    def fitted(self) -> tuple[Tensor, float] | None:
        """Weights (D,) and bias of the log sensitivity; None where nothing finite was seen."""
        if not self.inputs:
            return None
        x_ND, square_N = torch.cat(self.inputs), torch.cat(self.squares)
        believed_N = square_N.isfinite() & x_ND.isfinite().all(-1)
        if not believed_N.any() or not square_N[believed_N].any():
            return None
        return fit_log_mean(x_ND[believed_N], square_N[believed_N])

    def logits(self, weight_D: Tensor, bias: float) -> Tensor:
        """What a linear router makes of the inputs: (N,)."""
        return torch.cat([x_ND.float() @ weight_D + bias for x_ND in self.inputs])

    def mean(self) -> float:
        """The mean sensitivity; nan where nothing finite was seen."""
        square_N = torch.cat(self.squares) if self.squares else torch.zeros(0)
        return float(square_N[square_N.isfinite()].mean())


def sensitivities(
    model: nn.Module,
    batches: Sequence[Inputs],
    progress: Progress | None = None,
    *,
    seed: int = 0,
) -> dict[str, Seen]:
    """What each routed unit's router sees in the dense model, and how much its decisions matter.

    Args:
        model: a routed causal LM with fresh routers.
        batches: a row of text each, with labels where prompts decide.
        progress: called with rows done, and rows in all.
        seed: of the tokens that are drawn.
    """
    routing, config = routing_of(model), decoder_of(model).config
    deciding = {u.name: is_sequence(granularity_of(routing.config, u)) for u in routing.units}
    seen = {name: Seen() for name in deciding}
    weight = next(model.parameters())
    token_bytes = len(seen) * config.hidden_size * weight.element_size()  # type: ignore[union-attr, operator]
    tokens = sum(inputs["input_ids"].numel() for inputs in batches)
    every = max(math.ceil(tokens * token_bytes / STORED_BYTES), 1)
    generator = torch.Generator(weight.device).manual_seed(seed)
    for number, inputs in enumerate(batches, start=1):
        real_BT = real_tokens(on_device(model, inputs))
        told_BT = real_BT & (torch.arange(real_BT.shape[1], device=real_BT.device) % every == 0)
        for name, (x_BTD, score_BT) in _scores(model, inputs, generator).items():
            if deciding[name]:
                _note_sequences(seen[name], x_BTD, score_BT, real_BT)
            else:
                seen[name].inputs.append(x_BTD[told_BT])
                seen[name].squares.append(score_BT[told_BT].square())
        if progress is not None:
            progress(number, len(batches))
    return seen


def _scores(
    model: nn.Module, inputs: Inputs, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each router is given, and the derivative of drawn tokens' log probability by what it
    decides: (B, T, D) and (B, T). Without units that nothing depends on, such as those of sequences
    that end before they decide.
    """
    given = on_device(model, inputs)
    labels_BT = inputs.get("labels")
    with (
        torch.enable_grad(),
        evaluation_mode(model),
        prompts_until(model, None if labels_BT is None else label_starts(labels_BT)),
        execute(model, "masked"),
        weighed_keys(model),
        _logits_as_leaves(model) as asked,
    ):
        hidden_BTD: Tensor = decoder_of(model)(**given, use_cache=False)[0]
        loss = sampled_loss(hidden_BTD[real_tokens(given)], head_of(model), generator)
        slopes = torch.autograd.grad(loss, [leaf for _, leaf in asked.values()], allow_unused=True)
    found = {}
    for (name, (x, leaf)), slope in zip(asked.items(), slopes, strict=True):
        if slope is not None:
            # The gradient of a decision is that of the sigmoid of its logit (decide.py).
            probability = leaf.detach().sigmoid()
            found[name] = (x, slope.float() / (probability * (1 - probability)))
    return found


def _note_sequences(seen: Seen, x_BND: Tensor, score_BN: Tensor, real_BT: Tensor) -> None:
    """The mean of the tokens that decide, and what the decision for all later tokens matters, as
    shared out among these.
    """
    deciding_BN = score_BN != 0
    for x_ND, score_N, deciding_N, real_T in zip(
        x_BND, score_BN, deciding_BN, real_BT, strict=True
    ):
        number = int(deciding_N.sum())
        if not number:
            continue
        governed = max(int(real_T.sum()) - number, 1)
        seen.inputs.append(x_ND[deciding_N].float().mean(0, keepdim=True).to(x_ND.dtype))
        seen.squares.append(score_N.sum().square()[None] / governed)


@contextmanager
def _logits_as_leaves(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside the block, note what each router was given and its logits, which begin the graph: so
    that nothing but the units carries gradients.
    """
    asked: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def note(router: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            leaf = logits.detach().requires_grad_()
            asked[name] = (args[0].detach(), leaf)
            return leaf

        return note

    handles = [
        router.register_forward_hook(hook(name)) for name, router in routers_of(model).items()
    ]
    try:
        yield asked
    finally:
        for handle in handles:
            handle.remove()


def fit_log_mean(x_ND: Tensor, square_N: Tensor, ridge: float = RIDGE) -> tuple[Tensor, float]:
    """Weights (D,) and bias with exp(x @ weights + bias) = the expected square, as near as can be.

    The squares of normally distributed derivatives are spread like a gamma variable around their
    mean, whose likelihood this maximises (a generalised linear model with log link), less `ridge`
    times the squared length of the weights, for inputs divided by their spread.
    """
    x_ND = x_ND.float()
    mean_D = x_ND.mean(0)
    spread = (x_ND - mean_D).square().mean().sqrt().clamp(min=1e-6)
    z_ND = (x_ND - mean_D) / spread
    average = square_N.mean()
    # Over the mean, so that a handful of draws cannot decide; a thousandfold is no accident.
    told_N = (square_N / average).clamp(min=1e-9, max=1e3)
    weight_D = torch.zeros_like(mean_D, requires_grad=True)
    bias = torch.zeros((), device=x_ND.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_D, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def deviance() -> Tensor:
        optimizer.zero_grad()
        log_N = z_ND @ weight_D + bias
        loss = (told_N * (-log_N.clamp(-60, 60)).exp() + log_N).mean()
        loss = loss + ridge * weight_D.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(deviance)
    weights = weight_D.detach() / spread
    return weights, float(bias.detach() + average.log() - mean_D @ weights)


def on_device(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The inputs where the model is, without labels."""
    device = next(model.parameters()).device
    return {name: x.to(device) for name, x in inputs.items() if name != "labels"}


def real_tokens(inputs: Inputs) -> Tensor:
    """False at padding: (B, T)."""
    mask_BT = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if mask_BT is None else mask_BT.bool()
