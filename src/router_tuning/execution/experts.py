"""`output_router_logits` of a mixture of experts whose MLPs or blocks are routed.

transformers collects the logits of every call of the routers that pick experts. On the masked path
these are of all tokens, on the skipping path of the kept ones, in one call or in several. Here both
give the same: an entry for each layer that has experts, in it a row for each real token that ran
there, row by row of the batch. transformers' load-balancing loss, which is worked out from them, is
then over the executed tokens. It would take the padding mask to have an entry's rows, so the mask
goes to the decoder past it.

Shapes: B batch, T tokens of this forward, N tokens that ran in a layer, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.context import ForwardContext, Routing, runs_dense
from router_tuning.units import decoder_of, mixture_layers

ASKED = "output_router_logits"
FOUND = "router_logits"
MASK = "attention_mask"


def gives_logits_of_what_ran(decoder: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments asks for the experts' router logits, of a model that may
    skip experts.
    """
    asked = given.get(ASKED)
    if not (getattr(decoder.config, ASKED, False) if asked is None else asked):
        return False
    if runs_dense(decoder):
        return False
    routing: Routing = decoder.__dict__["routing"]
    mixtures = mixture_layers(decoder)
    return any(unit.kind != "attn" and unit.layer_idx in mixtures for unit in routing.units)


def mask_for_the_decoder(causal: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Take the padding mask out of a causal LM's arguments where its load-balancing loss must not
    see it; give it back as a keyword for the decoder.
    """
    mask, decoder = given.get(MASK), decoder_of(causal)
    if mask is None or not gives_logits_of_what_ran(decoder, given):
        return {}
    if getattr(causal, getattr(causal, "base_model_prefix", ""), None) is not decoder:
        raise UnsupportedCallError(
            f"{ASKED} is not served for {type(causal).__name__}, whose decoder lies inside another "
            "model, where tokens skip experts; ask for it with the routers off, inside "
            "`with dense(model):`"
        )
    return {MASK: given.pop(MASK)}


def keep_what_ran(output: Any, context: ForwardContext) -> None:
    """Put into a decoder's output the router logits of the real tokens that ran in each layer:
    (N, E) a layer, on either path.
    """
    collected = getattr(output, FOUND, None)
    if collected is None:
        raise UnsupportedCallError(
            f"{type(context.decoder).__name__} gave no {FOUND}; leave {ASKED} out, and "
            "return_dict=False too"
        )
    left = [logits.flatten(0, -2) for logits in collected]
    output[FOUND] = tuple(
        _of_layer(left, _ran(index, context), experts, context)
        for index, experts in mixture_layers(context.decoder).items()
    )
    if left:
        raise _unclear(context)


def _ran(index: int, context: ForwardContext) -> Tensor:
    """The real tokens that ran in the MLP of a layer: (B, T)."""
    for kind in ("mlp", "block"):
        record = context.record.units.get(f"layers.{index}.{kind}")
        if record is not None:
            return record.keep_BT & context.real_BT
    return context.real_BT


def _of_layer(
    left: list[Tensor], ran_BT: Tensor, experts: nn.Module, context: ForwardContext
) -> Tensor:
    """Take what was collected in a layer off what is left, and of it what ran: (N, E)."""
    number = int(ran_BT.sum())
    called = context.masked or number
    if left and called and len(left[0]) == ran_BT.numel():  # one call on all tokens
        return left.pop(0)[ran_BT.flatten()]
    parts: list[Tensor] = []
    while left and sum(map(len, parts)) < number:
        parts.append(left.pop(0))
    if sum(map(len, parts)) != number:
        raise _unclear(context)
    if not parts:
        return torch.empty((0, int(experts.num_experts)), device=ran_BT.device)  # type: ignore[arg-type]
    if len(parts) == 1:
        return parts[0]
    # Rows with equally many kept tokens ran together, those with the fewest first (grouped.py).
    of_its_row_N = ran_BT.sum(1)[ran_BT.nonzero()[:, 0]]
    return torch.cat(parts)[of_its_row_N.argsort(stable=True).argsort()]


def _unclear(context: ForwardContext) -> UnsupportedCallError:
    return UnsupportedCallError(
        f"the {FOUND} of {type(context.decoder).__name__} cannot be told apart by layer where "
        "tokens skip experts; ask for them with the routers off, inside `with dense(model):`"
    )
