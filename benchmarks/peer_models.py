"""Models that others' code makes, from checkouts that the user names, behind one interface.

No code of a peer is here or comes into this repository: each function loads what it needs from a
folder, and builds the peer on the weights of a given model. What it took to run it beside another
transformers than its own is said in `ran_with`. A peer that does not run raises what stopped it.

Imports nothing of router_tuning, so that a peer also runs beside the transformers it asks for.

Shapes: B batch, T tokens, V vocabulary, L layers.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import DynamicCache

Context = Callable[[], AbstractContextManager[Any]]

CACHES = ("cache", "past_key_values")
"""What a forward may call its cache: transformers 5.24 renamed it."""
OF_4 = hasattr(DynamicCache, "from_legacy_cache")
"""Whether this is a transformers 4."""
LIKE_4 = "hooks that give attentions and layers the outputs they had in transformers 4"


@dataclass(frozen=True)
class Wanted:
    """What a peer is built for.

    Args:
        rate: part of the attentions' executions that run; at 1 nothing is skipped.
        dropped: the layers whose attention a static method leaves out.
        rows: of the largest batch.
        tokens: of the longest row, new ones included.
        seed: of fresh routers.
    """

    rate: float
    dropped: tuple[int, ...]
    rows: int
    tokens: int
    seed: int

    @property
    def whole(self) -> Wanted:
        """The same, with nothing skipped."""
        return replace(self, rate=1.0, dropped=())


class Run(Protocol):
    """What is timed. No head reads more than the last token of each row."""

    def prefill(self, ids_BT: Tensor) -> Any:
        """Read prompts; what decoding goes on from."""

    def decode(self, ids_B1: Tensor, column: int, state: Any) -> Any:
        """Read the next token of each row, which stands in this column; the new state."""

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Of the last token of each row (B, V)."""


@dataclass
class Subject:
    """A model to time, and what is to be said of it."""

    run: Run
    skips: str
    """What is left out for a skipped token."""
    skips_work: bool = True
    """Whether anything is."""
    ran_with: list[str] = field(default_factory=list)
    kept: Callable[[], float] | None = None
    """Part of the attentions' executions that were kept in the last forward inside `counted`."""
    no_decode: str = ""
    """Why it cannot decode; empty where it can, or where nobody knows yet."""
    context: Context = nullcontext
    """Entered around what is timed."""
    counted: Context = nullcontext
    """Entered, inside the other, where not time but `kept` is wanted."""


class Causal:
    """Runs a causal LM of transformers."""

    def __init__(self, model: Any, *, cached: bool = True) -> None:
        self.model, self.cached = model, cached
        read_last_only(model.get_output_embeddings())
        names = inspect.signature(type(model.model).forward).parameters
        self.name = next(name for name in CACHES if name in names)

    def prefill(self, ids_BT: Tensor) -> Any:
        """The cache; None without one. It is made before the forward: routed layers want that."""
        if not self.cached:
            return self.model(input_ids=ids_BT, use_cache=False, **self.more(ids_BT, 0)) and None
        takes = inspect.signature(DynamicCache).parameters
        cache = DynamicCache(config=self.model.config) if "config" in takes else DynamicCache()
        return self.decode(ids_BT, 0, cache)

    def decode(self, ids_B1: Tensor, column: int, state: Any) -> Any:
        """The cache, longer by these tokens."""
        given = {self.name: state, **self.more(ids_B1, column)}
        return getattr(self.model(input_ids=ids_B1, use_cache=True, **given), self.name)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Of the last token of each row."""
        out = self.model(input_ids=ids_BT, use_cache=False, **self.more(ids_BT, 0))
        return out.logits[:, -1].float()

    def more(self, ids_BT: Tensor, column: int) -> dict[str, Any]:
        """Further arguments of a forward."""
        return {}


def read_last_only(head: nn.Module) -> None:
    """Leave out all tokens but the last before the head, whatever calls it: old code has no
    argument for that, and heads are not what differs. By an index: to multiply a slice, PyTorch
    copies the output embedding.
    """
    head.register_forward_pre_hook(lambda _, args: (args[0][:, [-1]], *args[1:]))


def shared_copy(model: Any) -> Any:
    """A model of its own on the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def rope_theta(config: Any) -> float:
    """The base of the rotary positions, where either transformers has it."""
    of_5 = getattr(config, "rope_parameters", None) or {}
    return float(of_5.get("rope_theta") or config.rope_theta)


# ---- LLM-Drop (CASE-Lab-UMD/LLM-Drop, arXiv 2406.15786) ----


