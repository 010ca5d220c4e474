"""Tiny models of every supported family, and a tiny tokenizer: from configs, seeded, no download.

A tiny model has 4 layers, hidden size 32, 4 heads, 2 key/value heads and a vocabulary of 97, in
float32 and in eval mode. Its weights are larger than a fresh model's, and its norms and biases are
not the identity, so that skipping a unit moves the logits by far more than rounding does.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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
_NO_HEAD_DIM = {name: value for name, value in _SHAPE.items() if name != "head_dim"}
_SLIDING = {
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GPT2 = {  # its own words for the shape; a context that fits the longest test
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

_OWN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", _SHAPE, {}),
    "mistral": ("Mistral", _SHAPE, {"sliding_window": None}),
    "qwen2": ("Qwen2", _NO_HEAD_DIM, {}),
    "qwen3": ("Qwen3", _SHAPE, {}),
    "gemma3": (  # real Gemmas tie their embeddings
        "Gemma3",
        _SHAPE,
        {**_SLIDING, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    ),
    "gemma2": ("Gemma2", _SHAPE, {**_SLIDING, "query_pre_attn_scalar": 8}),
    "smollm3": ("SmolLM3", _NO_HEAD_DIM, {"no_rope_layers": [1, 1, 1, 0]}),
    "phi3": (
        "Phi3",
        _NO_HEAD_DIM,
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "partial_rotary_factor": 0.5},
    ),
    "olmo2": ("Olmo2", _NO_HEAD_DIM, {}),
    "granite": (
        "Granite",
        _NO_HEAD_DIM,
        {"attention_multiplier": 0.35, "residual_multiplier": 0.8, "logits_scaling": 1.5},
    ),
    "gpt_neox": ("GPTNeoX", _NO_HEAD_DIM, {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon": ("Falcon", _NO_HEAD_DIM, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2": ("GPT2", _GPT2, {}),
    "cohere2": ("Cohere2", _NO_HEAD_DIM, {**_SLIDING, "logit_scale": 1.0}),
    "mixtral": ("Mixtral", _SHAPE, {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": ("Qwen3Moe", _SHAPE, {**_EXPERTS, "mlp_only_layers": [1]}),
    "olmoe": ("Olmoe", _NO_HEAD_DIM, {**_EXPERTS, "clip_qkv": 2.0}),
    "deepseek_v3": ("DeepseekV3", _NO_HEAD_DIM, _LATENT),
    "gpt_oss": ("GptOss", _SHAPE, {**_SLIDING, "num_local_experts": 4}),
    "glm4": ("Glm4", _SHAPE, {"partial_rotary_factor": 0.5}),
}
"""The start of the class names, the shape in the family's words, and what is its own."""

_SHARED_KEYS = {  # layers 4 and 5 read the keys of 2 and 3
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": SLIDING_WINDOW,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
_LINEAR = {  # linear attention in every second layer
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_PARTLY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3n": (
        "Gemma3n",
        _SHAPE,
        {
            **_SHARED_KEYS,
            "intermediate_size": [48] * 6,
            "activation_sparsity_pattern": [0.5] + [0.0] * 5,
            "laurel_rank": 4,
        },
    ),
    "gemma4": ("Gemma4", _SHAPE, {**_SHARED_KEYS, "global_head_dim": 8}),
    "qwen3_next": (
        "Qwen3Next",
        _SHAPE,
        {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 24},
    ),
}
"""Families of which some units cannot be routed."""

_GPTJ = {**_GPT2, "rotary_dim": 4}
_OPT = {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
_FOUND: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "apertus": ("Apertus", _NO_HEAD_DIM, {}),
    "cohere": ("Cohere", _NO_HEAD_DIM, {"logit_scale": 1.0}),
    "ernie4_5": ("Ernie4_5", _SHAPE, {}),
    "exaone4": ("Exaone4", _SHAPE, {**_SLIDING}),
    "gemma": ("Gemma", _SHAPE, {}),
    "gptj": ("GPTJ", _GPTJ, {}),
    "nemotron": ("Nemotron", _SHAPE, {}),
    "opt": ("OPT", _OPT, {}),
    "olmo_hybrid": ("OlmoHybrid", _NO_HEAD_DIM, _LINEAR),
    "phi": ("Phi", _NO_HEAD_DIM, {}),
    "stablelm": ("StableLm", _NO_HEAD_DIM, {"use_parallel_residual": True}),
    "starcoder2": ("Starcoder2", _NO_HEAD_DIM, {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
}
"""Families that are in no table, and are found by their structure."""


def _make(family: str, **fields: Any) -> PreTrainedModel:
    name, shape, own = {**_OWN, **_PARTLY, **_FOUND}[family]
    config_name = f"{name}TextConfig" if name in _INSIDE_OTHERS else f"{name}Config"
    config = getattr(transformers, config_name)(**{**shape, **own, **fields})
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    made: PreTrainedModel = model(config)
    return made


_INSIDE_OTHERS = ("Gemma3", "Gemma3n", "Gemma4")  # text models with a config of their own
FAMILIES = tuple(_OWN)
PARTLY, FOUND = tuple(_PARTLY), tuple(_FOUND)
FOUND_HERE = tuple(
    family
    for family in FOUND  # at transformers 5.16 GPT-J's layers return tuples, which must be told
    if family != "gptj" or transformers.GPTJForCausalLM._supports_sdpa
)
EAGER_ONLY = ("gemma2", "gpt_oss")  # soft caps and sinks, which SDPA has not


def tiny_model(
    family: str = "llama", *, attn_implementation: str = "sdpa", seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """Return a fresh tiny model of the family; the same arguments give the same bits.

    `fields` go to the family's config, over the tiny shape:
    `tiny_model("mistral", sliding_window=8)`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        implementation = "eager" if family in EAGER_ONLY else attn_implementation
        model = _make(family, attn_implementation=implementation, **fields)
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
