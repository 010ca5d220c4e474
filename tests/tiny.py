"""Tiny models of every supported family, and a tiny tokenizer: from configs, seeded, no download.

A tiny model has 4 layers, hidden size 32, 4 heads, 2 key/value heads and a vocabulary of 97, in
float32 and in eval mode. Its weights are larger than a fresh model's, and its norms and biases are
not the identity, so that skipping a unit moves the logits by far more than rounding does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 97
PAD, BOS, EOS = 0, 1, 2
CACHE_KEY = (  # what a forward calls its cache; transformers 5.24 renamed it
    "cache"
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
SLIDING_WINDOW = 8  # of the Gemma's sliding layers: short enough that a test prompt outgrows it

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_QWEN2_SHAPE = {name: value for name, value in _SHAPE.items() if name != "head_dim"}


def _llama(**fields: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, **fields}))


def _mistral(**fields: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**_SHAPE, "sliding_window": None, **fields}))


def _qwen2(**fields: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**_QWEN2_SHAPE, **fields}))


def _qwen3(**fields: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**_SHAPE, **fields}))


def _gemma3(**fields: Any) -> PreTrainedModel:
    num_layers = fields.get("num_hidden_layers", _SHAPE["num_hidden_layers"])
    kinds = ("sliding_attention", "full_attention")
    own = {
        "sliding_window": SLIDING_WINDOW,
        "layer_types": [kinds[i % 2] for i in range(num_layers)],
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": True,  # as every real Gemma 3
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**_SHAPE, **own, **fields}))


_FACTORIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}
FAMILIES = tuple(_FACTORIES)


def tiny_model(
    family: str = "llama", *, attn_implementation: str = "sdpa", seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """Return a fresh tiny model of the family; the same arguments give the same bits.

    `fields` go to the family's config, over the tiny shape:
    `tiny_model("mistral", sliding_window=8)`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _FACTORIES[family](attn_implementation=attn_implementation, **fields)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norm scales and biases, which start as the identity
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def checkpoint_activations(model: Any, kwargs: dict[str, Any] | None = None) -> None:
    """Switch activation checkpointing on; transformers 5.24 renamed the method."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(kwargs)


def token_ids(rows: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Return random token ids (rows, length), none of them a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, VOCAB_SIZE, (rows, length), generator=generator)


SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A router reads the hidden state of a token and says: keep or skip.",
    "What is the capital of France? The capital of France is Paris.",
    "Pack my box with five dozen liquor jugs; then count them: 0 1 2 3 4 5 6 7 8 9.",
    'She said "it works" (twice!) - so they\'ll try it again.\n',
)
_ALPHABET = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!:;'\"()-"  # and, as the
    "\u0120\u010a"  # byte-level alphabet writes them, the space and the line feed
)
# One message a block between markers, the way ChatML does, after one begin-of-text token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most VOCAB_SIZE tokens, with a chat template.

    It writes a begin-of-text token in front (as Llama's and Gemma's do), round-trips letters,
    digits and common punctuation, and maps every other character to its unknown token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=list(_ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
