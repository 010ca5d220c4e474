"""Mixtures of experts: a skipped token does not come to the experts, nor to who picks them,
whatever computes the experts; router logits and the load-balancing loss are of what ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from laws import (
    CHUNKS,
    EFFECT,
    Batch,
    Case,
    assert_close,
    assert_mixed,
    batch,
    difference,
    randomize,
    routed_model,
    run,
)
from router_tuning import RoutingConfig, attach, dense, execute, record, replay
from router_tuning.baselines import StaticDrop
from router_tuning.data import WindowDataset, Windows
from router_tuning.errors import UnsupportedCallError
from router_tuning.execution.context import decided_by
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.units import decoder_layers, decoder_of, experts_of, mixture_layers
from tiny import tiny_model, token_ids

MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
WITHOUT_A_LOSS = ("deepseek_v3",)
"""Its experts are balanced otherwise, so transformers works out no loss."""
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CASES = [
    Case(family, granularity, "all" if granularity == "mlp_token" else "kept")
    for family in MIXTURES
    for granularity in ("mlp_token", "block_token")
]
TWO_OF_FOUR = {"num_experts_per_tok": 2}

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def mixture(case: Case, implementation: str = "grouped_mm") -> PreTrainedModel:
    model = routed_model(case, **TWO_OF_FOUR)
    model.set_experts_implementation(implementation)
    return model


class Arrivals:
    """Tokens that come to the experts of each layer, to who picks them, and pairs of a token and an
    expert.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.picked: dict[int, int] = {}
        self.pairs: dict[int, int] = {}


