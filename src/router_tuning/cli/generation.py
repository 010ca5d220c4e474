"""One answer, streamed, with what it cost. Imports torch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TextStreamer, set_seed

from router_tuning.cli.adapters import Loaded
from router_tuning.cost import cost
from router_tuning.execution.context import record


def answer(
    loaded: Loaded,
    prompt: str,
    *,
    budget: float | None,
    max_new_tokens: int,
    sampling: dict[str, float] | None = None,
    raw: bool = False,
    seed: int = 0,
    stream: bool = True,
) -> dict[str, Any]:
    """Generate an answer.

    Args:
        loaded: a routed model.
        prompt: a user's message, or with `raw` the beginning of a text.
        budget: kept fraction; None is the adapter's own.
        max_new_tokens: at most.
        sampling: `temperature` and `top_p`; empty or None is greedy.
        raw: leave the chat template out.
        seed: of the sampling.
        stream: print the text as it comes.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = _encoded(tokenizer, prompt, raw).to(next(model.parameters()).device)
    if sampling:
        set_seed(seed)
    options: dict[str, Any] = (
        {"do_sample": True, "top_k": 0, **sampling} if sampling else {"do_sample": False}
    )
    if budget is not None:
        options["budget"] = budget
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    streamer = (
        TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    )
    with torch.no_grad(), record(model) as trace:
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            **options,
        )
    spent = cost(model, trace)
    new = output[0, ids.shape[1] :]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "budget": budget,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "kept_fraction": trace.kept_fraction(),
        "kept_of_routed": trace.kept_of_routed(),
        "kv_bytes": spent.kv_bytes,
        "dense_kv_bytes": spent.dense_kv_bytes,
        "flops_fraction": spent.flops_fraction,
    }


def _encoded(tokenizer: Any, prompt: str, raw: bool) -> torch.Tensor:
    """Token ids (1, T), under the model's chat template where it has one."""
    if raw or not tokenizer.chat_template:
        text = prompt if raw else f"User: {prompt}\nAssistant:"  # as data.py writes conversations
        ids = tokenizer(text)["input_ids"]
    else:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids])
