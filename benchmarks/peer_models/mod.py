"""Mixture of depths (astramind-ai/Mixture-of-depths, arXiv 2404.02258)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peer_models.checkout import OF_4, class_name_kept, module_in
from peer_models.subject import Causal, Subject, Wanted, shared_copy


def mod(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """Its layers around every second one of a model; their capacity makes as many attentions skip
    as are wanted in the whole model. Each skips its MLP too.
    """
    code = module_in(folder / "MoD/MoD.py", "astramind_mod")
    model = shared_copy(base)
    with class_name_kept(type(model)):
        code.apply_mod_to_hf(model)
    torch.manual_seed(wanted.seed)
    layers = list(model.model.layers)
    routed = [layer for layer in layers if isinstance(layer, code.MoD)]
    capacity = 1 - (1 - wanted.rate) * len(layers) / len(routed)
    if capacity <= 0:
        raise ValueError("every second layer cannot skip so much")
    given: Counter[str] = Counter()
    for layer in routed:
        layer.capacity = capacity
        layer.router.weight_predictor.register_forward_hook(_scaled())
        layer.register_forward_pre_hook(partial(_arguments_of_4, given), with_kwargs=True)
        turn = partial(_turned_here, model.model.rotary_emb, given)
        layer.block.register_forward_pre_hook(turn, with_kwargs=True)
        if not OF_4:
            layer.register_forward_hook(lambda _, args, output: output[0])
    model.to(base.device, base.dtype).eval()
    ran_with = ["hooks that give its layers the arguments and outputs of transformers 4.41"]
    no_decode = "no cache: a layer would put one row's keys behind another's"

    def kept() -> float:
        return 1 - (1 - given["taken"] / given["came"]) * len(routed) / len(layers)

    run = Positioned(model, cached=False)
    return Subject(run, "blocks of every second layer", True, ran_with, kept, no_decode)


def _scaled() -> Callable[..., Tensor | None]:
    """A hook that shrinks a fresh router's last map so that no token's weight is over 1: weights
    multiply what their block gives, and would grow from layer to layer until nothing is finite.
    """
    asked: list[int] = []

    def hook(last: Any, args: Any, weight_BT1: Tensor) -> Tensor | None:
        if asked:
            return None
        asked.append(weight_BT1.numel())
        most = weight_BT1.abs().max()
        last.weight.data /= most
        last.bias.data /= most
        return weight_BT1 / most

    return hook


def _arguments_of_4(
    tokens: Counter[str], layer: nn.Module, args: Any, given: dict[str, Any]
) -> tuple[Any, Any]:
    """The arguments that layers were given when this code was written."""
    tokens["came"] += args[0].shape[0] * args[0].shape[1]
    old = {"past_key_value": None, "output_attentions": False, "use_cache": False}
    names = ("attention_mask", "position_ids")
    return args, {**old, **{name: given.get(name) for name in names}}


def _turned_here(
    rotary: nn.Module, tokens: Counter[str], block: nn.Module, args: Any, given: dict[str, Any]
) -> tuple[Any, Any]:
    """Turns the positions of the tokens that a block is given: newer code turns those of all tokens
    once, before the layers.
    """
    tokens["taken"] += args[0].shape[1]
    turned = rotary(args[0], given["position_ids"])
    names = ("attention_mask", "position_ids")
    return args, {**{name: given[name] for name in names}, "position_embeddings": turned}


class Positioned(Causal):
    """Tells the position of every row's tokens, where newer code lets rows share them."""

    def more(self, ids_BT: Tensor, column: int) -> dict[str, Any]:
        """Positions."""
        position_T = torch.arange(column, column + ids_BT.shape[1], device=ids_BT.device)
        return {"position_ids": position_T.expand(ids_BT.shape)}
