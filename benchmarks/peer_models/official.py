"""Router-Tuning, the official code (CASE-Lab-UMD/Router-Tuning-Mixture-of-Depths)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peer_models.checkout import like_4, module_in
from peer_models.subject import Causal, Subject, Wanted, shared_copy


def official(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """Its patch of a model, with a token router in front of every attention."""
    code = module_in(folder / "utils/model/model_patch.py", "official_model_patch")
    model = shared_copy(base)
    model.config.is_mod = [True] * model.config.num_hidden_layers
    model.config.granularity = "attn_token"
    code.apply_router_tuning_patch(model)
    layers = list(model.model.layers)
    torch.manual_seed(wanted.seed)
    for layer in layers:
        layer.router.to(base.device, base.dtype)
        nn.init.normal_(layer.router.weight, std=float(wanted.rate < 1))
        layer.router.register_forward_hook(_threshold_at(layer, wanted.rate))
    ran_with = like_4(model)

    def kept() -> float:
        return sum(layer._last_mod_capacity for layer in layers) / len(layers)

    return Subject(Causal(model), "nothing: a mask multiplies", False, ran_with, kept)


def _threshold_at(layer: Any, rate: float) -> Callable[..., None]:
    """A hook that sets a layer's threshold so that this part of its first tokens is kept."""
    asked: list[int] = []

    def hook(router: nn.Module, args: Any, logits_BT1: Tensor) -> None:
        if not asked:
            layer.threshold = float(logits_BT1.sigmoid().float().quantile(1 - rate))
            asked.append(logits_BT1.numel())

    return hook
