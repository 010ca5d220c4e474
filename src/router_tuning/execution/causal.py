"""The methods that stand before a causal LM's: its forward takes our keywords, `generate` tells
where the prompt ends and leaves the padding mask alone, and continuous batching is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.context import (
    called_with,
    options_for,
    original_forward,
    original_method,
    prompts_until,
    routing_of,
)
from router_tuning.execution.door import KEYWORDS, bind, taken_out
from router_tuning.execution.experts import mask_for_the_decoder
from router_tuning.execution.prompts import (
    NO_CACHE,
    asks_for_everything,
    asks_for_prompts,
    label_starts,
)
from router_tuning.units import decoder_of

CONTINUOUS = (
    "generate_batch",
    "continuous_batching_context_manager",
    "init_continuous_batching",
)
"""A causal LM's ways into continuous batching; not every version of transformers has them all."""
PREPARE = "prepare_inputs_for_generation"
"""The method of a causal LM that makes the arguments of `generate`'s forwards."""


@functools.cache
def accept_keywords(causal_class: type) -> Callable[..., Any]:
    """A causal LM's forward that also lists KEYWORDS, which `generate` looks for in the signature.
    Labels tell it where prompts end.
    """

    def forward(causal: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            ours = taken_out(kwargs)
            given = bind(causal_class, args, kwargs)
            mask = mask_for_the_decoder(causal, given)
            if mask:
                args, kwargs = (), given
            if ours or mask:
                stack.enter_context(called_with(causal, {**ours, **mask}))
            labels = given.get("labels")
            if labels is not None and asks_for_prompts(causal):
                stack.enter_context(prompts_until(causal, label_starts(labels)))
            return original_forward(causal)(*args, **kwargs)

    dense = causal_class.forward  # type: ignore[attr-defined]
    functools.update_wrapper(forward, dense)
    signature = inspect.signature(dense)
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in KEYWORDS
    ]
    *named, last = signature.parameters.values()
    ordered = [*named, *ours, last] if last.kind is last.VAR_KEYWORD else [*named, last, *ours]
    forward.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    return forward


@functools.cache
def tell_prompt(causal_class: type) -> Callable[..., Any]:
    """A causal LM's generate that tells the forwards inside where the prompt ends: at its input's
    end. Assisted decoding's first forward goes on behind it, and without a cache all do.
    """

    def generate(causal: nn.Module, *args: Any, **kwargs: Any) -> Any:
        dense_generate = original_method(causal, "generate")
        if asks_for_everything(causal):
            raise UnsupportedCallError(NO_CACHE)
        if not asks_for_prompts(causal):
            return dense_generate(*args, **kwargs)
        given = bind(causal_class, args, kwargs, "generate")
        _check_prompt_is_whole(causal, given)
        with prompts_until(causal, _prompt_width(given)):
            return dense_generate(*args, **kwargs)

    return functools.update_wrapper(generate, causal_class.generate)  # type: ignore[attr-defined]


def _prompt_width(given: dict[str, Any]) -> int:
    """Columns of a generation's input; without one it begins with a bos token."""
    inputs = (given.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
    return next((x.shape[1] for x in inputs if isinstance(x, Tensor) and x.ndim > 1), 1)


def _check_prompt_is_whole(causal: Any, given: dict[str, Any]) -> None:
    """Refuse what makes of the first forward over an empty cache less, or other, than the
    prompt.
    """
    configs = (given.get("generation_config"), getattr(causal, "generation_config", None))
    for name, neutral, why in (
        ("prefill_chunk_size", (None,), "cuts the prompt into chunks (chunked prefill)"),
        ("guidance_scale", (None, 1), "runs a second prompt beside the first"),
    ):
        values = (given.get(name), *(getattr(config, name, None) for config in configs))
        value = next((v for v in values if v is not None), None)
        if value not in neutral:
            raise UnsupportedCallError(
                f'{name}={value} {why}, but with pooling="prompt" one prompt decides, as a whole; '
                f'leave {name} unset, or use an adapter with pooling="prefix"'
            )


@functools.cache
def with_the_padding(causal_class: type) -> Callable[..., Any]:
    """The preparation of `generate`'s forwards, which leaves the padding mask as it came: for
    static caches it is made a 4-D one, which does not tell where the padding is.
    """

    def prepare(causal: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = original_method(causal, PREPARE)(*args, **kwargs)
        decoder = decoder_of(causal)
        routing = decoder.__dict__.get("routing")
        mask = kwargs.get("attention_mask")
        if routing is None or not routing.enabled or options_for(decoder).dense:
            return inputs
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            inputs["attention_mask"] = mask
        return inputs

    return functools.update_wrapper(prepare, getattr(causal_class, PREPARE))


@functools.cache
def unless_routed(causal_class: type, name: str) -> Callable[..., Any]:
    """A way into continuous batching that is open only while the routers are off.

    transformers runs its forwards in a thread that swallows the door's errors, and answers nothing.
    """

    def method(causal: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if routing_of(causal).enabled:
            raise UnsupportedCallError(
                f"{name} keeps keys in pages, which routing cannot serve; use generate() with a "
                f"left-padded batch. With the routers off for as long as it runs it works: inside "
                f"`with model.disable_adapter():` of a PEFT model, or after "
                f"routing_of(model).enabled = False (its thread does not see `with dense(model):`)"
            )
        return original_method(causal, name)(*args, **kwargs)

    return functools.update_wrapper(method, getattr(causal_class, name))
