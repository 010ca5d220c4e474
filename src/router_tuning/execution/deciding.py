"""What a unit does in a forward: its router's logits, or whatever decides instead of it.

Shapes: B batch, T tokens of this forward, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from router_tuning.decide import Decision, pool_prefix, pool_prompt
from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.cache import PrefixLogits, PromptLogit, RoutedCacheLayer
from router_tuning.execution.call import Decided
from router_tuning.execution.context import ForwardContext
from router_tuning.units import Unit


def decide(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decided:
    """What a unit does in this forward; `layer` remembers what a sequence decision needs.

    Raises:
        UnsupportedCallError: the unit is not given the forward's tokens.
    """
    if x_BTD.shape[:2] != context.real_BT.shape:
        raise UnsupportedCallError(
            f"{unit.name} was called with {tuple(x_BTD.shape[:2])} of the forward's "
            f"{tuple(context.real_BT.shape)} (rows, tokens), so what it decides has no place; "
            "leave its layer out of `layers`"
        )
    if context.decider is not None:
        keep_BT = _at_real(context.decider(unit, context.read(unit, x_BTD), context), context)
        return Decided(keep_BT, keep_BT.float() if context.masked else None, None)
    if unit.kind in context.sequence_kinds:
        return _by_sequence(unit, x_BTD, context, layer)
    logits_BT = context.router(unit)(context.read(unit, x_BTD))
    if x_BTD.shape[1] == 1 and not context.masked:
        return _by_host(_constant(logits_BT), context)
    return _by_threshold(Decision(logits_BT), context)


def _by_sequence(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decided:
    """As decided before, or with this forward."""
    settled_B = _settled(unit, context, layer)
    if settled_B is not None:
        return _as_settled(settled_B, context)
    decision = _POOLINGS[context.config.pooling](unit, x_BTD, context, layer)
    settled_B = _settled(unit, context, layer)
    if settled_B is not None:  # with this forward
        return _as_settled(settled_B, context, decision.always_BT)
    if x_BTD.shape[1] == 1 and decision.always_BT is None and not context.masked:
        return _by_host(_constant(decision.logits_BT), context)
    return _by_threshold(decision, context)


def _by_threshold(decision: Decision, context: ForwardContext) -> Decided:
    logits_BT = _constant(decision.logits_BT)
    if context.masked:
        # Padding is gated like any token, since nobody reads it: fresh routers then change no bit
        # there either.
        soft_BT = decision.straight_through(context.threshold_B1)
        return Decided(
            (soft_BT.detach() > 0.5) & context.real_BT, soft_BT, logits_BT, decision.always_BT
        )
    keep_BT = _at_real(decision.keep(context.threshold_B1), context)
    return Decided(keep_BT, None, logits_BT, decision.always_BT)


def _constant(logits_BT: Tensor) -> Tensor:
    return logits_BT.detach() if logits_BT.requires_grad else logits_BT


def _by_host(logits_B1: Tensor, context: ForwardContext) -> Decided:
    """In decoding: a number a row is compared on the host, where a tensor operation costs more than
    that. Rows that agree share the forward's own tensors.
    """
    pairs = zip(logits_B1.tolist(), context.thresholds, strict=True)
    keep_B = [logit >= threshold for (logit,), threshold in pairs]
    if all(keep_B):
        return Decided(context.real_BT, None, logits_B1, None, context.host_real_BT)
    if not any(keep_B):
        return Decided(context.nothing_BT, None, logits_B1, None, context.host_nothing_BT)
    host_B1 = torch.tensor(keep_B)[:, None] & context.host_real_BT
    return Decided(host_B1.to(logits_B1.device), None, logits_B1, None, host_B1)


def _settled(unit: Unit, context: ForwardContext, layer: RoutedCacheLayer | None) -> Tensor | None:
    """The logit by which earlier forwards decided for each row, on the host: (B,)."""
    if layer is None:
        return None
    if context.config.pooling == "prefix":
        prefix = layer.prefixes.get(unit.name)
        return None if prefix is None else prefix.settled_B
    return layer.prompts[unit.name].logit_B if context.prompt_BT is None else None


def _as_settled(
    logit_B: Tensor, context: ForwardContext, always_BT: Tensor | None = None
) -> Decided:
    """What follows from a decision that the host knows; the device is not asked."""
    shape, device = context.real_BT.shape, context.real_BT.device
    keep_BT = (logit_B[:, None] >= context.host_threshold_B1).expand(shape)
    if always_BT is not None:
        keep_BT = keep_BT | (context.host_position_BT < context.config.decide_after)
    if context.real_BC is not None:
        keep_BT = keep_BT & context.host_real_BT
    logits_BT = logit_B[:, None].expand(shape).to(device)
    return Decided(keep_BT.to(device), None, logits_BT, always_BT, keep_BT)


def _at_real(keep_BT: Tensor, context: ForwardContext) -> Tensor:
    return keep_BT if context.real_BC is None else keep_BT & context.real_BT


def _by_prefix(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decision:
    """The first tokens of a sequence run, and decide for its later ones."""
    after = context.config.decide_after
    logits_BT = _prefix_logits(unit, x_BTD, context, layer)
    prefix = None if layer is None else layer.prefixes.get(unit.name)
    if layer is not None and prefix is None:
        prefix = layer.prefixes[unit.name] = PrefixLogits(context.rows, after, x_BTD.device)
    past = None if prefix is None else prefix.sums()
    decision = pool_prefix(
        logits_BT, context.position_BT, context.real_BT, after, past, context.sequence_BT
    )
    if prefix is not None:
        prefix_BT = context.host_real_BT & (context.host_position_BT < after)
        prefix.add(logits_BT, context.host_position_BT, prefix_BT, context.host_column_T)
    return decision


def _prefix_logits(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Tensor:
    """The router's logits (B, T) of the tokens up to the last that decides; zeros behind it."""
    router = context.router(unit)
    if layer is None:
        whole_BT: Tensor = router(context.read(unit, x_BTD))
        return whole_BT
    deciding_T = (context.host_position_BT < context.config.decide_after).any(0)
    end = int(deciding_T.nonzero().max()) + 1 if bool(deciding_T.any()) else 0
    logits_BT: Tensor = router(context.read(unit, x_BTD[:, :end]))
    return torch.nn.functional.pad(logits_BT, (0, x_BTD.shape[1] - end))


def _by_prompt(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decision:
    """The prompt decides for itself and for all that follows; the router sees nothing else."""
    assert context.prompt_BT is not None, "the door lets nothing pass that is not known"
    prompt_1ND = x_BTD[context.prompt_BT][None]
    logits_N = context.router(unit)(context.read(unit, prompt_1ND))[0]
    logit_B = pool_prompt(logits_N, context.prompt_BT)
    if layer is not None:
        layer.prompts[unit.name] = PromptLogit.of(logit_B, context.prompt_BT, context.column_T)
    return Decision(logit_B[:, None].expand(context.real_BT.shape))


def _by_everything(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decision:
    """Padding and all, as the paper's code does: the door let no cache pass."""
    logits_BT = context.router(unit)(context.read(unit, x_BTD))
    return Decision(logits_BT.mean(1, keepdim=True).expand_as(logits_BT))


_POOLINGS = {"prefix": _by_prefix, "prompt": _by_prompt, "official": _by_everything}
