"""The layers below the first routed one run once for two passes, with the same result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from router_tuning.attach import attach
from router_tuning.config import RoutingConfig
from router_tuning.execution.context import dense
from router_tuning.training.shared_prefix import capture_prefix, reuse_prefix, shared_layers
from router_tuning.units import decoder_layers, decoder_of
from tiny import tiny_model, token_ids


def routed(family: str = "llama", *layers: int, frozen: bool = True) -> nn.Module:
    model = tiny_model(family).requires_grad_(not frozen)
    attach(model, RoutingConfig(layers=list(layers) or None))
    return model


@contextmanager
def counted_mlps(model: nn.Module) -> Iterator[Counter[int]]:
    """How often each layer's MLP ran: the layer's own forward is what is replaced."""
    calls: Counter[int] = Counter()
    handles = [
        layer.mlp.register_forward_hook(lambda *_, i=i: calls.update([i]))  # type: ignore[union-attr]
        for i, layer in enumerate(decoder_layers(decoder_of(model)))
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_two_passes_run_the_lower_layers_once_and_agree(family: str) -> None:
    model, ids = routed(family, 2, 3), token_ids()
    expected = model(ids).logits
    with counted_mlps(model) as calls:
        with dense(model), capture_prefix(model) as prefix:
            model(ids)
        with reuse_prefix(prefix):
            logits = model(ids).logits
    assert calls == {0: 1, 1: 1, 2: 2, 3: 2}
    assert torch.equal(logits, expected)


def test_nothing_is_left_behind(family: str) -> None:
    model, ids = routed(family, 2), token_ids()
    layers = decoder_layers(decoder_of(model))
    before = [dict(layer.__dict__) for layer in layers]
    with capture_prefix(model) as prefix:
        expected = model(ids).logits
    with pytest.raises(TypeError), reuse_prefix(prefix):
        model(ids, no_such_argument=object(), input_ids=ids)
    assert [dict(layer.__dict__) for layer in layers] == before
    assert not any(layer._forward_hooks for layer in layers)
    assert torch.equal(model(ids).logits, expected)


def test_an_instance_forward_that_was_there_comes_back() -> None:
    model = routed("llama", 1)
    layer = decoder_layers(decoder_of(model))[0]
    mine = layer.forward
    layer.__dict__["forward"] = mine
    with capture_prefix(model) as prefix:
        model(token_ids())
    with reuse_prefix(prefix):
        assert layer.__dict__["forward"] is not mine
    assert layer.__dict__["forward"] is mine


def test_nothing_is_shared_where_the_first_layer_is_routed() -> None:
    model = routed("llama", 0, 3)
    with capture_prefix(model) as prefix:
        model(token_ids())
    with reuse_prefix(prefix), counted_mlps(model) as calls:
        model(token_ids())
    assert calls == {0: 1, 1: 1, 2: 1, 3: 1}


def test_nothing_is_shared_where_something_below_trains() -> None:
    assert shared_layers(routed("llama", 2, frozen=False)) == []
    model = routed("llama", 2)
    model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
    assert shared_layers(model) == []
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    assert len(shared_layers(model)) == 2
