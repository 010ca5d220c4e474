"""A trial of a family that was found by its structure, before it is trusted.

Nobody has tested such a family, and a structure does not tell everything: what a unit knows of its
positions, what stands between it and the residual. So a few tokens are run under made-up decisions,
by the masked path, the skipping path and the skipping path over a cache. All three must agree.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from router_tuning.errors import RouterTuningError, UnsupportedCallError, UnsupportedModelError
from router_tuning.execution.context import dense, execute, replay, routing_of
from router_tuning.execution.visibility import sliding_window_of
from router_tuning.units import (
    ADD_A_ROW,
    Unit,
    attention_of,
    cache_argument,
    decoder_layers,
    first_of,
    input_norm_name,
    part_of,
    post_norm_of,
)

CHUNKS = (5, 1, 1, 1)  # mixers beside attention often continue by single tokens only
PADS = 2
SEED = 0


def try_out(decoder: nn.Module) -> None:
    """Run a few tokens through a routed decoder by all paths.

    Raises:
        UnsupportedModelError: they disagree, one of them fails, or a norm is where none is known.
    """
    if any(p.is_meta for p in decoder.parameters()):
        return  # there is nothing to run yet
    try:
        with torch.no_grad(), _in_eval_mode(decoder):
            _try_out(decoder)
    except RouterTuningError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{_name(decoder)} was found by its structure, and a trial of it failed with "
            f"{type(error).__name__}: {error}. {ADD_A_ROW}"
        ) from error


def _try_out(decoder: Any) -> None:
    _check_windows(decoder)
    device, total = next(decoder.parameters()).device, sum(CHUNKS)
    generator = torch.Generator().manual_seed(SEED)
    size = int(decoder.config.vocab_size)
    ids_BT = torch.randint(size, (2, total), generator=generator).to(device)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :PADS] = 0
    units = routing_of(decoder).units
    decisions = {
        unit.name: (torch.rand((2, total), generator=generator) < 0.5).to(device) for unit in units
    }
    with dense(decoder), _watched(decoder):
        _states(decoder, ids_BT, mask_BT)
    with replay(decoder, decisions):
        skipping = _states(decoder, ids_BT, mask_BT)
        others = {"over a cache": _cached_states(decoder, ids_BT, mask_BT)}
        masked = _masked_states(decoder, ids_BT, mask_BT)
    if masked is not None:
        others["by the masked path"] = masked
    for how, state_BTD in others.items():
        _compare(decoder, skipping, state_BTD, mask_BT.bool(), how)


def _check_windows(decoder: Any) -> None:
    """What we take for a sliding window must be the cache's: a trial is too short to notice one."""
    held, layers = DynamicCache(config=decoder.config).layers, decoder_layers(decoder)
    for unit in routing_of(decoder).units:
        if unit.kind == "mlp" or not held:
            continue
        window = getattr(held[unit.layer_idx], "sliding_window", None)
        seen = sliding_window_of(attention_of(decoder, layers[unit.layer_idx]))
        if seen != window:
            raise UnsupportedModelError(
                f"{_name(decoder)} was found by its structure, but the attention of {unit.name} "
                f"seems to see the latest {seen or 'tokens, all'}, and its cache keeps "
                f"{window or 'all'}. {ADD_A_ROW}"
            )


def _states(decoder: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    with execute(decoder, "skipping"):
        return first_of(tuple(decoder(ids_BT, attention_mask=mask_BT, use_cache=False).values()))


def _masked_states(decoder: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor | None:
    """None where the attention implementation takes no masks, which training will say."""
    try:
        with execute(decoder, "masked"):
            output = decoder(ids_BT, attention_mask=mask_BT, use_cache=False)
    except UnsupportedCallError:
        return None
    return first_of(tuple(output.values()))


def _cached_states(decoder: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    cache, start, parts = DynamicCache(config=decoder.config), 0, []
    name = cache_argument(decoder)
    with execute(decoder, "skipping"):
        for length in CHUNKS:
            end = start + length
            output = decoder(
                ids_BT[:, start:end],
                attention_mask=mask_BT[:, :end],
                use_cache=True,
                **{name: cache},
            )
            parts.append(first_of(tuple(output.values())))
            start = end
    return torch.cat(parts, dim=1)


def _compare(decoder: nn.Module, a: Tensor, b: Tensor, real_BT: Tensor, how: str) -> None:
    # Wrong results differ by about the size of the states; rounding, by far less.
    tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 0.1
    size, apart = float(a[real_BT].abs().max()), float((a - b)[real_BT].abs().max())
    if not apart <= tolerance * size:
        raise UnsupportedModelError(
            f"{_name(decoder)} was found by its structure, and skipping gives other states {how} "
            f"in a trial (up to {apart:.2g} apart, of size {size:.2g}), so something in it is not "
            f"as it seems. {ADD_A_ROW}"
        )


@contextmanager
def _watched(decoder: nn.Module) -> Iterator[None]:
    """Inside the block, which no unit is skipped in, each must return what its family says, and
    hand it to the residual.
    """
    layers = decoder_layers(decoder)
    with ExitStack() as stack:
        for unit in routing_of(decoder).units:
            layer = layers[unit.layer_idx]
            given: list[Tensor] = []
            part = part_of(decoder, layer, unit.kind)
            stack.callback(part.register_forward_hook(_keep(given, unit, decoder)).remove)
            post_norm, input_norm = (
                post_norm_of(decoder, layer, unit.kind),
                input_norm_name(decoder, layer),
            )
            children = [] if unit.kind == "block" else list(layer.named_children())
            for name, child in children:
                if (
                    child is not post_norm
                    and name != input_norm
                    and not isinstance(child, nn.Dropout)
                ):
                    hook = _refuse(given, f"{name!r} takes what {unit.name} gives", decoder)
                    stack.callback(child.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _keep(given: list[Tensor], unit: Unit, decoder: nn.Module) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        given[:] = [first_of(output)]
        if isinstance(output, tuple) and unit.kind != "attn":
            field = "layer_tuple" if unit.kind == "block" else "mlp_tuple"
            raise UnsupportedModelError(
                f"{_name(decoder)} was found by its structure, but {unit.name} returns a tuple; "
                f"say {field}=True. {ADD_A_ROW}"
            )

    return hook


def _refuse(given: list[Tensor], what: str, decoder: nn.Module) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if given and any(x is given[0] for x in inputs):
            raise UnsupportedModelError(
                f"{_name(decoder)} was found by its structure, but {what}, so it stands between "
                f"the unit and the residual; if it is a norm, name it in post_norms. {ADD_A_ROW}"
            )

    return hook


@contextmanager
def _in_eval_mode(decoder: nn.Module) -> Iterator[None]:
    training = [module for module in decoder.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _name(decoder: nn.Module) -> str:
    return f"model_type {decoder.config.model_type!r}"  # type: ignore[union-attr]
