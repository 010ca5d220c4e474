"""What a unit does in a forward: its router's logits, or whatever decides instead of it.

Shapes: B batch, T tokens of this forward, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from router_tuning.decide import Decision, pool_prefix, pool_prompt
from router_tuning.execution.cache import PrefixLogits, PromptLogit, RoutedCacheLayer
from router_tuning.execution.call import Decided
from router_tuning.execution.context import ForwardContext
from router_tuning.units import Unit, is_sequence


def decide(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decided:
    """What a unit does in this forward; `layer` remembers what a sequence decision needs."""
    if context.decider is not None:
        keep_BT = context.decider(unit, context.read(unit, x_BTD), context) & context.real_BT
        return Decided(keep_BT, keep_BT.float() if context.masked else None, None)
    decision = _decision(unit, x_BTD, context, layer)
    logits_BT = decision.logits_BT.detach()
    if context.masked:
        # Padding is gated like any token, since nobody reads it: fresh routers then change no bit
        # there either.
        soft_BT = decision.straight_through(context.threshold_B1)
        return Decided(
            (soft_BT.detach() > 0.5) & context.real_BT, soft_BT, logits_BT, decision.always_BT
        )
    keep_BT = decision.keep(context.threshold_B1) & context.real_BT
    return Decided(keep_BT, None, logits_BT, decision.always_BT)


def _decision(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decision:
    if not is_sequence(context.granularity(unit)):
        return Decision(context.router(unit)(context.read(unit, x_BTD)))
    if context.config.pooling == "prompt":
        return _by_prompt(unit, x_BTD, context, layer)
    return _by_prefix(unit, x_BTD, context, layer)


def _by_prefix(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decision:
    """The first tokens of a sequence run, and decide for its later ones."""
    logits_BT = context.router(unit)(context.read(unit, x_BTD))
    after = context.config.decide_after
    prefix = None if layer is None else layer.prefixes.get(unit.name)
    if layer is not None and prefix is None:
        prefix = layer.prefixes[unit.name] = PrefixLogits(context.rows, after, x_BTD.device)
    past = None if prefix is None else prefix.sums()
    decision = pool_prefix(
        logits_BT, context.position_BT, context.real_BT, after, past, context.sequence_BT
    )
    if prefix is not None:
        prefix_BT = context.real_BT & (context.position_BT < after)
        prefix.add(logits_BT, context.position_BT, prefix_BT, context.column_T)
    return decision


def _by_prompt(
    unit: Unit, x_BTD: Tensor, context: ForwardContext, layer: RoutedCacheLayer | None
) -> Decision:
    """The prompt decides for itself and for all that follows; the router sees nothing else."""
    if context.prompt_BT is None:
        assert layer is not None, "the door lets no forward pass that neither knows nor remembers"
        logit_B = layer.prompts[unit.name].logit_B
    else:
        prompt_1ND = x_BTD[context.prompt_BT][None]
        logits_N = context.router(unit)(context.read(unit, prompt_1ND))[0]
        logit_B = pool_prompt(logits_N, context.prompt_BT)
        if layer is not None:
            layer.prompts[unit.name] = PromptLogit.of(logit_B, context.prompt_BT, context.column_T)
    return Decision(logit_B[:, None].expand(context.real_BT.shape))
