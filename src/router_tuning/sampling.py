"""Text that the frozen model writes itself: answers to prompts, and whole texts from nothing.

Routers are switched off meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from router_tuning.data import (
    Example,
    Progress,
    at_least,
    evaluation_mode,
    leading_bos,
    plain_chat,
    templated,
    turns,
)
from router_tuning.errors import DataError, UnsupportedCallError, UnsupportedModelError
from router_tuning.execution.context import dense, routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
"""How answers are drawn."""
WRITING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
"""How texts are: they need not be good, but as varied as what the model was trained on."""
END_OF_TEXT = "<|endoftext|>"
"""What stands between the texts that many models were first trained on, chat models too."""


def sample_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Example]:
    """Let the frozen model answer prompts (routers off, temperature 0.8, top-p 0.95).

    The same seed and batch size give the same answers; the caller's random numbers are not touched.

    Returns:
        One conversation a prompt, in the order of the prompts, without those of empty answers.
    """
    at_least(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    inputs = prompt_ids(tokenizer, prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(inputs[i]))
    answers = [""] * len(prompts)
    with _drawing(model, seed):
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            given = [inputs[i] for i in rows]
            batch = continued(model, tokenizer, given, max_new_tokens, **ANSWERING)
            for i, ids in zip(rows, batch, strict=True):
                answers[i] = _decoded(tokenizer, ids)
            if progress is not None:
                progress(min(begin + batch_size, len(order)), len(order))
    return [Example(messages=turns(p, a)) for p, a in zip(prompts, answers, strict=True) if a]


def sample_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 96,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Example]:
    """Let the frozen model write texts of all kinds, each from what a text begins with alone
    (routers off, temperature 1, top-p 0.95).

    The same seed and batch size give the same texts; the caller's random numbers are not touched.

    Args:
        model: the model, with routers or without.
        tokenizer: its own.
        tokens: how many the texts shall have together, at least.
        max_new_tokens: of a text, at most.
        batch_size: texts that are written side by side.
        seed: of the drawing.
        progress: called with tokens written, and tokens in all.

    Raises:
        DataError: no token begins a text, or the model ends texts before it has begun them.
    """
    at_least(1, tokens=tokens, max_new_tokens=max_new_tokens, batch_size=batch_size)
    begin, texts, written = [_beginning(tokenizer)], [], 0
    with _drawing(model, seed):
        while written < tokens:
            rows = min(batch_size, -(-(tokens - written) // max_new_tokens))
            batch = continued(model, tokenizer, [begin] * rows, max_new_tokens, **WRITING)
            new = [text for ids in batch if (text := _decoded(tokenizer, ids))]
            if not new:
                raise DataError(
                    "the model ends texts where they begin, so it cannot write any; give text of "
                    "your own with --data, and leave --own-text out"
                )
            texts += new
            written += sum(len(ids) for ids in tokenizer(new, add_special_tokens=False).input_ids)
            if progress is not None:
                progress(min(written, tokens), tokens)
    return [Example(text=text) for text in texts]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text begins with: the bos where texts have one. A chat model's bos may begin
    a conversation instead; then the end of the text before.
    """
    ended = tokenizer.get_vocab().get(END_OF_TEXT)
    for token in (leading_bos(tokenizer), ended, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError(
        "the tokenizer has no bos, eos or end-of-text token, so the model cannot begin a text; "
        "give text of your own with --data, and leave --own-text out"
    )


@contextmanager
def _drawing(model: nn.Module, seed: int) -> Iterator[None]:
    """Draw from the dense model inside the block, by random numbers of its own."""
    device = next(model.parameters()).device
    gpus = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=gpus))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(routers_off(model))
        torch.manual_seed(seed)
        yield


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The token ids of users' messages, up to where the assistant begins."""
    texts = [_generation_text(tokenizer, prompt) for prompt in prompts]
    special = not tokenizer.chat_template
    return [tokenizer(t, add_special_tokens=special, verbose=False)["input_ids"] for t in texts]


def _generation_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    if not tokenizer.chat_template:
        # No blank at the end: it is part of the answer's first token.
        return plain_chat([{"role": "user", "content": prompt}])[0] + "Assistant:"
    message = {"role": "user", "content": prompt}
    return templated(tokenizer, [message], f"prompt {prompt!r:.40}", generation_prompt=True)


def continued(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[list[int]],
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """A continuation of each row of token ids, which are padded on the left; options are those of
    `generate`. Rows that stop early end in padding.
    """
    stops = stop_ids(model, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, *stops) if i is not None), 0)
    width = max(map(len, inputs))
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in inputs], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in inputs], device=device)
    output: Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=stops or None,
        **options,
    )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer."""
    configured = model.generation_config.eos_token_id
    known = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*known, tokenizer.eos_token_id) if i is not None})


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text up to the first special token, or to where a base model goes on as the user."""
    special = set(tokenizer.all_special_ids)
    end = next((i for i, token in enumerate(ids) if token in special), len(ids))
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return (text if tokenizer.chat_template else text.split("\nUser:")[0]).strip()


def routers_off(model: nn.Module) -> AbstractContextManager[None]:
    """Switch off the routers of a model, if it has any, inside the block."""
    try:
        routing_of(model)
    except (
        UnsupportedCallError,
        UnsupportedModelError,
    ):  # no routers, or of no family that can have them
        return nullcontext()
    return dense(model)
