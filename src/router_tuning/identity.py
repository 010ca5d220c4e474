"""Which base model an adapter belongs to: its name, its shape, and a fingerprint of its weights.

`identify` describes a model as a small dict for the adapter's config; `check_identity` compares a
model with such a dict and refuses another one. Reads base weights only: routers, LoRA and other
adapters put on the model never change its identity. Knows nothing of loading or saving.

Two fields stand for the weights. `fingerprint` is a sha256 over a fixed sample of every tensor,
rounded to bfloat16: the same weights in float32 and bfloat16 agree. A weight that was cast to
float16 may round to another bfloat16 than the original (about one in sixteen does), so `sample`,
one value a tensor, is kept beside it; it is compared, within the error of that rounding, only where
one of the two models is in float16.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.errors import BaseModelMismatchError

ALLOW_VARIABLE = "ROUTER_TUNING_ALLOW_CHANGED_WEIGHTS"
ELEMENTS_PER_TENSOR = 64  # hashed: enough that training a tensor, however little, shows
SAMPLED_TENSORS = 256  # in `sample`, one value each: 700 characters of the adapter's config
STRIDE = 1_000_003  # a prime: walks over rows and columns alike, whatever the shape
FLOAT16_TOLERANCE = 2.0**-7  # of the value: between half and one step of bfloat16
FLOAT16_SMALLEST = 2.0**-24  # float16 keeps no finer steps than this


def identify(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Describe the base model as plain JSON values.

    `name` is a hub id, a folder or an alias; None takes the model's own `name_or_path`.
    `fingerprint` and `sample` are None where the weights cannot be compared (quantised, not in
    memory, sharded), and `note` says which.
    """
    base = base_model_of(model)
    config = _text_config(base)
    values, dtypes, note = _sampled_values(base)
    return {
        "name": name if name is not None else getattr(base, "name_or_path", None) or None,
        "architecture": type(base).__name__,
        "model_type": getattr(config, "model_type", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        "vocab_size": getattr(config, "vocab_size", None),
        "dtype": ",".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})) or None,
        "fingerprint": _fingerprint(values) if note is None else None,
        "sample": _sample(values) if note is None else None,
        "note": note,
    }


def check_identity(
    model: nn.Module, recorded: Mapping[str, Any], *, allow_changed_weights: bool = False
) -> None:
    """Refuse a model that is not the recorded base.

    Another architecture or shape is always an error. Other weights are an error unless
    `allow_changed_weights` is true or the environment has ROUTER_TUNING_ALLOW_CHANGED_WEIGHTS=1.
    Where either side has no fingerprint (quantised weights), only the shape is compared, and a
    warning says so.

    Raises:
        BaseModelMismatchError: naming both models and what differs.
    """
    found = identify(model)
    _check_shape(found, recorded)
    if allow_changed_weights or os.environ.get(ALLOW_VARIABLE) == "1":
        return
    if found["fingerprint"] is None or recorded.get("fingerprint") is None:
        why = found["note"] or recorded.get("note") or "the adapter records no fingerprint"
        warnings.warn(f"base model checked by shape only: {why}", stacklevel=2)
        return
    if not _same_weights(found, recorded):
        raise BaseModelMismatchError(
            f"the adapter was made on {_title(recorded)} with weights {_short(recorded)}, but the "
            f"weights of {_title(found)} are {_short(found)}: same shape, other numbers. Load the "
            f"model that the adapter names, or set {ALLOW_VARIABLE}=1 (allow_changed_weights=True) "
            f"to use this one all the same; its budgets then need `calibrate` again."
        )


def base_model_of(model: nn.Module) -> nn.Module:
    """The transformers model itself: a PeftModel's base, any other model unchanged."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def is_dequantised(base: nn.Module) -> bool:
    """Whether a GGUF file's weights were made plain numbers as they were loaded. transformers still
    calls such a model quantised, since it keeps those of some families packed.
    """
    method = getattr(_quantisation(base), "quant_method", None)
    return method == "gguf" and not any(map(_is_packed, base.parameters()))


def _quantisation(base: nn.Module) -> Any:
    return getattr(getattr(base, "config", None), "quantization_config", None)


def _is_packed(parameter: nn.Parameter) -> bool:
    # One-byte floats are packed too.
    return not parameter.is_floating_point() or parameter.dtype.itemsize == 1


def _text_config(base: nn.Module) -> Any:
    config: Any = getattr(base, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The base model's own parameters under the names they had before anything was put on it.

    A PEFT layer keeps the module that it wraps as `base_layer` (`original_module` where it trains a
    copy); whatever lies beside that child is adapter. Routers are children of the decoder layers.
    """
    for wrapped in ("base_layer", "original_module"):
        inner = module._modules.get(wrapped)
        if inner is not None:
            yield from base_parameters(inner, prefix)
            return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module.named_children():
        if not name.startswith("skip_router"):
            yield from base_parameters(child, f"{prefix}{name}.")


