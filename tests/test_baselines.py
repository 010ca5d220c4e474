"""Controls: random masks and static dropping, their rates and orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from laws import CHUNKS, Batch, Case, Counter, bare_model, batch, randomize, routed_model, run
from router_tuning import RoutingConfig, attach, decided_by, dense, record, replay
from router_tuning.baselines import RandomMask, StaticDrop, cosine_order, greedy_order
from router_tuning.data import Windows
from router_tuning.errors import ConfigError
from router_tuning.units import decoder_layers, decoder_of, first_of, part_of, post_norm_of
from tiny import FAMILIES, token_ids

NAMES = [f"layers.{i}.attn" for i in range(4)]


def windows(number: int = 4, length: int = 24, seed: int = 0) -> Windows:
    ids = token_ids(number, length, seed=seed)
    return Windows(ids, torch.zeros_like(ids, dtype=torch.bool))


def decisions(model: Any, decider: Any, given: Batch, chunks: list[int] | None = None) -> Any:
    with decided_by(model, decider):
        return run(model, given, chunks).trace


# Random masks


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.75, 1.0])
def test_random_masks_keep_at_their_rate(rate: float) -> None:
    model, given = routed_model(), batch(20, 60, padded=False)
    trace = decisions(model, RandomMask(rate), given)
    assert trace.kept_fraction() == pytest.approx(rate, abs=0.02)  # of 4800
    per_unit = trace.kept_per_unit()
    assert all(share == pytest.approx(rate, abs=0.04) for share in per_unit.values())


def test_random_masks_take_a_rate_a_unit() -> None:
    model, given = routed_model(), batch(20, 60, padded=False)
    rates = dict(zip(NAMES, (0.0, 0.3, 0.6, 1.0), strict=True))
    per_unit = decisions(model, RandomMask(rates), given).kept_per_unit()
    assert per_unit == pytest.approx(rates, abs=0.04)


def test_random_masks_are_independent_of_rows_units_and_seeds() -> None:
    model, given = routed_model(), batch(8, 100, padded=False)
    first = decisions(model, RandomMask(0.5, seed=0), given).decisions()
    again = decisions(model, RandomMask(0.5, seed=0), given).decisions()
    other = decisions(model, RandomMask(0.5, seed=1), given).decisions()
    assert all(torch.equal(first[name], again[name]) for name in NAMES)
    masks = [*first.values(), *other.values()]
    rows = torch.stack([row for mask in masks for row in mask]).double() - 0.5
    # Correlations of 64 independent rows of 100 flips have a standard deviation of 0.1.
    correlation = (rows @ rows.T) / 25
    off = correlation[~torch.eye(len(rows), dtype=torch.bool)]
    assert off.abs().max() < 0.45
    assert float(off.std()) == pytest.approx(0.1, abs=0.02)
    # Neighbours in a row are independent too.
    neighbours = (rows[:, 1:] * rows[:, :-1]).mean() * 4
    assert abs(float(neighbours)) < 0.05


def test_random_masks_do_not_depend_on_chunks_and_padding() -> None:
    model, given = routed_model(), batch(padded=False)
    whole = decisions(model, RandomMask(0.5), given).decisions()
    for chunks in CHUNKS.values():
        chunked = decisions(model, RandomMask(0.5), given, chunks).decisions()
        assert all(torch.equal(whole[name], chunked[name]) for name in NAMES)
    padded = decisions(model, RandomMask(0.5), given.row(0, left=5)).decisions()
    assert all(torch.equal(whole[name][0], padded[name][0, 5:]) for name in NAMES)


def test_random_masks_really_skip() -> None:
    model, given = routed_model(), batch(padded=False)
    with Counter(model) as counter:
        trace = decisions(model, RandomMask(0.3), given)
    queried = sum(n for (_, name), n in counter.rows.items() if "q_proj" in name)
    assert queried == round(trace.kept_fraction() * 4 * given.ids.numel())


def test_random_masks_of_sequences_keep_or_skip_them_whole() -> None:
    model, given = routed_model(Case(granularity="attn_sequence")), batch(200, 12, padded=False)
    trace = decisions(model, RandomMask(0.7), given)
    assert trace.kept_fraction() == pytest.approx(0.7, abs=0.03)
    for keep in trace.decisions().values():
        assert keep[:, :3].all()
        assert ((keep[:, 3:].sum(1) == 0) | (keep[:, 3:].sum(1) == 9)).all()


@pytest.mark.parametrize(
    "rate", [-0.1, 1.2, float("nan"), True, "0.5", None, {"layers.0.attn": 1.5}, [0.5]], ids=str
)
def test_a_rate_is_a_fraction(rate: Any) -> None:
    with pytest.raises(ConfigError, match=r"a rate is a kept fraction from 0 to 1.*; got"):
        RandomMask(rate)


def test_rates_may_be_of_any_kind_of_number() -> None:
    model, given = routed_model(), batch(padded=False)
    expected = decisions(model, RandomMask(0.5), given).decisions()
    found = decisions(model, RandomMask(np.float32(0.5)), given).decisions()  # type: ignore[arg-type]
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("rates", "match"),
    [
        ({name: 0.5 for name in NAMES[1:]}, r"rate lacks 'layers\.0\.attn'"),
        ({name: 0.5 for name in [*NAMES, "layers.4.attn"]}, r"rate names 'layers\.4\.attn'"),
        ({}, r"rate lacks 'layers\.0\.attn'"),
    ],
)
def test_rates_name_every_routed_unit_and_no_other(rates: dict[str, float], match: str) -> None:
    model = routed_model()
    listed = rf"{match}; wanted each of the routed units {', '.join(NAMES)}"
    with pytest.raises(ConfigError, match=listed), decided_by(model, RandomMask(rates)):
        pass


# Static dropping


@pytest.mark.parametrize("dropped", ["layers.1.attn", 3, None])
def test_what_is_dropped_is_a_list(dropped: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a list of unit names, got .*; write Static"):
        StaticDrop(dropped)


def test_only_routed_units_can_be_dropped() -> None:
    model = bare_model("llama")
    attach(model, RoutingConfig(layers=[0, 2]))
    listed = r"routed units layers\.0\.attn, layers\.2\.attn$"
    for name in ("layers.1.attn", "layers.2.self_attn", 2):
        drop = StaticDrop(["layers.0.attn", name])  # type: ignore[list-item]
        with pytest.raises(ConfigError, match=f"names {name!r}.*{listed}"), decided_by(model, drop):
            pass


@pytest.mark.parametrize("family", FAMILIES)
def test_static_drop_is_the_model_without_those_attentions(family: str) -> None:
    model, given = bare_model(family), batch(padded=False)
    attach(model, RoutingConfig())
    with decided_by(model, StaticDrop(["layers.1.attn", "layers.2.attn"])):
        dropped = run(model, given)
    assert dropped.trace.kept_per_unit() == dict(zip(NAMES, (1, 0, 0, 1), strict=True))
    with dense(model):
        hooks = [nothing_added(model, index, "attn") for index in (1, 2)]
        expected = run(model, given).logits
        for hook in hooks:
            hook.remove()
    assert (dropped.logits - expected).abs().max() < 3e-5


def nothing_added(model: Any, index: int, kind: str) -> Any:
    """A hook that lets the attention or the MLP of a layer add nothing to the residual."""
    decoder = decoder_of(model)
    layer = decoder_layers(decoder)[index]
    branch = post_norm_of(decoder, layer, kind) or part_of(decoder, layer, kind)

    def nothing(module: Any, args: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    return branch.register_forward_hook(nothing)


def test_static_drop_of_nothing_is_the_dense_model() -> None:
    model, given = routed_model(), batch(padded=False)
    with decided_by(model, StaticDrop([])):
        nothing = run(model, given).logits
    with dense(model):
        assert torch.equal(nothing, run(model, given).logits)


def similarities(model: Any, text: Windows) -> dict[str, float]:
    """Of the stream before and after each unit, where an MLP's begins at what its layer gives
    without it.
    """
    layers, calls, found = decoder_layers(decoder_of(model)), [], {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(text.ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for index, (layer, (args, kwargs)) in enumerate(zip(layers, calls, strict=True)):
            before, end = args[0], first_of(layer(*args, **kwargs))
            hook = nothing_added(model, index, "mlp")
            between = first_of(layer(*args, **kwargs))
            hook.remove()
            for kind, first, last in (
                ("attn", before, between),
                ("mlp", between, end),
                ("block", before, end),
            ):
                cosine = torch.nn.functional.cosine_similarity(first, last, dim=-1)
                found[f"layers.{index}.{kind}"] = float(cosine.mean())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_cosine_order_equals_the_obvious_computation(family: str) -> None:
    text = windows()
    expected = similarities(bare_model(family), text)
    for granularity in (["attn_token", "mlp_token"], ["block_token"]):
        model = bare_model(family)
        attach(model, RoutingConfig(granularity=granularity))
        randomize(model)  # which must not matter: the dense model is measured
        order = cosine_order(model, text, batch_size=3)
        assert order == sorted(order, key=lambda name: -expected[name])
        assert len(order) == 4 * len(granularity)
        assert not any(module._forward_hooks for module in model.modules())


def test_the_two_units_of_a_layer_have_random_masks_of_their_own() -> None:
    model, given = (
        routed_model(Case(granularity="attn_token+mlp_token")),
        batch(20, 60, padded=False),
    )
    keep = decisions(model, RandomMask(0.5), given).decisions()
    same = (keep["layers.1.attn"] == keep["layers.1.mlp"]).float().mean()
    assert float(same) == pytest.approx(0.5, abs=0.05)  # of 1200


def test_cosine_order_names_routed_layers_only() -> None:
    model = bare_model("llama")
    attach(model, RoutingConfig(layers=[0, 2]))
    assert sorted(cosine_order(model, windows())) == ["layers.0.attn", "layers.2.attn"]


def loss_without(model: PreTrainedModel, text: Windows, dropped: list[str]) -> float:
    """By a full run of everything."""
    with torch.no_grad(), decided_by(model, StaticDrop(dropped)):
        logits = model(text.ids, use_cache=False).logits
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text.ids[:, 1:].flatten())
    )


@pytest.mark.parametrize("case", [Case(), Case(kv="all"), Case("gemma3")], ids=str)
def test_greedy_order_equals_full_recomputation(case: Case) -> None:
    model, text = routed_model(case), windows()
    expected: list[str] = []
    for _ in range(3):
        left = [name for name in NAMES if name not in expected]
        losses = {name: loss_without(model, text, [*expected, name]) for name in left}
        expected.append(min(losses, key=lambda name: losses[name]))
    steps: list[tuple[int, int]] = []
    assert greedy_order(model, text, 3, progress=lambda *s: steps.append(s)) == expected
    assert steps == [(i + 1, 9) for i in range(9)]
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("harmless", [0, 2, 3])
def test_greedy_order_drops_what_does_nothing_first(harmless: int) -> None:
    """A unit that adds nothing costs nothing; the others carry what the model knows of the text."""
    model, text = bare_model("llama"), windows()
    model.model.layers[harmless].self_attn.o_proj.weight.data.zero_()
    with torch.no_grad():  # text that the model itself finds likely: every other unit counts
        text.ids[:, 1:] = model(text.ids).logits[:, :-1].argmax(-1)
        for _ in range(24):
            text.ids[:, 1:] = model(text.ids).logits[:, :-1].argmax(-1)
    attach(model, RoutingConfig())
    assert greedy_order(model, text, 1) == [f"layers.{harmless}.attn"]


def test_greedy_order_puts_layers_back_after_an_error() -> None:
    model, text = routed_model(), windows()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = run(model, batch()).logits
    with pytest.raises(KeyboardInterrupt):
        greedy_order(model, text, 2, progress=stop)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    assert torch.equal(run(model, batch()).logits, before)


def test_greedy_order_cannot_drop_more_than_there_is() -> None:
    model = routed_model()
    assert greedy_order(model, windows(), 0) == []
    assert sorted(greedy_order(model, windows(2, 8), 4)) == NAMES
    with pytest.raises(ConfigError, match="asked to drop 5 units, but only 4 are routed"):
        greedy_order(model, windows(), 5)


# A router that is one number a unit


def test_learned_static_dropping_is_a_router() -> None:
    model, given = bare_model("llama"), batch(padded=False)
    attach(model, RoutingConfig(router="bias"))
    model.model.layers[2].skip_router_attn.bias.data.fill_(-1.0)
    result = run(model, given)
    assert result.trace.kept_per_unit() == dict(zip(NAMES, (1, 1, 0, 1), strict=True))
    with decided_by(model, StaticDrop(["layers.2.attn"])):
        assert torch.equal(run(model, given).logits, result.logits)


def test_deciders_nest_and_end_with_their_block() -> None:
    model, given = routed_model(), batch(padded=False)
    own = run(model, given).trace
    with decided_by(model, StaticDrop(NAMES)):
        assert run(model, given).trace.kept_fraction() == 0
        with replay(model, own.decisions()), torch.no_grad(), record(model) as inner:
            model(given.ids)
        assert inner.kept_fraction() == own.kept_fraction()
        assert run(model, given).trace.kept_fraction() == 0
    assert run(model, given).trace.kept_fraction() == own.kept_fraction()