@contextmanager
def arrivals(model: nn.Module) -> Iterator[Arrivals]:
    found, decoder = Arrivals(), decoder_of(model)
    with ExitStack() as stack:
        for index, experts in mixture_layers(decoder).items():
            mlp: Any = decoder_layers(decoder)[index].mlp

            def come(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                found.tokens[index] = found.tokens.get(index, 0) + len(args[0])
                found.pairs[index] = found.pairs.get(index, 0) + args[1].numel()

            def ask(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                found.picked[index] = found.picked.get(index, 0) + args[0][..., 0].numel()

            picker = mlp.router if hasattr(mlp, "router") else mlp.gate
            stack.callback(experts.register_forward_pre_hook(come).remove)
            stack.callback(picker.register_forward_pre_hook(ask).remove)
        yield found


def kept_of_mixtures(model: nn.Module, decisions: dict[str, Tensor]) -> dict[int, int]:
    """How many tokens each layer with experts keeps."""
    layers = {int(name.split(".")[1]): int(keep.sum()) for name, keep in decisions.items()}
    return {index: layers[index] for index in mixture_layers(decoder_of(model))}


# ---- skipping ----


@pytest.mark.parametrize("phase", CHUNKS)
@every_implementation
@every_case
def test_only_kept_tokens_come_to_the_experts(case: Case, implementation: str, phase: str) -> None:
    # Unpadded: where a forward keeps all its real tokens, the dense call runs its pads too.
    model, given = mixture(case, implementation), batch(padded=False)
    with arrivals(model) as came:
        ran = run(model, given, CHUNKS[phase])
    assert_mixed(ran.trace)
    kept = kept_of_mixtures(model, ran.trace.decisions())
    assert came.tokens == came.picked == kept
    assert came.pairs == {index: 2 * number for index, number in kept.items()}


@every_implementation
@every_case
def test_skipping_equals_masking(case: Case, implementation: str) -> None:
    """And decoding, and another implementation: under replayed decisions."""
    model, given = mixture(case, implementation), batch()
    decisions = run(model, given).trace.decisions()
    masked = run(model, given, decisions=decisions, path="masked")
    for chunks in (None, *CHUNKS.values()):
        assert_close(run(model, given, chunks, decisions=decisions), masked, given.real)
    model.set_experts_implementation("eager")
    assert_close(run(model, given, decisions=decisions), masked, given.real)
    with dense(model), torch.no_grad():
        plain = model(given.ids, attention_mask=given.mask, position_ids=given.positions).logits
    assert difference(plain, masked.logits, given.real) > EFFECT


@every_implementation
@pytest.mark.parametrize("family", MIXTURES)
def test_a_dropped_mlp_calls_no_expert(family: str, implementation: str) -> None:
    model, given = mixture(Case(family, "mlp_token", "all"), implementation), batch()
    last = max(mixture_layers(decoder_of(model)))
    with decided_by(model, StaticDrop([f"layers.{last}.mlp"])), arrivals(model) as came:
        run(model, given)
    assert last not in came.tokens
    assert len(came.tokens) == len(mixture_layers(decoder_of(model))) - 1


def test_which_layers_have_experts() -> None:
    assert sorted(mixture_layers(decoder_of(tiny_model("qwen3_moe")))) == [0, 2, 3]
    assert sorted(mixture_layers(decoder_of(tiny_model("deepseek_v3")))) == [1, 2, 3]
    decoder = decoder_of(tiny_model("llama"))
    assert mixture_layers(decoder) == {}
    assert experts_of(decoder, decoder_layers(decoder)[0]) is None


# ---- router logits and the load-balancing loss ----


def asked(model: nn.Module, given: Batch, **options: Any) -> Any:
    """Outputs with router logits."""
    with torch.no_grad():
        return model(
            input_ids=given.ids,
            attention_mask=given.mask,
            position_ids=given.positions,
            output_router_logits=True,
            use_cache=False,
            **options,
        )


def needs_router_logits(family: str) -> None:
    """Skip where transformers gives none of a family: at 5.16, none of DeepSeek-V3."""
    if asked(tiny_model(family, **TWO_OF_FOUR), batch()).get("router_logits") is None:
        pytest.skip(f"this transformers gives no router logits of {family}")


def load_balancing_loss(logits: tuple[Tensor, ...], chosen: int) -> Tensor:
    """Switch Transformers' (equations 4 to 6), over all layers together, token by token."""
    rows = torch.cat(logits)
    experts = rows.shape[1]
    counts, shares = torch.zeros(experts), torch.zeros(experts)
    for row in rows:
        probabilities = row.softmax(-1)
        counts[probabilities.topk(chosen).indices] += 1
        shares += probabilities
    return experts * (counts / len(rows)) @ (shares / len(rows))


SEQUENCES = [Case(f, g, "all") for f in MIXTURES for g in ("mlp_sequence", "block_sequence")]


@pytest.mark.parametrize("case", [*CASES, *SEQUENCES], ids=str)
def test_router_logits_are_of_the_tokens_that_ran_on_either_path(case: Case) -> None:
    needs_router_logits(case.family)
    model, given = mixture(case), batch()
    decisions = run(model, given).trace.decisions()
    found = {}
    for path in ("masked", "skipping"):
        with replay(model, decisions), execute(model, path):  # type: ignore[arg-type]
            found[path] = asked(model, given)
    kept = kept_of_mixtures(model, decisions)
    for of in found.values():
        assert [len(logits) for logits in of.router_logits] == list(kept.values())
    for a, b in zip(*(of.router_logits for of in found.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    if case.family in WITHOUT_A_LOSS:
        return
    for of in found.values():
        by_hand = load_balancing_loss(of.router_logits, chosen=2)
        torch.testing.assert_close(of.aux_loss, by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", ["masked", "skipping"])
@every_case
def test_with_everything_kept_the_loss_is_the_dense_one(case: Case, path: str) -> None:
    needs_router_logits(case.family)
    model, given = tiny_model(case.family, **TWO_OF_FOUR), batch()
    before = asked(model, given, labels=given.ids)
    attach(model, case.config)
    with execute(model, path):  # type: ignore[arg-type]
        after = asked(model, given, labels=given.ids)
    for a, b in zip(before.router_logits, after.router_logits, strict=True):
        assert torch.equal(a[given.real.flatten()], b)  # pads have none
    if case.family not in WITHOUT_A_LOSS:
        torch.testing.assert_close(before.aux_loss, after.aux_loss, rtol=0, atol=1e-6)
        torch.testing.assert_close(before.loss, after.loss, rtol=0, atol=1e-6)
    with dense(model):
        again = asked(model, given)
    for a, b in zip(before.router_logits, again.router_logits, strict=True):
        assert torch.equal(a, b)


def test_the_load_balancing_loss_is_part_of_a_loss_on_labels() -> None:
    model, given = mixture(Case("olmoe", "mlp_token", "all")), batch()
    decisions = run(model, given).trace.decisions()
    with replay(model, decisions):
        with_it = asked(model, given, labels=given.ids)
        plain = model(
            given.ids,
            attention_mask=given.mask,
            position_ids=given.positions,
            labels=given.ids,
            use_cache=False,
        )
    part = model.config.router_aux_loss_coef * with_it.aux_loss
    torch.testing.assert_close(with_it.loss, plain.loss + part)
    torch.testing.assert_close(with_it.logits[given.real], plain.logits[given.real])


def test_router_logits_of_layers_that_ran_nothing_are_empty() -> None:
    model, given = mixture(Case("olmoe", "mlp_token", "all")), batch()
    names = [f"layers.{index}.mlp" for index in range(4)]
    for path in ("masked", "skipping"):
        with decided_by(model, StaticDrop(names[1:3])), execute(model, path):  # type: ignore[arg-type]
            found = asked(model, given)
        real = int(given.real.sum())
        assert [tuple(x.shape) for x in found.router_logits] == [(n, 4) for n in (real, 0, 0, real)]
        with decided_by(model, StaticDrop(names)), execute(model, path):  # type: ignore[arg-type]
            found = asked(model, given)
        assert [tuple(x.shape) for x in found.router_logits] == [(0, 4)] * 4


def test_unrouted_layers_and_routed_attentions_leave_router_logits_be() -> None:
    given = batch()
    model = tiny_model("olmoe", **TWO_OF_FOUR)
    attach(model, RoutingConfig(granularity="mlp_token", layers=[1]))
    randomize(model)
    with record(model) as trace:
        found = asked(model, given)
    kept, real = int(trace.decisions()["layers.1.mlp"].sum()), int(given.real.sum())
    assert [len(x) for x in found.router_logits] == [real, kept, real, real]
    attending = asked(mixture(Case("olmoe")), given)
    assert [len(x) for x in attending.router_logits] == [given.ids.numel()] * 4


def test_router_logits_while_decoding() -> None:
    """Each forward has its own, and the decoder may be asked alone."""
    model, given = mixture(Case("olmoe", "mlp_token", "all")), batch(rows=1, padded=False)
    generated = model.generate(
        given.ids,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_router_logits=True,
    )
    plain = model.generate(given.ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(generated, plain)
    with torch.no_grad(), record(model) as trace:
        output = model.model(given.ids, output_router_logits=True)
    kept = kept_of_mixtures(model, trace.decisions())
    assert [len(x) for x in output.router_logits] == list(kept.values())


def test_router_logits_without_names_are_refused() -> None:
    model, given = mixture(Case("olmoe", "mlp_token", "all")), batch()
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="return_dict"):
        model.model(given.ids, output_router_logits=True, return_dict=False)


@pytest.mark.parametrize("objective", ["distill", "lm"])
def test_routers_train_where_the_config_asks_for_router_logits(
    objective: str, tmp_path: Any
) -> None:
    """Layers below the first router are not run twice, so theirs would be missing."""
    base = tiny_model("olmoe", output_router_logits=True)
    config = RouterTuningConfig(granularity="mlp_token", layers=[2, 3], budget=0.7)
    routed = get_peft_model(base, config)
    ids = token_ids(8, 16)
    rows = WindowDataset(Windows(ids, torch.ones_like(ids, dtype=torch.bool)))
    arguments = RouterTrainingArguments(
        str(tmp_path),
        max_steps=3,
        objective=objective,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = RouterTrainer(routed, arguments, train_dataset=rows)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in routed.parameters() if p.requires_grad)
