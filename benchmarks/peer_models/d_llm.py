"""D-LLM (Jyk-122/D-LLM, NeurIPS 2024)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from peer_models.checkout import filled, module_in
from peer_models.subject import Subject, Wanted, read_last_only, rope_theta


def d_llm(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """Its own Llama on the model's weights; a router in front of each block but the first two.

    A prompt is computed whole and multiplied; decoding leaves out what is skipped.
    """
    code = module_in(folder / "llama/model.py", "d_llm_model")
    _alone_in_parallel()
    config = base.config
    options = code.ModelArgs(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        multiple_of=1,
        # It takes two thirds of four times the width, times this.
        ffn_dim_multiplier=(config.intermediate_size + 0.5) / int(8 * config.hidden_size / 3),
        norm_eps=config.rms_norm_eps,
        max_batch_size=wanted.rows,
        max_seq_len=wanted.tokens,
    )
    ran_with = ["positions as the model turns them"]
    if base.device.type == "cpu":
        ran_with.append("Tensor.cuda left out while it is built")
        with mock.patch.object(torch.Tensor, "cuda", lambda self: self):
            model = code.Transformer(options)
    else:
        model = code.Transformer(options)
    torch.manual_seed(wanted.seed)
    routers = [layer.router for layer in model.layers if hasattr(layer, "router")]
    filled(model, _named_by_meta(base), but="router")
    model.to(base.device, base.dtype).eval()
    model.freqs_cis = code.precompute_freqs_cis(
        config.hidden_size // config.num_attention_heads, wanted.tokens, rope_theta(config)
    )
    whole = config.num_hidden_layers
    part = 1 - (1 - wanted.rate) * whole / len(routers)
    for router in routers:
        router.float()
        router.linear_2.register_forward_hook(_bias_at(router.linear_2, part))
    run = DynamicLlama(model)
    skips = "blocks when decoding; in a prompt nothing"
    return Subject(run, skips, True, ran_with, lambda: run.kept)


class DynamicLlama:
    """Runs D-LLM's Transformer, which holds its cache itself."""

    def __init__(self, model: Any) -> None:
        self.model, self.kept = model, 1.0
        read_last_only(model.output)

    def prefill(self, ids_BT: Tensor) -> None:
        """Fill its cache from the start."""
        self.decode(ids_BT, 0, None)

    def decode(self, ids_B1: Tensor, column: int, state: None) -> None:
        """Fill its cache further."""
        _, ran_BTL = self.model(ids_B1, column)
        self.kept = float(ran_BTL.float().mean())

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Of the last token of each row."""
        return self.model(ids_BT, 0)[0][:, -1].float()


def _bias_at(last: Any, part: float) -> Callable[..., Tensor | None]:
    """A hook that sets a router's last bias so that this part of its first tokens is kept: those
    where the second logit is larger.
    """
    asked: list[int] = []

    def hook(module: nn.Module, args: Any, logits_BT2: Tensor) -> Tensor | None:
        if asked:
            return None
        asked.append(logits_BT2.numel())
        run_BT = logits_BT2[..., 1] - logits_BT2[..., 0]
        low = run_BT.quantile(1 - part) if part < 1 else run_BT.min() - 100.0
        last.bias.data[1] -= low
        return logits_BT2 - torch.stack([torch.zeros_like(low), low])

    return hook


def _alone_in_parallel() -> None:
    """Its layers are made for several processes, and want to be told that there is one."""
    parallel = importlib.import_module("fairscale.nn.model_parallel.initialize")
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel.model_parallel_is_initialized():
        parallel.initialize_model_parallel(1)


def _named_by_meta(base: Any) -> dict[str, Tensor]:
    """A Llama's weights by the names of Meta's code, which turns neighbouring numbers where
    transformers turns halves.
    """
    names = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
    }
    width = base.config.hidden_size // base.config.num_attention_heads
    found = {}
    for name, weight in base.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            halves = weight.view(-1, 2, width // 2, weight.shape[-1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = weight
    return found
