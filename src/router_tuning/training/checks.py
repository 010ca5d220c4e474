"""What a router training refuses before it begins, each with what to do instead.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from router_tuning.errors import ConfigError, TrainingError
from router_tuning.execution.context import routers_of, routing_of
from router_tuning.execution.prompts import pools_everything
from router_tuning.identity import base_model_of, is_dequantised
from router_tuning.lora import lora_parameters
from router_tuning.training.arguments import REENTRANT, RouterTrainingArguments
from router_tuning.training.processes import check_launch
from router_tuning.training.safety import check_writable
from router_tuning.units import decoder_layers, decoder_of


def check_arguments(args: Any, wanted: type[RouterTrainingArguments]) -> None:
    if not isinstance(args, wanted):
        raise ConfigError(f"args must be {wanted.__name__}, got {type(args).__name__}")
    if args.n_gpu > 1:
        raise ConfigError(
            "several GPUs in one process (nn.DataParallel) are not supported; start one process a "
            "GPU with `torchrun --nproc-per-node`, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    check_launch(args)
    if args.should_save:
        check_writable(str(args.output_dir))


@contextmanager
def plain_if_dequantised(model: Any) -> Iterator[None]:
    """Let a Trainer take a model whose weights were made plain as they were loaded, from a GGUF
    file, say: transformers goes on to call it quantised, and trains no such model.
    """
    base = None if model is None else base_model_of(model)
    said = None if base is None else base.__dict__.get("is_quantized")
    if base is None or not said or not is_dequantised(base):
        yield
        return
    base.__dict__["is_quantized"] = False
    try:
        yield
    finally:
        base.__dict__["is_quantized"] = said


def check_model(model: nn.Module, args: RouterTrainingArguments) -> None:
    if pools_everything(routing_of(model).config):
        raise ConfigError(
            'pooling="official" lets routers read the answer that they are to predict, and is for '
            'comparison alone; train with pooling="prefix" or pooling="prompt"'
        )
    if not isinstance(model, PeftModel) and args.save_strategy != "no":
        raise ConfigError(
            "a checkpoint of a model with attached routers would hold the whole base model; use "
            'get_peft_model(model, RouterTuningConfig(...)), or save_strategy="no"'
        )
    routers = {p for router in routers_of(model).values() for p in router.parameters()}
    adapter = routers | set(lora_parameters(model))
    trained = {p for p in model.parameters() if p.requires_grad}
    if not trained:
        raise ConfigError("no parameter trains; load the adapter with is_trainable=True")
    if trained - adapter:
        raise ConfigError(
            f"{len(trained - adapter)} tensors of the base model would train; freeze it with "
            f"model.requires_grad_(False) before attaching the routers (get_peft_model does)"
        )


def check_checkpointing(model: nn.Module) -> None:
    for layer in decoder_layers(decoder_of(model)):
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(layer, "gradient_checkpointing", False) and getattr(
            function, "keywords", {}
        ).get("use_reentrant"):
            raise ConfigError(REENTRANT)


def check_head(ours_BV: Tensor, models_BV: Tensor, model: nn.Module) -> None:
    scale = models_BV.abs().max().clamp(min=1e-6)
    if models_BV.isfinite().all() and ((ours_BV - models_BV).abs().max() / scale) > 0.05:
        raise TrainingError(
            f"{type(model).__name__} does more from its last hidden state to its logits than an "
            "output embedding and a soft cap, so its loss cannot be computed in chunks; use "
            "another model, or report it"
        )
