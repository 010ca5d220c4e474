"""Where the prompt ends, for units whose whole prompt decides (pooling="prompt").

The boundary comes from `generate`, whose input is the prompt, from labels, which are -100 over the
prompt, or from `prompt_lengths`. Only forwards over an empty cache need it: the cache remembers
what was decided.

Shapes: B batch, T tokens of this forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.config import RoutingConfig
from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.cache import RoutedCacheLayer
from router_tuning.execution.context import ForwardContext, Routing, options_for, routing_of
from router_tuning.units import Unit, decoder_of, granularity_of, is_sequence

NO_LABEL = -100
"""The label of a token that is not learned, as everywhere in transformers."""

HOW = (
    "pass prompt_lengths=[...] (the number of real tokens of each row's prompt), or labels that "
    "are -100 over the prompt, or use generate(), whose input is the prompt"
)


NO_CACHE = (
    'pooling="official" lets the mean over everything that a forward is given decide, the answer '
    "and the padding included, so it has no meaning while an answer is made, token by token over a "
    "cache. It is for comparison: score whole texts with model(ids, use_cache=False); to generate, "
    'import the routers with pooling="prompt"'
)


def pools_prompts(config: RoutingConfig) -> bool:
    """Whether some of the units let the whole prompt decide."""
    return config.pooling == "prompt" and any(is_sequence(g) for g in config.granularities)


def pools_everything(config: RoutingConfig) -> bool:
    """Whether some of the units let all that a forward is given decide, as the official code's."""
    return config.pooling == "official" and any(is_sequence(g) for g in config.granularities)


def asks_for_prompts(model: nn.Module) -> bool:
    """Whether forwards of a model need to know, as things stand, where prompts end."""
    return _routers_decide(model) and pools_prompts(routing_of(model).config)


def asks_for_everything(model: nn.Module) -> bool:
    """Whether all that a forward is given would decide in it, as things stand."""
    return _routers_decide(model) and pools_everything(routing_of(model).config)


def _routers_decide(model: nn.Module) -> bool:
    routing, options = routing_of(model), options_for(decoder_of(model))
    return routing.enabled and not options.dense and options.decider is None


def refuse_windows(model: nn.Module, what: str) -> None:
    """Refuse to run the routers on windows of text, which do not say where a prompt ends."""
    if asks_for_prompts(model):
        raise UnsupportedCallError(
            f'{what} runs windows cut from a stream of text, but pooling="prompt" needs texts with '
            "one prompt each, whose end is known. Score conversations one by one with model(ids, "
            "prompt_lengths=[...]) at the routers' own threshold (budget None), or train with "
            'pooling="prefix", which needs no prompts'
        )


def label_starts(labels_BT: Tensor) -> Tensor:
    """The column of each row's first label, T where all are -100: (B,)."""
    labelled_BT = labels_BT != NO_LABEL
    first_B = labelled_BT.int().argmax(1)
    return first_B.where(labelled_BT.any(1), labels_BT.shape[1])


def prompt_of(
    context: ForwardContext,
    routing: Routing,
    end: int | Tensor | None,
    lengths: Any,
    position_ids: Tensor | None,
) -> Tensor | None:
    """True at the prompts' tokens (B, T); None where no unit asks, or the cache remembers.

    Args:
        context: of the forward.
        routing: what is attached.
        end: the column that prompts end before, or one a row, where it is known.
        lengths: the caller's `prompt_lengths`, which go before `end`.
        position_ids: as the forward got them.

    Raises:
        UnsupportedCallError: no boundary, or none that this forward can serve.
    """
    if context.decider is not None:
        return None
    if pools_everything(routing.config):
        _check_one_text(position_ids, context)
    if not pools_prompts(routing.config):
        return None
    if context.start:
        _check_remembered(context, routing)
        return None
    _check_one_text(position_ids, context)
    if lengths is not None:
        # Inside generate, beams and several answers repeat the rows.
        length_B = _row_lengths(lengths, context.real_BT.sum(1).tolist(), repeat=end is not None)
        device = context.real_BT.device
        prompt_BT = context.position_BT < torch.tensor(length_B, device=device)[:, None]
    elif end is not None:
        prompt_BT = context.column_T < _row_ends(end, context)
    else:
        raise UnsupportedCallError(
            f'pooling="prompt" lets the whole prompt decide, but this forward over an empty cache '
            f"does not say where the prompt ends; {HOW}"
        )
    prompt_BT = prompt_BT & context.real_BT
    empty = (~prompt_BT.any(1)).nonzero().flatten().tolist()
    if empty:
        raise UnsupportedCallError(
            f'pooling="prompt" lets the whole prompt decide, but the prompt of row {empty[0]} has '
            "no token: its labels begin with its first real token, or it is all padding. Labels "
            "must be -100 over the prompt; give texts that begin with one, or use "
            'pooling="prefix"'
        )
    return prompt_BT


