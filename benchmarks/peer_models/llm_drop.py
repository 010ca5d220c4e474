"""LLM-Drop (CASE-Lab-UMD/LLM-Drop, arXiv 2406.15786)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from peer_models.checkout import OF_4, filled, package_in
from peer_models.subject import Subject, Wanted, read_last_only, rope_theta


def llm_drop(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """Its Llama, which is built without the attentions that are dropped."""
    package = package_in(folder / "src/llmtuner/compression/prune/models", "llm_drop_models")
    config = importlib.import_module(f"{package}.configuration_dropped_llama")
    code: Any = importlib.import_module(f"{package}.modeling_dropped_llama")
    ran_with = ["its mask of all positions made for the tokens at hand, not for the model's most"]
    given = {k: v for k, v in base.config.to_dict().items() if not k.startswith("rope_")}
    given |= {"rope_theta": rope_theta(base.config), "max_position_embeddings": wanted.tokens}
    made = config.LlamaConfig(**given, drop_attn_list=list(wanted.dropped))
    if made.rope_scaling is not None:
        made.rope_scaling = None
        ran_with.append("a config without the rotary parameters that transformers 5 adds")
    if not OF_4:
        code.DynamicCache = CacheOfOld
        ran_with.append("a cache with the methods that transformers 5 has removed")
        code.LlamaForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        ran_with.append("its tied weights named as transformers 5 wants it")
    model = code.LlamaForCausalLM(made).to(base.device, base.dtype).eval()
    filled(model, base.state_dict())
    ran = 1 - len(wanted.dropped) / base.config.num_hidden_layers
    return Subject(InTuples(model), "attentions of whole layers", True, ran_with, lambda: ran)


class CacheOfOld(DynamicCache):
    """Stays what it is where old code makes tuples of it and back."""

    @classmethod
    def from_legacy_cache(cls, past: Any) -> Any:
        """The cache itself."""
        return cls() if past is None else past

    def to_legacy_cache(self) -> Any:
        """The cache itself."""
        return self


class InTuples:
    """Runs a causal LM of an old transformers, whose named outputs are no longer there."""

    def __init__(self, model: Any) -> None:
        self.model = model
        read_last_only(model.lm_head)

    def prefill(self, ids_BT: Tensor) -> Any:
        """The cache."""
        return self.decode(ids_BT, 0, None)

    def decode(self, ids_B1: Tensor, column: int, state: Any) -> Any:
        """The cache, longer by these tokens."""
        return self.model(ids_B1, past_key_values=state, use_cache=True, return_dict=False)[1]

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Of the last token of each row."""
        return self.model(ids_BT, use_cache=False, return_dict=False)[0][:, -1].float()