def llm_drop(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """Its Llama, which is built without the attentions that are dropped."""
    package = package_in(folder / "src/llmtuner/compression/prune/models", "llm_drop_models")
    config = importlib.import_module(f"{package}.configuration_dropped_llama")
    code = importlib.import_module(f"{package}.modeling_dropped_llama")
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


# ---- Router-Tuning, the official code (CASE-Lab-UMD/Router-Tuning-Mixture-of-Depths) ----


def official(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """Its patch of a model, with a token router in front of every attention."""
    code = module_in(folder / "utils/model/model_patch.py", "official_model_patch")
    model = shared_copy(base)
    model.config.is_mod = [True] * model.config.num_hidden_layers
    model.config.granularity = "attn_token"
    code.apply_router_tuning_patch(model)
    layers = list(model.model.layers)
    torch.manual_seed(wanted.seed)
    for layer in layers:
        layer.router.to(base.device, base.dtype)
        nn.init.normal_(layer.router.weight, std=float(wanted.rate < 1))
        layer.router.register_forward_hook(_threshold_at(layer, wanted.rate))
    ran_with = like_4(model)

    def kept() -> float:
        return sum(layer._last_mod_capacity for layer in layers) / len(layers)

    return Subject(Causal(model), "nothing: a mask multiplies", False, ran_with, kept)


def _threshold_at(layer: Any, rate: float) -> Callable[..., None]:
    """A hook that sets a layer's threshold so that this part of its first tokens is kept."""
    asked: list[int] = []

    def hook(router: nn.Module, args: Any, logits_BT1: Tensor) -> None:
        if not asked:
            layer.threshold = float(logits_BT1.sigmoid().float().quantile(1 - rate))
            asked.append(logits_BT1.numel())

    return hook


# ---- SkipGPT (EIT-NLP/SkipGPT, arXiv 2506.04179) ----


def skipgpt(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """Its layers around a model's own; routers of attentions keep at the rate, those of MLPs all.

    It draws decisions also when it does not train, by the difference of a router's two logits.
    """
    code = module_in(folder / "router_attn_mlp.py", "skipgpt_router_attn_mlp")
    model = shared_copy(base)
    options = Namespace(initial_temperature=5.0, final_temperature=1.0)
    with class_name_kept(type(model)):
        code.apply_router_attn_mlp(model, options)
    layers = list(model.model.layers)
    for layer in layers:
        _always_as_likely(layer.router_attention.weight_predictor, wanted.rate)
        _always_as_likely(layer.router_mlp.weight_predictor, 1.0)
    model.to(base.device, base.dtype).eval()
    ran_with = like_4(model, inner="block")

    def kept() -> float:
        return float(sum(layer.attn_router_zero_prob for layer in layers)) / len(layers)

    return Subject(Causal(model), "nothing: a mask multiplies", False, ran_with, kept)


def _always_as_likely(last: Any, rate: float) -> None:
    """Let a router's last map (to 2) run its unit with this probability, whatever it reads."""
    nn.init.zeros_(last.weight)
    odds = math.log(rate / (1 - rate)) if rate < 1 else 100.0
    last.bias.data = torch.tensor([odds, 0.0])


def skipgpt_sparse(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """SkipGPT's sparse inference (EIT-NLP/SkipGPT#7): kernels for CUDA, and flash attention."""
    package = package_in(folder / "inference", "skipgpt_inference")
    code = importlib.import_module(f"{package}.wrapper.model")
    model = shared_copy(base)
    model.config._attn_implementation = "flash_attention_2"
    model.config._forward_impl, model.config.sparse = "triton", True
    model.model = code.LlamaMoDModel(model.config, model.model)
    for layer in model.model.layers:
        nn.init.zeros_(layer.router_mlp.weight_predictor.weight)
    model.to(base.device, base.dtype).eval()
    return Subject(Causal(model), "queries of attentions, MLPs")


# ---- Mixture of depths (astramind-ai/Mixture-of-depths, arXiv 2404.02258) ----


def mod(folder: Path, base: Any, wanted: Wanted) -> Subject:
    """Its layers around every second one of a model; their capacity makes as many attentions skip
    as are wanted in the whole model. Each skips its MLP too.
    """
    code = module_in(folder / "MoD/MoD.py", "astramind_mod")
    model = shared_copy(base)
    with class_name_kept(type(model)):
        code.apply_mod_to_hf(model)
    torch.manual_seed(wanted.seed)
    layers = list(model.model.layers)
    routed = [layer for layer in layers if isinstance(layer, code.MoD)]
    capacity = 1 - (1 - wanted.rate) * len(layers) / len(routed)
    if capacity <= 0:
        raise ValueError("every second layer cannot skip so much")
    given: Counter[str] = Counter()
    for layer in routed:
        layer.capacity = capacity
        layer.router.weight_predictor.register_forward_hook(_scaled())
        layer.register_forward_pre_hook(partial(_arguments_of_4, given), with_kwargs=True)
        turn = partial(_turned_here, model.model.rotary_emb, given)
        layer.block.register_forward_pre_hook(turn, with_kwargs=True)
        if not OF_4:
            layer.register_forward_hook(lambda _, args, output: output[0])
    model.to(base.device, base.dtype).eval()
    ran_with = ["hooks that give its layers the arguments and outputs of transformers 4.41"]
    no_decode = "no cache: a layer would put one row's keys behind another's"

    def kept() -> float:
        return 1 - (1 - given["taken"] / given["came"]) * len(routed) / len(layers)

    run = Positioned(model, cached=False)
    return Subject(run, "blocks of every second layer", True, ran_with, kept, no_decode)


def _scaled() -> Callable[..., Tensor | None]:
    """A hook that shrinks a fresh router's last map so that no token's weight is over 1: weights
    multiply what their block gives, and would grow from layer to layer until nothing is finite.
    """
    asked: list[int] = []

    def hook(last: Any, args: Any, weight_BT1: Tensor) -> Tensor | None:
        if asked:
            return None
        asked.append(weight_BT1.numel())
        most = weight_BT1.abs().max()
        last.weight.data /= most
        last.bias.data /= most
        return weight_BT1 / most

    return hook


def _arguments_of_4(
    tokens: Counter[str], layer: nn.Module, args: Any, given: dict[str, Any]
) -> tuple[Any, Any]:
    """The arguments that layers were given when this code was written."""
    tokens["came"] += args[0].shape[0] * args[0].shape[1]
    old = {"past_key_value": None, "output_attentions": False, "use_cache": False}
    names = ("attention_mask", "position_ids")
    return args, {**old, **{name: given.get(name) for name in names}}


def _turned_here(
    rotary: nn.Module, tokens: Counter[str], block: nn.Module, args: Any, given: dict[str, Any]
) -> tuple[Any, Any]:
    """Turns the positions of the tokens that a block is given: newer code turns those of all tokens
    once, before the layers.
    """
    tokens["taken"] += args[0].shape[1]
    turned = rotary(args[0], given["position_ids"])
    names = ("attention_mask", "position_ids")
    return args, {**{name: given[name] for name in names}, "position_embeddings": turned}


class Positioned(Causal):
    """Tells the position of every row's tokens, where newer code lets rows share them."""

    def more(self, ids_BT: Tensor, column: int) -> dict[str, Any]:
        """Positions."""
        position_T = torch.arange(column, column + ids_BT.shape[1], device=ids_BT.device)
        return {"position_ids": position_T.expand(ids_BT.shape)}


# ---- D-LLM (Jyk-122/D-LLM, NeurIPS 2024) ----


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
        store = torch.distributed.HashStore()
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


# ---- what several need ----


def like_4(model: Any, inner: str = "") -> list[str]:
    """Give attentions and layers the outputs that they had in transformers 4; what was done."""
    if OF_4:
        return []
    for layer in model.model.layers:
        attention = (getattr(layer, inner) if inner else layer).self_attn
        attention.register_forward_hook(lambda _, args, output: (*output, None))
        layer.register_forward_hook(lambda _, args, output: output[0])
    return [LIKE_4]


def filled(model: nn.Module, weights: dict[str, Tensor], but: str = "\0") -> None:
    """Load a peer's weights; all must be there but its own."""
    missing = model.load_state_dict(weights, strict=False).missing_keys
    wrong = [name for name in missing if but not in name]
    if wrong:
        raise ValueError(f"the base has no weights for {wrong[0]}")


@contextmanager
def class_name_kept(kind: type) -> Iterator[None]:
    """Undo that some peers rename the class of a model, for the whole process."""
    before = kind.__name__
    try:
        yield
    finally:
        kind.__name__ = before


def module_in(path: Path, name: str) -> ModuleType:
    """A module by its file: packages called `utils` or `llama` are not the only ones so called."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"no {path.name} in the peer's folder")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def package_in(folder: Path, name: str) -> str:
    """A package by its folder, under this name."""
    module_in(folder / "__init__.py", name).__path__ = [str(folder)]
    return name


PEERS: dict[str, tuple[str, Callable[[Path, Any, Wanted], Subject]]] = {
    "llm-drop": ("CASE-Lab-UMD/LLM-Drop", llm_drop),
    "official": ("CASE-Lab-UMD/Router-Tuning-Mixture-of-Depths", official),
    "skipgpt": ("EIT-NLP/SkipGPT", skipgpt),
    "skipgpt-sparse": ("Sophie10001b/SkipGPT", skipgpt_sparse),
    "mod": ("astramind-ai/Mixture-of-depths", mod),
    "d-llm": ("Jyk-122/D-LLM", d_llm),
}
"""By name: the GitHub repository, and what builds the peer from a checkout of it."""