def _check_remembered(context: ForwardContext, routing: Routing) -> None:
    """Refuse a filled cache that does not hold the decision of each unit."""
    for unit in _pooled_units(routing):
        layers = context.cache.layers
        layer = layers[unit.memory] if unit.memory < len(layers) else None
        if not isinstance(layer, RoutedCacheLayer) or unit.name not in layer.prompts:
            raise UnsupportedCallError(
                f"the cache holds {context.start} tokens, but not what their prompt decided for "
                f"{unit.name}: it was filled by the dense model or under given decisions, or "
                'cropped to before the end of a prompt. With pooling="prompt" the whole prompt is '
                f"one forward over an empty cache: start a new cache, and {HOW}"
            )


def _pooled_units(routing: Routing) -> list[Unit]:
    return [u for u in routing.units if is_sequence(granularity_of(routing.config, u))]


def _check_one_text(position_ids: Tensor | None, context: ForwardContext) -> None:
    """Refuse packed rows: position ids that start again among the real tokens."""
    packed = context.sequence_BT is not None
    if position_ids is not None and position_ids.ndim == 2 and not packed:
        position_BT = position_ids.expand(context.rows, -1).where(context.real_BT, -1)
        before_BT = position_BT.cummax(1).values[:, :-1]
        packed = bool((context.real_BT[:, 1:] & (position_BT[:, 1:] <= before_BT)).any())
    if packed:
        raise UnsupportedCallError(
            f'pooling="{context.config.pooling}" takes one text a row, but position_ids start '
            "again, as in rows of packed texts; pad the texts instead of packing them (a data "
            'collator without flattening), or use pooling="prefix"'
        )


def _row_ends(end: int | Tensor, context: ForwardContext) -> Tensor:
    """The columns that prompts end before: (B, 1), or (1, 1) for all rows."""
    if isinstance(end, Tensor):
        return end.to(context.real_BT.device)[:, None]
    length = context.column_T.numel()
    if end > length:
        raise UnsupportedCallError(
            f"the prompt has {end} columns, but this forward over an empty cache only {length}: "
            'with pooling="prompt" a prompt cannot be cut into chunks; run it in one forward'
        )
    return context.column_T.new_full((1, 1), end)


def _row_lengths(given: Any, real_B: list[int], *, repeat: bool) -> list[int]:
    """`prompt_lengths` as one number a row, each within the row's real tokens."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    whole = list(listed) if isinstance(listed, Iterable) else [listed] * len(real_B)
    numbers = [n.item() if isinstance(n, Tensor) and n.numel() == 1 else n for n in whole]
    wrong = [n for n in numbers if type(n) is not int or n < 1]
    lengths = [n for n in numbers if type(n) is int]
    if wrong:
        raise UnsupportedCallError(
            "prompt_lengths must be whole numbers of at least 1, the real tokens of each row's "
            f"prompt; got {wrong[0]!r}"
        )
    if repeat and lengths and len(real_B) % len(lengths) == 0:
        times = len(real_B) // len(lengths)
        lengths = [n for n in lengths for _ in range(times)]
    if len(lengths) != len(real_B):
        raise UnsupportedCallError(
            f"prompt_lengths must be one number a row: got {len(lengths)} for {len(real_B)} rows"
        )
    for row, (length, real) in enumerate(zip(lengths, real_B, strict=True)):
        if length > real:
            raise UnsupportedCallError(
                f"prompt_lengths says {length} tokens for row {row}, but this forward over an "
                f'empty cache has only {real} real ones: with pooling="prompt" a prompt cannot be '
                "cut into chunks; run it in one forward"
            )
    return lengths