def _sampled_values(base: nn.Module) -> tuple[list[Tensor], set[torch.dtype], str | None]:
    """A few elements of each tensor (on the CPU, in their own dtype), the dtypes, and why not."""
    parameters = _in_name_order(base)
    note = _why_not(base, parameters)
    if note is not None:
        return [], {p.dtype for p in parameters}, note
    return [_pick(p) for p in parameters], {p.dtype for p in parameters}, None


def _in_name_order(base: nn.Module) -> list[nn.Parameter]:
    """Parameters by name, numbers counted as numbers; a tied one once, under its first name."""

    def key(item: tuple[str, nn.Parameter]) -> list[tuple[int, str]]:
        return [(int(s), "") if s.isdigit() else (-1, s) for s in re.split(r"(\d+)", item[0])]

    once = {id(p): p for _, p in sorted(base_parameters(base), key=key)}
    return list(once.values())


def _why_not(base: nn.Module, parameters: list[nn.Parameter]) -> str | None:
    """Why these weights cannot be fingerprinted, or None if they can."""
    quantised = _quantisation(base) is not None and not is_dequantised(base)
    if quantised or any(map(_is_packed, parameters)):
        return "the weights are quantised, so there is no fingerprint"
    if any(p.is_meta for p in parameters):
        return "some weights are not in memory, so there is no fingerprint"
    # Subclasses of Tensor hide their numbers (torchao, DTensor).
    if any(type(p.data) is not Tensor for p in parameters):
        return "the weights are sharded or packed, so there is no fingerprint"
    return None if parameters else "the model has no weights, so there is no fingerprint"


def _pick(parameter: nn.Parameter) -> Tensor:
    """The same few elements of a tensor of this size, whatever its dtype and device."""
    count = parameter.numel()
    where = (
        torch.arange(min(ELEMENTS_PER_TENSOR, count), dtype=torch.int64) * STRIDE % max(count, 1)
    )
    flat = parameter.detach().reshape(-1)
    return flat[where.to(flat.device)].cpu()


def _fingerprint(values: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(_bfloat16_bytes(value))
    return digest.hexdigest()


def _sample(values: list[Tensor]) -> str:
    """One value of each of up to SAMPLED_TENSORS tensors, spread evenly, as base64 bfloat16."""
    taken = min(SAMPLED_TENSORS, len(values))
    # The middle element: the first one of a tensor is 0 more often than others (padding tokens).
    picked = [values[i * len(values) // taken] for i in range(taken)]
    numbers = torch.stack([value[len(value) // 2].float() for value in picked if len(value)])
    return base64.b64encode(_bfloat16_bytes(numbers)).decode("ascii")


def _bfloat16_bytes(value: Tensor) -> bytes:
    """Little-endian bytes of the values rounded to bfloat16 (as int16: numpy has no such type)."""
    return value.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()


def _same_weights(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    if found["fingerprint"] == recorded["fingerprint"]:
        return True
    in_float16 = ["float16" in str(side.get("dtype")).split(",") for side in (found, recorded)]
    if in_float16[0] == in_float16[1] or not recorded.get("sample"):
        return False
    ours, theirs = _read_sample(found["sample"]), _read_sample(recorded["sample"])
    if ours.shape != theirs.shape:
        return False
    allowed = FLOAT16_TOLERANCE * theirs.abs() + FLOAT16_SMALLEST
    return bool(((ours - theirs).abs() <= allowed).all())


def _read_sample(text: str) -> Tensor:
    raw = bytearray(base64.b64decode(text))
    return torch.frombuffer(raw, dtype=torch.bfloat16).float()


def _check_shape(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    # The class name is shown but not compared: FSDP renames it, and one decoder has several heads.
    differing = [
        f"{key} {recorded[key]} there, {found[key]} here"
        for key in ("model_type", "hidden_size", "num_layers", "vocab_size")
        if recorded.get(key) is not None and recorded[key] != found[key]
    ]
    if differing:
        raise BaseModelMismatchError(
            f"the adapter was made on {_title(recorded)}, but this is {_title(found)}: "
            f"{'; '.join(differing)}. Load the base model that the adapter names."
        )


def _title(identity: Mapping[str, Any]) -> str:
    """Such as `smollm2-135m (LlamaForCausalLM, 30 layers, hidden size 576)`."""
    return (
        f"{identity.get('name') or 'a model without a name'} ({identity.get('architecture')}, "
        f"{identity.get('num_layers')} layers, hidden size {identity.get('hidden_size')})"
    )


def _short(identity: Mapping[str, Any]) -> str:
    return str(identity.get("fingerprint"))[:12]
