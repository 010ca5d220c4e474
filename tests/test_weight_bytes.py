"""Bytes of weights: by hand, and against the modules that forwards called."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from torch import nn

from laws import Batch, Case, batch, routed_model, run
from router_tuning.cost import cost
from router_tuning.execution.context import dense, routing_of
from router_tuning.units import KINDS, decoder_layers, decoder_of, router_child
from router_tuning.weight_bytes import Part, layer_weights, weight_bytes
from tiny import tiny_model

DECODE = [12, *[1] * 8]


class Called:
    """Bytes of the weights of the modules that each forward called, routers and all."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        decoder, causal = decoder_of(model), model
        head: Any = causal.get_output_embeddings()  # type: ignore[operator]
        self.seen: set[nn.Module] = set()
        decoder.register_forward_pre_hook(self.begin)
        head.register_forward_pre_hook(self.note)
        for layer in decoder_layers(decoder):
            for module in layer.modules():
                if list(module.parameters(recurse=False)):
                    module.register_forward_pre_hook(self.note)

    def begin(self, module: nn.Module, args: Any) -> None:
        self.seen = set()

    def note(self, module: nn.Module, args: Any) -> None:
        if module not in self.seen and args[0].numel():
            self.seen.add(module)
            self.bytes += sum(weight.nbytes for weight in module.parameters(recurse=False))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt_neox"])
@pytest.mark.parametrize(
    ("kind", "kv"),
    [
        ("mlp_token", "all"),
        *product(("attn_token", "block_token", "attn_sequence"), ("all", "kept")),
    ],
)
def test_they_are_those_of_the_modules_that_ran(family: str, kind: str, kv: Any) -> None:
    model = routed_model(Case(family, granularity=kind, kv=kv))
    given = batch(1, sum(DECODE), padded=False)
    called = Called(model)
    result = run(model, given, DECODE)
    found = weight_bytes(model, result.trace)
    # Beside the routers, which are called in another way.
    layers = decoder_layers(decoder_of(model))
    sizes = [getattr(layer, router_child(k), None) for layer in layers for k in KINDS]
    routers = sum(p.nbytes for r in sizes if r is not None for p in r.parameters())
    assert found.read - len(DECODE) * routers == called.bytes
    called.bytes = 0
    with dense(model):
        run(model, given, DECODE)
    assert found.dense == called.bytes >= found.read - len(DECODE) * routers


def test_a_token_reads_its_own_experts_and_many_tokens_all() -> None:
    model = tiny_model("mixtral")
    (mlp, *_) = [weights.mlp for weights in layer_weights(decoder_of(model))]
    held: Any = decoder_layers(decoder_of(model))[0].mlp
    everything = sum(p.nbytes for p in held.parameters())
    number, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    one = sum(p.nbytes for p in held.experts.parameters()) // number
    assert mlp.read(0) == 0
    assert mlp.read(1) == everything - (number - chosen) * one
    assert mlp.read(1000) == mlp.fixed + mlp.experts == everything


def test_parts_add_up_to_their_layers() -> None:
    for family in ("llama", "gemma3", "olmoe", "falcon", "deepseek_v3"):
        decoder = decoder_of(routed_model(Case(family)))
        for layer, weights in zip(decoder_layers(decoder), layer_weights(decoder), strict=True):
            parts = [weights.key, weights.query, weights.mlp, weights.norm, weights.rest]
            parts += weights.routers.values()
            assert all(isinstance(part, Part) and part.fixed >= 0 for part in parts)
            total = sum(part.fixed + part.experts for part in parts)
            assert total == sum(p.nbytes for p in layer.parameters())


def test_cost_reports_them_with_the_tokens() -> None:
    model, given = routed_model(), batch(2, 9, padded=False)
    trace = run(model, given, [5, 4]).trace
    found, weights = cost(model, trace), weight_bytes(model, trace)
    assert (found.weight_bytes, found.dense_weight_bytes) == (weights.read, weights.dense)
    assert found.tokens == 18
    first = cost(model, run(model, Batch(given.ids[:, :5], given.mask[:, :5]), [5]).trace)
    assert (found - first).tokens == 8
    assert (found - first) + first == found
    assert len(routing_of(model).units) == 4
