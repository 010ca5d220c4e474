"""SkipGPT (EIT-NLP/SkipGPT, arXiv 2506.04179), as it is published and with its sparse inference."""

from __future__ import annotations

import importlib
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peer_models.checkout import class_name_kept, like_4, module_in, package_in
from peer_models.subject import Causal, Subject, Wanted, shared_copy


def skipgpt(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """Its layers around a model's own; routers of attentions keep at the rate, those of MLPs all.

    It draws decisions also when it does not train, by the difference of a router's two logits.
    """
    code = module_in(folder / "router_attn_mlp.py", "skipgpt_router_attn_mlp")
    model = shared_copy(base)
    options = Namespace(initial_temperature=5.0, final_temperature=1.0)
    with class_name_kept(type(model)):
        code.apply_router_attn_mlp(model, options)
    layers = list(model.model.layers)
    for layer in layers:
        _always_as_likely(layer.router_attention.weight_predictor, wanted.rate)
        _always_as_likely(layer.router_mlp.weight_predictor, 1.0)
    model.to(base.device, base.dtype).eval()
    ran_with = like_4(model, inner="block")

    def kept() -> float:
        return float(sum(layer.attn_router_zero_prob for layer in layers)) / len(layers)

    return Subject(Causal(model), "nothing: a mask multiplies", False, ran_with, kept)


def _always_as_likely(last: Any, rate: float) -> None:
    """Let a router's last map (to 2) run its unit with this probability, whatever it reads."""
    nn.init.zeros_(last.weight)
    odds = math.log(rate / (1 - rate)) if rate < 1 else 100.0
    last.bias.data = torch.tensor([odds, 0.0])


def skipgpt_sparse(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """SkipGPT's sparse inference (EIT-NLP/SkipGPT#7): kernels for CUDA, and flash attention."""
    package = package_in(folder / "inference", "skipgpt_inference")
    code = importlib.import_module(f"{package}.wrapper.model")
    model = shared_copy(base)
    model.config._attn_implementation = "flash_attention_2"
    model.config._forward_impl, model.config.sparse = "triton", True
    model.model = code.LlamaMoDModel(model.config, model.model)
    for layer in model.model.layers:
        nn.init.zeros_(layer.router_mlp.weight_predictor.weight)
    model.to(base.device, base.dtype).eval()
    return Subject(Causal(model), "queries of attentions, MLPs")
