"""Routers: from a unit's normed input to one logit a token. They know nothing of thresholds.

Fresh routers give the same positive logit everywhere, so a freshly attached model keeps everything.
All of them compute in fp32, whatever the model's dtype: updates near the threshold vanish in bf16.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from router_tuning.config import RoutingConfig

Router = nn.Module


class LinearRouter(nn.Module):
    """Scores each token with one linear map (Router-Tuning, He et al. 2025, eq. 5, with a bias):
    (B, T, D) -> (B, T).
    """

    def __init__(self, hidden_size: int, init_bias: float) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, init_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        score = self.score
        if torch.is_autocast_enabled(x_BTD.device.type):
            return _in_fp32(score, x_BTD)
        weight: Tensor = score.weight
        bias: Tensor = score.bias
        if weight.dtype != torch.float32:
            weight, bias = weight.float(), bias.float()
        # In decoding this is most of what routing costs: a product and a sum take less time there
        # than the module's call, or a product with a bias.
        x_ND = x_BTD.float().reshape(-1, x_BTD.shape[-1])
        return (torch.mm(x_ND, weight.t()) + bias).view(x_BTD.shape[:-1])


class BottleneckRouter(nn.Module):
    """Scores each token with a small SiLU network: (B, T, D) -> (B, T)."""

    def __init__(self, hidden_size: int, width: int, init_bias: float) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(hidden_size, width, dtype=torch.float32),
            nn.SiLU(),
            nn.Linear(width, 1, dtype=torch.float32),
        )
        last = self.score[2]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.constant_(last.bias, init_bias)  # type: ignore[arg-type]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return _in_fp32(self.score, x_BTD)


class BiasRouter(nn.Module):
    """One learned logit for every token: learned static dropping, the control for token routing."""

    def __init__(self, init_bias: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), init_bias, dtype=torch.float32))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.bias.float().expand(x_BTD.shape[:-1])


def scalar_bias(router: Router) -> nn.Parameter | None:
    """The number that shifts all logits of a router (of the active one of several); None where it
    is frozen.
    """
    biases = [p for name, p in router.named_parameters() if name.endswith("bias")]
    trainable = [p for p in biases if p.numel() == 1 and p.requires_grad]
    return trainable[-1] if trainable else None


def input_weight(router: Router) -> nn.Parameter | None:
    """The matrix that a router's input meets first; None where it is frozen, or there is none."""
    matrices = (p for p in router.parameters() if p.ndim == 2 and p.requires_grad)
    return next(matrices, None)


def _in_fp32(score: nn.Module, x_BTD: Tensor) -> Tensor:
    # Autocast would take the fp32 product back to bf16.
    if torch.is_autocast_enabled(x_BTD.device.type):
        with torch.autocast(x_BTD.device.type, enabled=False):
            return _in_fp32(score, x_BTD)
    # A model that is cast as a whole takes its routers along, all at once.
    logits: Tensor
    if next(score.parameters()).dtype == torch.float32:
        logits = score(x_BTD.float())
    else:
        raised = {name: p.float() for name, p in score.named_parameters()}
        logits = functional_call(score, raised, x_BTD.float())
    return logits.squeeze(-1)


_BUILDERS: dict[str, Callable[[RoutingConfig, int], Router]] = {
    "linear": lambda config, hidden: LinearRouter(hidden, config.init_bias),
    "bottleneck": lambda config, hidden: BottleneckRouter(
        hidden, config.router_hidden, config.init_bias
    ),
    "bias": lambda config, hidden: BiasRouter(config.init_bias),
}


def make_router(
    config: RoutingConfig, hidden_size: int, device: torch.device | str | None = None
) -> Router:
    """A fresh router of the config's kind, which keeps everything."""
    return _BUILDERS[config.router](config, hidden_size).to(device)
